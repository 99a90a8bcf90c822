"""Tensors that hold all experts of a layer, seen as one matrix per expert and projection.

Engines load `experts.3.gate_proj.weight` [I, H] where transformers stores `experts.gate_up_proj` [E, 2I, H], or its
transpose [E, H, 2I]. Which tensors those are is data of the architecture (`plan/architectures.toml`, `stacks`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from w8a8.checkpoint import DTYPE_BYTES
from w8a8.errors import TensorSizeError
from w8a8.kernels.cpu.bits import BITS, Bits
from w8a8.sources.view import Decoder, LogicalTensor, Plain, Stretch

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
    parts = [part if part.endswith((".weight", ".bias")) else f"{part}.weight" for part in stack.parts]
    count = len(parts)
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
        for number, part in enumerate(parts):
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
