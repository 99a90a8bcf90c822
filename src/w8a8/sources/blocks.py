"""Cuts files and tensors into blocks: the bytes of whole rows of a logical tensor.

A file is read once, front to back, because its SHA-256 is computed on the way. Where a tensor's rows do not lie one
after the other (the columns of a stored matrix, every second row), its bytes go by for the digest first, and then its
rows are cut out of them: in memory where the matrix is small, else by reading again what is still in the page cache.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from w8a8.checkpoint import TensorSpec
from w8a8.checkpoint import stream as streaming
from w8a8.checkpoint.stream import Block, byte_blocks
from w8a8.sources.view import LogicalTensor, Stretch, ViewShard

HELD_BYTES = 8 << 20
"""The largest stored matrix that is kept while its rows are cut out of it: one expert's of most mixtures."""


@dataclass(frozen=True, slots=True)
class RowBlock(Block):
    """The bytes of rows `begin` to `end` of a matrix, or (`matrix` None) such as belong to the file's digest alone.

    `tensor` is the logical tensor, whose elements from `at` on they are; `matrix` is one of its matrices where it is a
    stack, else itself. A vector counts as one row an element, or as one row where it has to be decoded.
    """

    tensor: LogicalTensor | None = None
    matrix: LogicalTensor | None = None
    begin: int = 0
    end: int = 0
    at: int = 0

    @property
    def numel(self) -> int:
        """Elements of its rows."""
        return (self.end - self.begin) * grid(self.matrix)[1] if self.matrix else 0


def grid(tensor: LogicalTensor) -> tuple[int, int]:
    """The rows and columns of a matrix, or of what counts as one."""
    if len(tensor.shape) == 2:
        return tensor.shape[0], tensor.shape[1]
    return (tensor.numel, 1) if tensor.plain else (1, tensor.numel)


def stretch(tensor: LogicalTensor, begin: int, end: int) -> Stretch:
    """The bytes of a matrix's rows `begin` to `end`, counted from the start of `tensor.stored`."""
    first, last = tensor.first + begin * tensor.every, tensor.first + (end - 1) * tensor.every + 1
    if not tensor.plain:
        return tensor.decoder.stretch(tensor, first, last)
    width = tensor.nbytes // max(grid(tensor)[0], 1)
    return Stretch(first * width, (last - first) * width)


def tensor_blocks(tensor: LogicalTensor, *, hashed: bool = False) -> Iterator[RowBlock]:
    """Cut a tensor into blocks of whole rows, of at most `BLOCK_BYTES` as numbers unless a single row has more."""
    if tensor.numel == 0:
        return
    stack = len(tensor.shape) == 3 <= len(tensor.stored.shape) and not tensor.plain
    for index in range(tensor.shape[0] if stack else 1):
        matrix = tensor.matrix(index) if stack else tensor
        rows, columns = grid(matrix)
        step = matrix.decoder.step
        count = max(1, streaming.BLOCK_BYTES * rows // max(matrix.nbytes, 1) // step) * step
        end, border = 0, matrix.decoder.border
        while end < rows:
            begin, end = end, min(end + count, rows)
            end = border if begin < border < end else end
            place = stretch(matrix, begin, end)
            at = (index * rows + begin) * columns
            offset = matrix.stored.offset + place.offset
            runs, stride = place.runs, place.stride
            yield RowBlock(
                offset, place.nbytes, runs, stride, hashed, tensor=tensor, matrix=matrix, begin=begin, end=end, at=at
            )


def shard_blocks(shard: ViewShard) -> Iterator[RowBlock]:
    """Cut a whole file, or a part of one, into blocks: its tensors, and what lies before, between and behind them."""
    stored, position = shard.stored.tensors, shard.begin
    own: dict[str, list[LogicalTensor]] = {spec.name: [] for spec in stored}
    for tensor in shard.tensors:
        own[tensor.stored.name].append(tensor)
    for spec in stored:
        yield from _passing(position, spec.offset)
        position = spec.offset + spec.nbytes
        blocks = [block for tensor in own[spec.name] for block in tensor_blocks(tensor, hashed=True)]
        if _tile(blocks, spec):
            yield from blocks
        else:
            yield from _reread(spec, [replace(block, hashed=False) for block in blocks])
    yield from _passing(position, shard.begin + shard.size)


def _tile(blocks: Sequence[RowBlock], spec: TensorSpec) -> bool:
    """Whether the blocks are all bytes of the stored tensor, in order."""
    position = spec.offset
    for block in blocks:
        if block.runs != 1 or block.offset != position:
            return False
        position += block.nbytes
    return position == spec.offset + spec.nbytes


def _reread(spec: TensorSpec, blocks: Sequence[RowBlock]) -> Iterator[RowBlock]:
    """The bytes of a stored tensor for the digest, and `blocks` cut out of them: small matrices one by one."""
    matrices: dict[TensorSpec, list[RowBlock]] = {}
    for block in blocks:
        assert block.matrix is not None
        matrices.setdefault(block.matrix.stored, []).append(block)
    spans = [RowBlock(stored.offset, stored.nbytes, held=True) for stored in matrices]
    if _tile(spans, spec) and all(span.nbytes <= HELD_BYTES for span in spans):
        for span, own in zip(spans, matrices.values(), strict=True):
            yield span
            yield from own
    else:
        yield from _passing(spec.offset, spec.offset + spec.nbytes)
        yield from blocks


def _passing(begin: int, end: int) -> Iterator[RowBlock]:
    return (RowBlock(offset, nbytes, passing=True) for offset, nbytes in byte_blocks(begin, end))
