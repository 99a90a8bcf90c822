"""Place every output byte, before a weight is read.

An output shard mirrors its source shard. Its tensors keep the source's order, because the quantizer makes one pass: it
reads each source byte once, writes each output byte once and hashes both on the way. Three kinds must wait for the end
of the shard: scales, which are known only after their weight has gone by; experts that become one tensor, which are
read again in its order; and the rare tensor whose byte size is no multiple of 8, which would leave everything behind it
unaligned (torch cannot view such a tensor in place). The tail is sorted by element size, largest first, so that every
tensor starts at a multiple of its element size.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from w8a8.checkpoint import DTYPE_BYTES
from w8a8.sources.view import Joined, LogicalTensor

Kind = Literal["copy", "codes", "scale", "joined"]


@dataclass(frozen=True, slots=True)
class Write:
    """One output tensor: the logical tensor that is its source, and its place from the start of the shard's data."""

    kind: Kind
    source: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int

    @property
    def end(self) -> int:
        """First byte after the tensor."""
        return self.begin + self.nbytes


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One output shard: `writes[:streamed]` follow the source's order, the rest is the tail."""

    name: str
    writes: tuple[Write, ...]
    streamed: int

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors."""
        return self.writes[-1].end if self.writes else 0

    @property
    def tail(self) -> tuple[Write, ...]:
        """The tensors written after those that stream."""
        return self.writes[self.streamed :]


@dataclass(frozen=True, slots=True)
class ScaleSpec:
    """The scale of a quantized tensor, as a format spells it."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def lay_out(
    name: str, tensors: Sequence[LogicalTensor], scales: dict[str, ScaleSpec], joined: Sequence[Joined] = ()
) -> ShardPlan:
    """Place the tensors of one shard; those named in `scales` become INT8 codes and a scale."""
    streamed: list[Write] = []
    tail = [Write("joined", t.name, t.name, t.dtype, t.shape, 0, t.spec.nbytes) for t in joined]
    for tensor in tensors:
        spec = scales.get(tensor.name)
        if spec is None:
            write = Write("copy", tensor.name, tensor.name, tensor.dtype, tensor.shape, 0, tensor.nbytes)
        else:
            write = Write("codes", tensor.name, tensor.name, "I8", tensor.shape, 0, tensor.numel)
            size = spec.shape[0] * DTYPE_BYTES[spec.dtype]
            tail.append(Write("scale", tensor.name, spec.name, spec.dtype, spec.shape, 0, size))
        (tail if write.nbytes % 8 else streamed).append(write)
    tail.sort(key=lambda write: -DTYPE_BYTES[write.dtype])
    return ShardPlan(name, tuple(_place([*streamed, *tail])), len(streamed))


def _place(writes: Iterable[Write]) -> Iterable[Write]:
    position = 0
    for write in writes:
        placed = Write(write.kind, write.source, write.name, write.dtype, write.shape, position, write.nbytes)
        position = placed.end
        yield placed
