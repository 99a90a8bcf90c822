"""Read a model's decoder layers, and what each keeps per token and per sequence, from headers and config.

The shapes in the headers are the truth: published configs leave out what their class has as a default (Gemma 3's do not
even say how many heads there are), and a head is as wide as its norm. The config is asked for what shapes do not show:
which layers look at a window only, which reuse another layer's cache, how long a context may be. The names of tensors
and of the config's keys are in the architecture's table (`memory` in `architectures.toml`).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from w8a8.checkpoint import Checkpoint, TensorSpec
from w8a8.errors import NoConfigError
from w8a8.formats.detect import section
from w8a8.plan import Rules, architecture_of, module_name
from w8a8.plan.architectures import MemoryRules

LARGEST = 2**40
"""No number that makes sense in a config is larger."""

Kind = Literal["full", "sliding", "linear"]

_LAYER = re.compile(r".*?(?:^|\.)(?:layers|h|blocks)\.(?P<index>\d+)\.(?P<leaf>.+)")
OUTSIDE = ("vision tower", "audio tower", "projector", "mtp head")
"""Components outside the decoder."""

_SCALE = re.compile(r"\.weight_(scale|scale_inv|zero_point)$")


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer's cache: `heads` KV heads of `head_dim`, for `window` tokens or (0) all.

    It has none where it uses another layer's (`shared`). A linear-attention layer has a state instead: `conv_state`
    elements of 2 bytes, `ssm_state` elements of `ssm_bytes`.
    """

    kind: Kind
    heads: int = 0
    head_dim: int = 0
    window: int = 0
    shared: bool = False
    conv_state: int = 0
    ssm_state: int = 0
    ssm_bytes: int = 4


@dataclass(frozen=True)
class Model:
    """A checkpoint's decoder; numbers are those of the whole model, before tensor parallelism."""

    checkpoint: Checkpoint
    rules: Rules
    table: MemoryRules
    text: Mapping[str, Any]
    layers: tuple[Layer, ...]
    hidden: int
    intermediate: int
    heads: int
    vocabulary: int
    max_context: int

    @classmethod
    def read(cls, checkpoint: Checkpoint) -> "Model":
        """Read the headers and the config. Raises `NoConfigError` where they do not describe a decoder."""
        rules, table = Rules.for_config(checkpoint.config), architecture_of(checkpoint.config).memory
        text = text_config(checkpoint.config, table.defaults)
        parts = _Parts(checkpoint, rules, table, text)
        return cls(
            checkpoint=checkpoint,
            rules=rules,
            table=table,
            text=text,
            layers=tuple(parts.layer(index) for index in sorted(parts.tensors)),
            hidden=parts.hidden,
            intermediate=parts.intermediate,
            heads=parts.heads,
            vocabulary=parts.vocabulary,
            max_context=parts.number("max_position_embeddings", 8192),
        )

    @cached_property
    def components(self) -> Mapping[str, str]:
        """The component of every tensor by name, as in `w8a8.plan`; a scale belongs to its weight's."""
        return {name: component(self.rules, tensor) for name, tensor in self.checkpoint.tensors.items()}

    @cached_property
    def vision(self) -> bool:
        """Whether it has a vision tower."""
        return "vision tower" in self.components.values()


def text_config(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the decoder, with `defaults` for what it leaves out."""
    text = next((found for key in ("text_config", "llm_config") if (found := section(config, key))), config)
    return {**text, **{key: value for key, value in defaults.items() if text.get(key) is None}}


def component(rules: Rules, tensor: TensorSpec) -> str:
    """The component of `tensor`. A tower's own embeddings count as the tower: they go where it goes."""
    name = _SCALE.sub(".weight", tensor.name)
    part = next(
        (part for part in OUTSIDE if part in rules.keep and rules.keep[part].fullmatch("." + module_name(name))), None
    )
    return part or rules.judge(TensorSpec(name, tensor.dtype, tensor.shape, tensor.shard, 0, 0)).component


def layer_of(name: str) -> tuple[int, str] | None:
    """The number of the decoder layer in a tensor's name, and the rest of the name."""
    match = _LAYER.fullmatch(name)
    return (int(match["index"]), match["leaf"]) if match and len(match["index"]) < 6 else None


class _Parts:
    """The decoder's tensors, sorted by layer."""

    def __init__(self, checkpoint: Checkpoint, rules: Rules, table: MemoryRules, text: Mapping[str, Any]) -> None:
        self.where, self.table, self.text = checkpoint.path, table, text
        self.tensors: dict[int, dict[str, TensorSpec]] = {}
        self.tables: dict[str, TensorSpec] = {}
        for tensor in checkpoint.tensors.values():
            if component(rules, tensor) in OUTSIDE:
                continue
            place = layer_of(tensor.name)
            if place is None:
                self.tables[tensor.name.removesuffix(".weight").rpartition(".")[2]] = tensor
            else:
                self.tensors.setdefault(place[0], {})[place[1]] = tensor
        if not self.tensors:
            raise NoConfigError(f"{self.where}: no decoder layers among its tensors (layers.N.*), so nothing to serve")
        embeddings = next((t for name in table.tables if (t := self.tables.get(name))), None)
        if embeddings is None or len(embeddings.shape) != 2:
            raise NoConfigError(f"{self.where}: no token embeddings among its tensors ({table.tables[0]})")
        self.vocabulary, self.hidden = embeddings.shape
        self.heads = self.number("num_attention_heads", 0) or self._heads_by_shape()
        self.intermediate = max(self._rows(table.mlp), self._rows(table.mlp_fused) // 2, 1)

    def number(self, key: str, default: int | None = None) -> int:
        """A number from the config; `default` where the config has none."""
        value = self.text.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 0 < value < LARGEST:
            raise NoConfigError(f"{self.where}: config.json says {key}: {value!r:.80}; a positive number is needed")
        return value

    def layer(self, index: int) -> Layer:
        """The cache of layer `index`."""
        tensors = self.tensors[index]
        if any(leaf.startswith(f"{self.table.linear_attention.module}.") for leaf in tensors):
            return self._linear(index)
        sliding = self._is_sliding(index)
        shared = index >= max(self.tensors) + 1 - self._optional(self.table.shared_layers)
        width = self._width(tensors, self.table.attention.key)
        head_dim = self._head_dim(tensors)
        fused = self.number("num_key_value_heads", self.heads)  # where one projection makes queries, keys and values
        heads = fused if width is None else max(1, width // head_dim)
        window = self.number("sliding_window") if sliding else 0
        return Layer("sliding" if sliding else "full", 0 if shared else heads, head_dim, window, shared)

    def _linear(self, index: int) -> Layer:
        """The state of a gated delta net, as in vLLM's `mamba_utils.py`.

        Convolution: `[conv_dim, kernel - 1]`; recurrence: `[value heads, value dim, key dim]`.
        """
        tensors, names = self.tensors[index], self.table.linear_attention
        conv, decay, z = (tensors.get(f"{names.module}.{leaf}") for leaf in (names.conv, names.decay, names.gate))
        if conv is None or decay is None or z is None or len(conv.shape) != 3 or not decay.shape or not z.shape:
            raise NoConfigError(f"{self.where}: layer {index} is linear attention of a kind this version cannot size")
        key_dim = self.number(names.key_dim, 128)
        return Layer(
            "linear",
            conv_state=conv.shape[0] * (conv.shape[2] - 1),
            ssm_state=z.shape[0] * key_dim,
            ssm_bytes=2 if str(self.text.get("mamba_ssm_dtype")) in {"bfloat16", "float16"} else 4,
        )

    def _head_dim(self, tensors: Mapping[str, TensorSpec]) -> int:
        """The width of the norm of queries or keys where a layer has one; else the config's number."""
        for path in self.table.head_norms:
            norm = tensors.get(f"{path}.weight")
            if norm is not None and len(norm.shape) == 1 and 0 < norm.shape[0] < 4096:
                return norm.shape[0]
        return self.number("head_dim", max(1, self.hidden // self.heads))

    def _heads_by_shape(self) -> int:
        tensors = self.tensors[min(self.tensors)]
        norm = next((found for path in self.table.head_norms if (found := tensors.get(f"{path}.weight"))), None)
        width = self._width(tensors, self.table.attention.query)
        if norm is None or not norm.shape or not norm.shape[0] or width is None:
            return self.number("num_attention_heads")  # raises: the config has none either
        return max(1, width // norm.shape[0])

    @staticmethod
    def _width(tensors: Mapping[str, TensorSpec], projection: str) -> int | None:
        tensor = next((t for leaf, t in tensors.items() if leaf.endswith(f".{projection}.weight")), None)
        return tensor.shape[0] if tensor is not None and tensor.shape else None

    def _rows(self, paths: Iterable[str]) -> int:
        """The largest number of rows of these projections in any layer."""
        names = {f"{path}.weight" for path in paths}
        return max(
            (t.shape[0] for ts in self.tensors.values() for n, t in ts.items() if n in names and t.shape), default=0
        )

    def _optional(self, key: str) -> int:
        value = self.text.get(key)
        return value if type(value) is int and 0 <= value <= len(self.tensors) else 0

    def _is_sliding(self, index: int) -> bool:
        """Whether layer `index` has a window; without `layer_types`, as transformers fills it in."""
        kinds = self.text.get("layer_types")
        if isinstance(kinds, list):
            kind = kinds[index] if index < len(kinds) else None
            if not isinstance(kind, str):
                raise NoConfigError(f"{self.where}: config.json does not say in layer_types what layer {index} is")
            return kind == "sliding_attention"
        if keys := [key for key in self.table.full_every if self.text.get(key) is not None]:
            return (index + 1) % self.number(keys[0]) != 0
        return self.text.get("sliding_window") is not None and self.text.get("use_sliding_window") is not False
