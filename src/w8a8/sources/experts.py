"""Tensors that hold all experts of a layer, seen as one matrix per expert and projection.

Engines load `experts.3.gate_proj.weight` [I, H] where transformers stores `experts.gate_up_proj` [E, 2I, H], or its
transpose [E, H, 2I]. Which tensors those are is data of the architecture (`plan/architectures.toml`, `stacks`).
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from w8a8.checkpoint import DTYPE_BYTES
from w8a8.errors import SourceError, TensorSizeError
from w8a8.kernels.cpu.bits import BITS, Bits
from w8a8.sources.view import Decoder, Joined, LogicalTensor, Plain, Stretch, View

MAX_EXPERTS = 4096
"""Experts of a layer; the largest models published have 512."""


@dataclass(frozen=True, slots=True)
class Stack:
    """How an architecture stores a layer's experts.

    `tensor` is the end of the stored tensor's name, `parts` are the modules or tensors that it becomes, in the order of
    its rows, `{}` being the expert's number; where a part does not end in `.weight` or `.bias`, `.weight` is meant.
    `transposed`: it holds [E, in, out]. `interleaved`: row i belongs to part i modulo their number. `columns`: the key
    of config.json that gives the number of inputs; a tensor with another number is not stored like this.
    """

    tensor: str
    parts: tuple[str, ...]
    transposed: bool = False
    interleaved: bool = False
    columns: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The ends of the names of the tensors that it becomes."""
        return tuple(part if part.endswith((".weight", ".bias")) else f"{part}.weight" for part in self.parts)


@dataclass(frozen=True, slots=True)
class Transposed(Decoder):
    """The columns of a BF16, F16 or F32 matrix [columns, rows] as rows."""

    def transposed(self) -> Decoder:
        """The matrix as it is stored."""
        return Plain()

    def stretch(self, tensor: LogicalTensor, begin: int, end: int) -> Stretch:
        """A run of `end - begin` elements from each of the stored rows."""
        runs, width = tensor.stored.shape
        size = DTYPE_BYTES[tensor.dtype]
        return Stretch(begin * size, (end - begin) * size, runs, width * size)

    def prepare(self, _tensor: LogicalTensor, _beside: Any) -> None:
        """Nothing is needed."""

    def decode(self, tensor: LogicalTensor, _begin: int, data: memoryview, _prepared: Any, out: Bits) -> None:
        """Transpose the columns that `data` holds."""
        from w8a8.kernels.cpu.decoding import turned  # Numba: not for planning

        turned(np.frombuffer(data, BITS[tensor.dtype]).reshape(-1, len(out)), out)


def split(
    tensors: Iterable[LogicalTensor], stacks: Sequence[Stack], sizes: Mapping[str, Any] = MappingProxyType({})
) -> Iterator[tuple[LogicalTensor, tuple[LogicalTensor, ...]]]:
    """Yield each tensor with the expert tensors that it is seen as; none where it is no stack.

    `sizes` are the entries of config.json that describe the decoder.

    Raises `TensorSizeError` where a stack has no shape that can be shared out among its parts, or too many experts.
    """
    for tensor in tensors:
        stack = next((each for each in stacks if _is_stack(tensor, each, sizes)), None)
        yield tensor, tuple(_experts(tensor, stack)) if stack else ()


def _is_stack(tensor: LogicalTensor, stack: Stack, sizes: Mapping[str, Any]) -> bool:
    dimensions = 2 if all(part.endswith(".bias") for part in stack.parts) else 3
    named = f".{tensor.name}".endswith(f".{stack.tensor}") and len(tensor.shape) == dimensions and tensor.numel > 0
    return named and (not stack.columns or sizes.get(stack.columns) == tensor.shape[1 if stack.transposed else -1])


def _experts(tensor: LogicalTensor, stack: Stack) -> Iterator[LogicalTensor]:
    count = len(stack.parts)
    rows = tensor.shape[-1 if stack.transposed else 1]
    if rows % count:
        raise TensorSizeError(
            f"{tensor.shard}: {tensor.name} is {list(tensor.shape)}; its {rows} rows cannot be shared out between "
            f"{' and '.join(stack.parts)}"
        )
    if tensor.shape[0] > MAX_EXPERTS:
        raise TensorSizeError(
            f"{tensor.shard}: {tensor.name} is {list(tensor.shape)}; a layer has {MAX_EXPERTS} experts at most"
        )
    prefix = tensor.name.removesuffix(stack.tensor)
    for expert in range(tensor.shape[0]):
        matrix = tensor.matrix(expert)
        if stack.transposed:
            matrix = transpose(matrix)
        own = rows // count
        for number, part in enumerate(stack.names):
            yield replace(
                matrix,
                name=prefix + part.format(expert),
                shape=(own, *matrix.shape[1:]),
                first=number if stack.interleaved else number * own,
                every=count if stack.interleaved else 1,
            )


def transpose(matrix: LogicalTensor) -> LogicalTensor:
    """The transposed matrix, made from the same stored bytes."""
    decoder = Transposed() if matrix.plain else matrix.decoder.transposed()
    return replace(matrix, shape=matrix.shape[::-1], decoder=decoder)


def stacked(tensors: Iterable[LogicalTensor], stacks: Mapping[str, LogicalTensor]) -> Iterator[LogicalTensor]:
    """The tensors, with those that have a stack in `stacks` by their names replaced by that, once."""
    seen = set()
    for tensor in tensors:
        stack = stacks.get(tensor.name)
        if stack is None:
            yield tensor
        elif stack.name not in seen:
            seen.add(stack.name)
            yield stack


def join(seen: View, stacks: Sequence[Stack]) -> View:
    """The view with the experts that it has one by one as the `stacks` that hold all of a layer.

    Raises `SourceError` where experts that would be one tensor differ, or one of them is missing.
    """
    patterns = [
        (stack, number, re.compile(r"((?:.+\.)?)" + re.escape(name).replace(r"\{\}", r"(\d{1,4})")))
        for stack in stacks
        for number, name in enumerate(stack.names)
    ]
    found: dict[str, tuple[Stack, dict[tuple[int, int], LogicalTensor]]] = {}
    home: dict[str, str] = {}
    for tensor in seen.tensors.values():
        for stack, number, pattern in patterns:
            if match := pattern.fullmatch(tensor.name):
                home[tensor.name] = match[1] + stack.tensor
                found.setdefault(home[tensor.name], (stack, {}))[1][int(match[2]), number] = tensor
                break
    made = {name: _joined(name, stack, parts) for name, (stack, parts) in found.items()}
    shards = []
    for shard in seen.shards:
        names = dict.fromkeys(home[tensor.name] for tensor in shard.tensors if tensor.name in home)
        rest = tuple(tensor for tensor in shard.tensors if tensor.name not in home)
        own = tuple(made.pop(name) for name in names if name in made)
        shards.append(replace(shard, tensors=rest, joined=own))
    return replace(seen, shards=tuple(shards))


def _joined(name: str, stack: Stack, parts: Mapping[tuple[int, int], LogicalTensor]) -> Joined:
    first = next(iter(parts.values()))
    count = max(expert for expert, _ in parts) + 1
    experts = []
    for expert in range(count):
        own = [parts.get((expert, number)) for number in range(len(stack.parts))]
        for tensor, part in zip(own, stack.names, strict=True):
            if tensor is None or (tensor.dtype, tensor.shape) != (first.dtype, first.shape):
                is_ = f"is {tensor.dtype} {list(tensor.shape)}" if tensor else "is missing"
                raise SourceError(
                    f"{(tensor or first).shard}: {name.removesuffix(stack.tensor)}{part.format(expert)} {is_}, where "
                    f"{first.name} is {first.dtype} {list(first.shape)}, so they make no {stack.tensor}; download the "
                    "checkpoint again"
                )
        experts.append(tuple(tensor for tensor in own if tensor))
    return Joined(name, tuple(experts), stack.transposed, stack.interleaved)
