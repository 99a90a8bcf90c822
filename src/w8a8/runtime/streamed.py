"""A checkpoint as a model in which one decoder layer at a time has weights.

The model is transformers' own, built without weights. The modules around the layers are loaded for good, with two
exceptions: embeddings, whose rows are read as tokens need them, and the head, which is loaded on request. A layer's
`forward` is replaced by one that notes its arguments (masks, rotary tables) and returns the states unchanged. So one
reading of a sample by the hollow model gives all the arguments that the real layers need, to run one after another
(`calls.py`).

For calibration, the experts of a layer lie apart (`experts.py`): a linear layer per expert and projection. Where they
do not fit into memory, each is read whenever it runs (`unread.py`).
"""

import inspect
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from torch import Tensor, nn
from transformers.quantizers.base import _assign_is_quantized

from w8a8.errors import UnsupportedModelError, first_line
from w8a8.formats import detect
from w8a8.runtime.calls import Call, Passed, States, arguments_of, filled, left_by, noted, own
from w8a8.runtime.fitting import EXPERT, fit_to, settle
from w8a8.runtime.linear import frozen
from w8a8.runtime.loading import engine_errors, load_config, model_class, quiet
from w8a8.runtime.unread import Unread, unread
from w8a8.sources.rows import RowReader
from w8a8.sources.view import LogicalTensor, View

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "I8": torch.int8}
"""The dtypes that the tensors of a streamed model may have."""

SMALL = 1e-3
"""An output of a head that soft caps leave as it is."""

MOST_BEHIND = 2
"""The most values that layers may return behind their states."""

LAYERS = ("layers", "h", "blocks")
"""What decoders call the list of their layers."""


def body_of(model: Any) -> Any:
    """The part of a model whose last states its head reads; the model itself where it has no such part."""
    return model.base_model if model.base_model is not model else _decoder(model)


def _decoder(model: Any) -> Any:
    decoder = model.get_decoder()
    return getattr(decoder, "model", decoder)  # some say that it is the model with the head


class StreamedModel:
    """A causal language model of `count` layers, hollow: `layer(i)` fills one with its weights.

    `model` is the transformers model, `device` where layers are put and run.
    """

    def __init__(self, name: str, seen: View, dtype: torch.dtype | None = None, room: int | None = None) -> None:
        """Build it in `dtype`, by default that of the checkpoint, which is `seen` as by `sources.opening.as_run`.

        With `room`, experts that are `seen` one by one lie apart, and are unread where those of a layer need more
        bytes.

        Raises EngineError or UnsupportedModelError.
        """
        # 1) The model without weights, which must be a stack of layers that can be run one at a time.
        self.name, self.folder, self._stored = name, seen.home, seen.path
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model, tensors = _hollow(name, seen.home, dtype), list(seen.tensors.values())
        if detect(seen.checkpoint.config).w8a8:
            _assign_is_quantized(self.model)  # some layers then leave their weights alone
        experts = None
        if room is not None:
            experts = nn.Linear if _experts_bytes(tensors, self.model.dtype) <= room else unread
        self._fitted, self._rows = fit_to(self.model, tensors, experts), RowReader(self._stored)
        self._named = {self._fitted.places[t.name]: t for t in tensors if t.name not in self._fitted.changed}
        self._unread = {f"{place}.weight": each for place, each in self.model.named_modules() if type(each) is Unread}
        for place, module in self._unread.items():
            shape = module.out_features, module.in_features
            module.source, module.device = _Lazy(self._stored, self._fitting(place, shape)), self.device
        decoder = _decoder(self.model)
        layers = next(
            (found for name in LAYERS if isinstance(found := getattr(decoder, name, None), nn.ModuleList)), None
        )
        if layers is None or self.model.get_output_embeddings() is None:
            raise UnsupportedModelError(
                f"{name}: {type(self.model).__name__} is no stack of decoder layers with a head"
            )
        self._layers: Any = layers
        self._body = body_of(self.model)

        # 2) Layers that note their arguments, and the weights around them.
        places = {id(module): place for place, module in self.model.named_modules()}
        self._prefix = places[id(self._layers)]
        self._parts: dict[int, list[LogicalTensor]] = {number: [] for number in range(self.count)}
        for tensor in tensors:
            below, _, _ = self._fitted.places[tensor.name].removeprefix(f"{self._prefix}.").partition(".")
            self._parts.get(int(below) if below.isdecimal() else -1, []).append(tensor)
        self._calls: list[tuple[Tensor, dict[str, Any]]] = []
        self._behind: int | None = None  # how many values layers return behind their states; None: no tuple
        for layer in self._layers:
            self._hollow_out(layer)
        self._fill_surroundings(decoder, places[id(decoder)])

    @property
    def count(self) -> int:
        """The number of decoder layers."""
        return len(self._layers)

    def tensor(self, layer: int, name: str) -> LogicalTensor:
        """Find the checkpoint's tensor that is `name` inside the `layer`th decoder layer."""
        return self._named[f"{self._prefix}.{layer}.{name}"]

    def sources(self, layer: int, name: str) -> Sequence[LogicalTensor]:
        """Find the checkpoint's tensors that `name` inside a layer is made of: one, or several that are joined.

        None are found where one tensor of the checkpoint is cut into several, but for the first of these.
        """
        place = f"{self._prefix}.{layer}.{name}"
        return [tensor for tensor in self._parts[layer] if self._fitted.places[tensor.name] == place]

    def is_stored(self, layer: int, name: str) -> bool:
        """Whether the checkpoint has `name` of a layer as it is, so that it can be given another."""
        return f"{self._prefix}.{layer}.{name}" in self._named

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def embed(self, ids: Sequence[int]) -> tuple[Tensor, list[dict[str, Any]]]:
        """Return the states [1, tokens, hidden] that enter the first layer, and each layer's other arguments."""
        problem = self._note_calls(ids)
        if problem and self._behind is None:  # some models take the states out of a tuple
            for self._behind in range(MOST_BEHIND + 1):
                if self._note_calls(ids) is None:
                    problem = None
                    break
        if problem:
            kind = type(self.model).__name__
            raise UnsupportedModelError(f"{self.name}: {kind} cannot be run without its layers: {problem}")
        return self._calls[0][0], noted(kwargs for _, kwargs in self._calls)

    def _note_calls(self, ids: Sequence[int]) -> str | None:
        """Run the hollow model on `ids`, and say what is wrong, if anything."""
        self._calls.clear()
        try:
            self._body(input_ids=torch.tensor([ids], device=self.device), use_cache=False)
        except (RuntimeError, NotImplementedError, ValueError, IndexError) as error:
            return first_line(error)
        if len(self._calls) != self.count:
            return f"{len(self._calls)} of its {self.count} layers were run"
        shapes = {tuple(states.shape) for states, _ in self._calls}
        return None if len(shapes) == 1 else f"its layers read states of {len(shapes)} shapes"

    def own(self, kwargs: Sequence[Mapping[str, Any]], common: Sequence[Mapping[str, Any]]) -> list[dict[str, Tensor]]:
        """Return what of a sample's arguments of each layer is not in `common` to all samples of its length.

        Raises UnsupportedModelError where that is no tensor.
        """
        try:
            return [own(each, of_all) for each, of_all in zip(kwargs, common, strict=True)]
        except TypeError as error:
            raise UnsupportedModelError(f"{self.name}: {error}, so they cannot be run one at a time") from error

    def hollow(self, number: int) -> nn.Module:
        """Return the `number`th layer without weights."""
        found: nn.Module = self._layers[number]
        return found

    @contextmanager
    def layer(self, number: int) -> Iterator[nn.Module]:
        """Give the `number`th layer its weights, in evaluation mode, until the context ends."""
        layer, prefix = self._layers[number], f"{self._prefix}.{number}."
        hollow = [
            (module, name, value)
            for module in layer.modules()
            for name, value in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        ]
        try:
            wanted = (t for t in self._parts[number] if self._fitted.places[t.name] not in self._unread)
            tensors = {tensor.name: _Lazy(self._stored, tensor) for tensor in wanted}
            wrong = self._fitted.load(self.model, tensors, self.device)
            for name in filter(wrong.__contains__, (prefix + name for name in layer.state_dict())):
                raise UnsupportedModelError(f"{self.name}: the layer's {name} {wrong[name]}")
            settle(layer)
            del layer.forward
            yield layer
        finally:
            for module, name, value in hollow:
                setattr(module, name, value)
            self._hollow_out(layer)

    def fill_head(self) -> None:
        """Load the head, which turns the last layer's states into logits."""
        head = self.model.get_output_embeddings()
        for name, value in head.state_dict().items():
            setattr(head, name, frozen(self._read(self._head_tensor(name), value)))

    def head_rows(self, rows: int) -> Iterator[Tensor]:
        """Yield the head's weight [vocabulary, hidden] in the model's dtype, `rows` rows at a time."""
        dtype, tensor = self.model.get_output_embeddings().weight.dtype, self._named[self._head_tensor("weight")]
        for start in range(0, tensor.shape[0], rows):
            end = min(start + rows, tensor.shape[0])
            data = bytearray(self._rows.part(tensor, start, end))
            yield self._tensor(data, tensor, [end - start, *tensor.shape[1:]], dtype)

    def _head_tensor(self, name: str) -> str:
        """Return the full name of the head's `name`; a head without a weight of its own has the embedding's."""
        head = self.model.get_output_embeddings()
        place = next(place for place, module in self.model.named_modules() if module is head)
        tied = name == "weight" and f"{place}.weight" not in self._named
        return self._embedding if tied else f"{place}.{name}"

    def last_states(self, states: Tensor) -> None:
        """Make `states` [1, tokens, hidden] the output of the hollow model's last layer in its next reading."""
        self._calls.clear()
        self._layers[-1].forward = lambda *_, **__: self._returned(states)

    def read_by_head(self, ids: Sequence[int], states: Tensor) -> Tensor:
        """Return what the head reads [1, tokens, hidden] when `states` leave the last layer; it has their gradient."""
        found = arguments_of(self.model.get_output_embeddings(), lambda: self._end(ids, states))
        if found is None:
            raise UnsupportedModelError(f"{self.name}: {type(self.model).__name__} does not run its head as a layer")
        read: Tensor = found[0]
        return read

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def logit_scale(self, ids: Sequence[int]) -> float:
        """Return what the model multiplies its head's outputs by; soft caps change small ones by nothing else."""
        ids, head = ids[:1], self.model.get_output_embeddings()  # all its outputs are alike
        rows = self._named[self._head_tensor("weight")].shape[0]
        outputs = torch.full((1, len(ids), rows), SMALL, device=self.device)
        head.forward = lambda *_: outputs
        try:
            found = self._end(ids, self.embed(ids)[0]).logits.float().median() / SMALL
        finally:
            del head.forward
        return float(found)

    def _end(self, ids: Sequence[int], states: Tensor) -> Any:
        """Run the hollow model on `ids`, `states` leaving its last layer."""
        self.last_states(states)
        try:
            return self.model(input_ids=torch.tensor([ids], device=self.device), use_cache=False)
        finally:
            self._hollow_out(self._layers[-1])

    def _hollow_out(self, layer: nn.Module) -> None:
        signature = inspect.signature(type(layer).forward)

        def note(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(layer, hidden_states, *args, **kwargs).arguments
            extra = bound.pop("kwargs", {})
            self._calls.append((hidden_states, {**dict(list(bound.items())[2:]), **extra}))
            return self._returned(hidden_states)

        layer.forward = note

    def _returned(self, states: Tensor) -> Any:
        """What a hollow layer returns."""
        return states if self._behind is None else (states, *(Passed(place + 1) for place in range(self._behind)))

    def _fill_surroundings(self, decoder: nn.Module, place: str) -> None:
        """Give the decoder all weights outside the layers, but read embeddings' rows as they are needed."""
        embedding = self.model.get_input_embeddings()
        self._embedding = next(name for name, p in self.model.named_parameters() if p is embedding.weight)
        spec = self._named.get(self._embedding)
        if not isinstance(embedding, nn.Embedding) or spec is None:
            raise UnsupportedModelError(f"{self.name}: {self._embedding} is no embedding of the checkpoint")
        embedding.forward = _by_rows(embedding, self, spec)
        for module in decoder.modules():
            for name, value in module.named_buffers(recurse=False):
                setattr(module, name, value.to(self.device))
        prefix = f"{place}." if place else ""
        for name, value in list(decoder.named_parameters()):
            if value is embedding.weight or (prefix + name).startswith(f"{self._prefix}."):
                continue
            path, _, leaf = name.rpartition(".")
            owner, found = decoder.get_submodule(path), self._named.get(prefix + name)
            if type(owner) is type(embedding) and found is not None and value.numel() >= embedding.weight.numel():
                owner.forward = _by_rows(owner, self, found)
            else:
                setattr(owner, leaf, frozen(self._read(prefix + name, value)))

    def rows(self, tensor: LogicalTensor, rows: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Read the given rows of a matrix of the checkpoint, as `dtype`."""
        data = bytearray().join(self._rows.part(tensor, row, row + 1) for row in rows)
        return self._tensor(data, tensor, [len(rows), *tensor.shape[1:]], dtype)

    def _tensor(self, data: bytearray, tensor: LogicalTensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.frombuffer(data, dtype=DTYPES[tensor.dtype]).reshape(shape).to(self.device, dtype)

    def _read(self, name: str, like: Tensor) -> Tensor:
        """Read the tensor called `name` in the model, in the dtype and shape of `like`."""
        tensor = self._fitting(name, like.shape)
        return self._tensor(self._rows.read(tensor), tensor, like.shape, like.dtype)

    def _fitting(self, name: str, shape: Sequence[int]) -> LogicalTensor:
        """Find the tensor called `name` in the model, which holds as many elements as a `shape`."""
        tensor = self._named.get(name)
        if tensor is None or tensor.dtype not in DTYPES or tensor.numel != math.prod(shape):
            found = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            raise UnsupportedModelError(
                f"{self.name}: the layer's {name} is {list(shape)}, and the checkpoint has {found} in its place"
            )
        return tensor


@dataclass(frozen=True)
class _Lazy:
    """A tensor that transformers' loader reads by `tensor[...]`, in any thread."""

    folder: Path
    tensor: LogicalTensor

    def __getitem__(self, _: Any) -> Tensor:
        data = RowReader(self.folder).read(self.tensor)
        return torch.frombuffer(data, dtype=DTYPES[self.tensor.dtype]).reshape(self.tensor.shape)


def _experts_bytes(tensors: Iterable[LogicalTensor], dtype: torch.dtype) -> int:
    """The bytes that the experts of one layer take in `dtype`, of the layer that has most."""
    elements: Counter[str] = Counter()
    for tensor in tensors:
        if found := EXPERT.fullmatch(tensor.name.removesuffix(".weight")):
            elements[found["place"]] += tensor.numel
    size: int = dtype.itemsize
    return max(elements.values(), default=0) * size


def forward(layer: nn.Module, states: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """Run a decoder layer on `states` [samples, tokens, hidden]."""
    return states_of(layer(states, **kwargs))


def passed(layer: nn.Module, call: Call) -> States:
    """Run a decoder layer on a sample; return its states, and all that it leaves for later layers."""
    kwargs = filled(call.kwargs, call.states.left)
    output = layer(call.states.hidden, **kwargs)
    return States(states_of(output), left_by(output, kwargs))


def forward_block(layer: nn.Module, block: Iterable[Call]) -> list[States]:
    """Run a decoder layer on a block of samples."""
    return [passed(layer, call) for call in block]


def _hollow(name: str, folder: Path, dtype: torch.dtype | None) -> Any:
    """Build the model without weights: parameters on the meta device, buffers as computed."""
    quiet()
    transformers.logging.disable_progress_bar()  # it would draw one for each layer
    with engine_errors(f"{name}: transformers cannot build it"):
        config = load_config(name, folder)
        kind = model_class(name, config)
        with init_empty_weights(include_buffers=False):
            model = kind._from_config(config, dtype=dtype or config.dtype or torch.bfloat16)
        return model.eval().requires_grad_(requires_grad=False)


def _by_rows(embedding: nn.Embedding, model: StreamedModel, tensor: LogicalTensor) -> Any:
    """Make a `forward` for `embedding` that reads only the rows it looks up."""
    shape, dtype, embedding.padding_idx = embedding.weight.shape, embedding.weight.dtype, None
    # Without memory, but on the device: some models ask their embedding where to send what it shall look up.
    hollow = embedding.weight = frozen(torch.empty((), dtype=dtype, device=model.device).expand(shape))

    def look_up(ids: Tensor) -> Tensor:
        rows, places = ids.unique(return_inverse=True)
        embedding.weight = frozen(model.rows(tensor, rows.tolist(), dtype))
        try:
            found: Tensor = type(embedding).forward(embedding, places)
            return found
        finally:
            embedding.weight = hollow

    return look_up


def states_of(output: Any) -> Tensor:
    """Return the states in a decoder layer's output, which some layers put into a tuple."""
    return output[0] if isinstance(output, tuple | list) else output
