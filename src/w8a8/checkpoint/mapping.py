"""What a GGUF file's model is in transformers: its config, its tokenizer, and a name for each tensor.

transformers reads GGUF itself, whole, into a model in memory. Here it is shown an outline (`gguf.write_outline`): the
file's checked fields and the names of its tensors, no data. From that it makes the config, a model without weights,
which says what parameters there are, and the tokenizer. What it would do to each tensor (`Change`) is told by the class
that does it there (`TENSOR_PROCESSORS` of modeling_gguf_pytorch_utils, `GGUF_ARCHS` of integrations/gguf); a class that
this version does not know is refused. The parameters' names are those that `save_pretrained` writes.
"""

import math
import re
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from w8a8.checkpoint.gguf import GgufHeader, write_outline
from w8a8.errors import MissingExtraError, UnsupportedModelError, W8A8Error, first_line
from w8a8.reading import brief, show

OUTLINE = "model.gguf"
_VOCABULARY = tuple(f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type", "merges"))
_WIDTHS = {
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
"""What some of transformers' configs leave at the size of one published model."""

MAX_EXPERTS = 4096

_LAYER = re.compile(r"blk\.(\d+)\.")
_EXPERTS = re.compile(r"blk\.\d+\.ffn_(gate|up|down)_exps\.weight")
_PARTS = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}


class Swap(NamedTuple):
    """Rows from `first` on, seen as [.., a, b, width], are to become [.., b, a, width]; `far`: [1, a, b, width]."""

    a: int
    b: int
    width: int
    first: int = 0
    far: bool = False


class Change(NamedTuple):
    """What happens to a tensor on its way to transformers: to its numbers, in float32, and to its rows or columns."""

    minus: float = 0.0
    log: bool = False
    rows: Swap | None = None
    columns: Swap | None = None


UNCHANGED = Change()


class Parameter(NamedTuple):
    """A tensor of the checkpoint that transformers would save: name and shape."""

    name: str
    shape: tuple[int, ...]


class Folder:
    """A temporary folder, which goes with the last reference to it."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="w8a8-gguf-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


@dataclass(frozen=True)
class Mapped:
    """A GGUF file's model as transformers has it.

    `folder` holds config.json and the tokenizer; `parameters` gives for each of the file's tensors that the model uses
    what it becomes: one tensor, or one per expert; `changes` says how, where it is not as it is.
    """

    folder: Folder
    dtype: str
    parameters: Mapping[str, tuple[Parameter, ...]]
    changes: Mapping[str, Change]


def map_model(source: Path, header: GgufHeader) -> Mapped:
    """Ask transformers for the model in the GGUF file `source`; of split files, the first, `header` being of all.

    Raises `MissingExtraError`, or `UnsupportedModelError` where it has no such model, or not with these tensors.
    """
    folder = Folder()
    _check_layers(source, header)
    with tempfile.TemporaryDirectory(prefix="w8a8-outline-") as outline, _asking(source):
        import gguf  # noqa: F401 - transformers asks for it where it reads the config
        import torch
        import transformers

        # 1) The config; one of transformers' two readers takes a minute for a vocabulary, and needs only its size
        ours = header.text("general.architecture") in _own_readers()
        write_outline(source, header, Path(outline, OUTLINE), () if ours else _VOCABULARY)
        config = transformers.AutoConfig.from_pretrained(outline, gguf_file=OUTLINE)
        embeddings = next((t.shape for t in header.tensors if t.name == "token_embd.weight"), ())
        if len(embeddings) == 2:
            config.vocab_size = embeddings[0]
        for key, name in _WIDTHS.items():
            width = header.number(f"{header.text('general.architecture')}.{key}")
            if width and hasattr(config, name):
                setattr(config, name, width)
        # 2) The model, without weights
        dtype = _dtype(header)
        number = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=number)
        parameters, changes = _Namer(source, header, model).all()
        # 3) The small files
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder.path)
        if model.can_generate():
            model.generation_config.save_pretrained(folder.path)
        if "tokenizer.ggml.model" in header.fields:
            write_outline(source, header, Path(outline, OUTLINE))
            _tokenizer(config, outline).save_pretrained(folder.path)
    return Mapped(folder, dtype, parameters, changes)


@contextmanager
def _asking(source: Path) -> Iterator[None]:
    """Turn whatever transformers raises into an error of this tool, and keep it quiet."""
    try:
        from transformers.utils import logging
    except ModuleNotFoundError as missing:
        raise _missing(missing) from missing
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    except W8A8Error:
        raise
    except ImportError as missing:
        raise _missing(missing) from missing
    except Exception as error:  # a file's fields lead anywhere in transformers
        said = brief(first_line(error))
        raise UnsupportedModelError(f"{source}: transformers cannot read this GGUF ({said}); {_INSTEAD}") from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


_INSTEAD = "give the safetensors checkpoint that it was made from"


def _missing(error: ImportError) -> MissingExtraError:
    what = f"the package {error.name} is not installed" if error.name else first_line(error)
    return MissingExtraError(f"{what}; a GGUF source needs it: pip install 'w8a8[gguf]'")


def _check_layers(source: Path, header: GgufHeader) -> None:
    """Raise where the file counts more layers than it has: models without weights are built from that number."""
    layers = len({found[1] for tensor in header.tensors if (found := _LAYER.match(tensor.name))})
    for key in header.fields:
        count = header.number(key) or 0
        if key.endswith(".block_count") and count > layers:
            raise UnsupportedModelError(f"{source}: {show(key)} is {count:,}, but there are tensors of {layers} layers")


def _own_readers() -> Mapping[str, Any]:
    """The architectures whose config transformers reads by itself, without the package gguf."""
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS

    return GGUF_CONFIG_ARCHS  # type: ignore[no-any-return]


def _dtype(header: GgufHeader) -> str:
    """The dtype of the dequantized model: BF16, unless the file holds nothing but F16 or F32."""
    dtypes = {tensor.dtype for tensor in header.tensors}
    if dtypes <= {"F32"}:
        return "F32"
    return "F16" if dtypes <= {"F16", "F32"} else "BF16"


def _tokenizer(config: Any, outline: str) -> Any:
    """What `AutoTokenizer` makes of a GGUF file, without its second look at the config."""
    from transformers import TokenizersBackend
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

    kind = TOKENIZER_MAPPING.get(type(config), TokenizersBackend)
    if kind.__name__ == "MistralCommonBackend":
        kind = TokenizersBackend
    return kind.from_pretrained(outline, gguf_file=OUTLINE, local_files_only=True)  # which is written down


class _Namer:
    """Finds the parameters that a file's tensors become, and what has to be done to them."""

    def __init__(self, source: Path, header: GgufHeader, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange

        self.source, self.header, self.model = source, header, model
        self.architecture = header.text("general.architecture")
        self.expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        model._weight_conversions = [each for each in conversions if not isinstance(each, PrefixChange)]

    def all(self) -> tuple[dict[str, tuple[Parameter, ...]], dict[str, Change]]:
        from transformers.integrations.gguf import is_gguf_arch_supported

        shapes = {tensor.name: tensor.shape for tensor in self.header.tensors}
        names, changes = (self._newer if is_gguf_arch_supported(self.architecture) else self._older)(shapes)
        tied = set(getattr(self.model, "_tied_weights_keys", None) or ()) if self._is_tied() else set()
        names = {name: target for name, target in names.items() if target in self.expected and target not in tied}
        if missing := sorted(self.expected.keys() - names.values() - tied):
            raise self._refusal(f"it lacks {missing[0]}, or transformers cannot tell which tensor that is")
        parameters = {name: tuple(self._parameters(name, shapes[name], target)) for name, target in names.items()}
        given: Counter[str] = Counter()
        for name, target in names.items():
            given[target] += math.prod(shapes[name])
        if short := sorted(target for target, count in given.items() if count != math.prod(self.expected[target])):
            raise self._refusal(f"it lacks a part of {short[0]}")
        return parameters, {name: change for name, change in changes.items() if change != UNCHANGED}

    def _is_tied(self) -> bool:
        return bool(self.model.config.get_text_config().tie_word_embeddings)

    def _parameters(self, name: str, shape: tuple[int, ...], target: str) -> Iterator[Parameter]:
        """What the tensor `name` becomes: `target`, or experts of it."""
        import torch
        from transformers.core_model_loading import revert_weight_conversion

        expected = self.expected[target]
        found = _EXPERTS.fullmatch(name)
        if found:  # gate and up are one parameter
            fits = len(shape) == 3 and (shape[0], shape[1] * (1 if found[1] == "down" else 2), shape[2]) == expected
        else:
            fits = [size for size in shape if size > 1] == [size for size in expected if size > 1]
        if not fits or (found and shape[0] > MAX_EXPERTS):
            raise self._refusal(f"{show(name)} is {list(shape)}, and does not fit {target}, {list(expected)}")
        saved = list(revert_weight_conversion(self.model, {target: torch.empty(expected, device="meta")}))
        if not found:
            yield Parameter(saved[0], expected)
            return
        own = sorted((_expert(key) for key in saved), key=lambda key: key[:2])
        experts = [key for _, part, key in own if part == found[1]] if len(own) > 1 else []
        stem = saved[0].rpartition(".")[0]
        experts = experts or [f"{stem}.{number}.{found[1]}_proj.weight" for number in range(shape[0])]
        yield from (Parameter(expert, shape[1:]) for expert in experts)

    def _older(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, str], dict[str, Change]]:
        """Names and changes of the architectures that transformers reads by `modeling_gguf_pytorch_utils`."""
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )

        config = self.model.config.to_dict()
        kind = TENSOR_PROCESSORS.get(self.architecture, TensorProcessor)
        change = _PROCESSORS.get(kind.__name__)
        if change is None:
            raise self._refusal(f"it changes their tensors ({kind.__name__}) as this version does not")
        known = get_gguf_hf_weights_map(self.model, kind(config=config))
        found = {name: known.get(name) or known.get(name.removesuffix(".weight"), "") for name in shapes}
        return found, {name: change(name, shape, config) for name, shape in shapes.items()}

    def _newer(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, str], dict[str, Change]]:
        """Names and changes of the architectures that transformers reads by `integrations/gguf`."""
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
        from transformers.integrations.gguf import get_gguf_conversion_mapping

        mapping = get_gguf_conversion_mapping(self.architecture, self.model.config)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        found: dict[str, str] = {}
        changes: dict[str, Change] = {}
        for name in shapes:
            found[name], pattern = rename_source_key(name, renamings, converters)
            for operation in by_pattern[pattern].operations if pattern in by_pattern else ():
                changes[name] = self._operation(operation, changes.get(name, UNCHANGED))
        return found, changes

    def _operation(self, operation: Any, change: Change) -> Change:
        """Add one of transformers' operations to what happens to a tensor."""
        text = self.model.config.get_text_config()
        match type(operation).__name__:
            case "Unsqueeze" | "ConcatenateRows":  # no number moves
                return change
            case "SubtractOne":
                return change._replace(minus=operation.offset)
            case "LogNegate":
                return change._replace(log=True)
            case "TiledToGroupedRows" | "TiledToGroupedInputs" as name:
                keys = text.linear_num_key_heads
                each = text.linear_num_value_heads // keys
                width = len(operation.permutation) // (each * keys)
                swap = Swap(each, keys, width, getattr(operation, "offset", 0), far=True)
                return change._replace(rows=swap) if name == "TiledToGroupedRows" else change._replace(columns=swap)
            case name:
                raise self._refusal(f"it changes their tensors ({name}) as this version does not")

    def _refusal(self, reason: str) -> UnsupportedModelError:
        kind = (
            f"{self.source}: transformers takes this GGUF ({show(self.architecture)}) for {type(self.model).__name__}"
        )
        return UnsupportedModelError(f"{kind}, but {reason}; {_INSTEAD}")


def _expert(key: str) -> tuple[int, str, str]:
    """The number, the part and the whole of an expert's name, `experts.3.gate_proj.weight`."""
    *_, number, module, _ = ["", "", "", *key.split(".")]
    return (int(number), _PARTS.get(module, ""), key) if number.isdigit() else (0, "", key)


_Processor = Callable[[str, tuple[int, ...], Mapping[str, Any]], Change]


def _same(_name: str, _shape: tuple[int, ...], _config: Mapping[str, Any]) -> Change:
    return UNCHANGED


def _rotary(name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> Change:
    """llama.cpp has the two halves of a head, which its rotary embedding pairs, element by element."""
    for part, heads in ((".attn_q.", "num_attention_heads"), (".attn_k.", "num_key_value_heads")):
        if part in name:
            return Change(rows=Swap(shape[0] // config[heads] // 2, 2, 1))
    return UNCHANGED


def _zero_centred(name: str, _shape: tuple[int, ...], _config: Mapping[str, Any]) -> Change:
    return Change(minus=1.0) if "norm.weight" in name else UNCHANGED


def _mamba(name: str, _shape: tuple[int, ...], _config: Mapping[str, Any]) -> Change:
    return Change(log=True) if "ssm_a" in name else UNCHANGED


def _bloom(name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> Change:
    """All queries, all keys, all values; transformers has the three of each head together."""
    heads = config["n_head"]
    return Change(rows=Swap(3, heads, shape[0] // heads // 3, far=True)) if "attn_qkv" in name else UNCHANGED


_PROCESSORS: Mapping[str, _Processor] = {
    "TensorProcessor": _same,
    "Qwen2MoeTensorProcessor": _same,
    "MiniMaxM2TensorProcessor": _same,
    "Lfm2TensorProcessor": _same,
    "LlamaTensorProcessor": _rotary,
    "Gemma2TensorProcessor": _zero_centred,
    "NemotronTensorProcessor": _zero_centred,
    "MambaTensorProcessor": _mamba,
    "BloomTensorProcessor": _bloom,
}
"""What a class of transformers does to a tensor's numbers; where it only shapes them, the parameter's shape says it."""
