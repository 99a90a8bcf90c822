"""One source shard in, one output shard out, in one pass.

The plan has already placed every byte, so a run is a loop over blocks: rows of a layer become scales and codes,
everything else goes through unchanged. Scales (0.1% of a shard) are held until its end, where the plan puts them
together with the few tensors that would have broken the alignment of others.

A `ShardJob` is a value: it can be pickled, and any thread or machine that sees the files carries it out alike. What it
exchanges with the run it belongs to are messages: bytes done, and whether to stop.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from w8a8.checkpoint import DTYPE_BYTES, TensorSpec
from w8a8.checkpoint.reader import stored_tensors
from w8a8.checkpoint.stream import Feed, Identity, Stopped, read_exactly, stream
from w8a8.errors import NonFiniteWeightError, SourceChangedError
from w8a8.formats import Arithmetic
from w8a8.formats.arithmetic import encode
from w8a8.kernels.cpu.bits import Bits
from w8a8.kernels.cpu.rows import row_amax, row_codes
from w8a8.plan import ShardPlan, Write
from w8a8.reading import open_file, reading
from w8a8.sources.blocks import RowBlock, shard_blocks, tensor_blocks
from w8a8.sources.rows import RowReader, rows
from w8a8.sources.view import LogicalTensor, ViewShard
from w8a8.storage.writer import SequentialWriter

Scales = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """A finished output shard, and the SHA-256 of the source file it was made from.

    "" where that is not known: it was not asked for, or the source was a part of a file. `receipt` is what a `Delivery`
    gave for it; "" where it was not sent.
    """

    name: str
    size: int
    sha256: str
    source_sha256: str
    receipt: str = ""


@dataclass(frozen=True, slots=True)
class Finished:
    """A tensor of the result that calibration has made already: the safetensors file it lies in, and where."""

    path: Path
    spec: TensorSpec

    def read(self, begin: int, into: memoryview) -> None:
        """Fill `into` with the tensor's bytes from `begin` on. Raises `UnreadableError` or `SourceChangedError`."""
        with reading(self.path), open_file(self.path) as file:
            read_exactly(file.fileno(), into, self.spec.offset + begin, self.path)


@dataclass(frozen=True, slots=True)
class ShardJob:
    """All that makes one output shard.

    `source` and `target` are files, `header` is the target's safetensors header; tensors of the result in `finished`,
    by name, are taken from there. `sha256` is that of the source file, where it is known; `hashed` asks for it.
    """

    source: Path
    shard: ViewShard
    plan: ShardPlan
    header: bytes
    target: Path
    arithmetic: Arithmetic
    finished: Mapping[str, Finished] = field(default_factory=dict)
    sha256: str = ""
    hashed: bool = False


def quantize_shard(
    job: ShardJob,
    *,
    advance: Callable[[int], None] = lambda _: None,
    stopped: Callable[[], bool] = lambda: False,
    feed: Feed | None = None,
) -> ShardRecord:
    """Carry out `job`: tell `advance` of source bytes as they are done, and end early once `stopped()` holds.

    Where `feed` gives the source's bytes as they arrive, the file at `job.source` has its header alone, and the record
    is to be believed once the feed is whole. Raises `NonFiniteWeightError`, `SourceChangedError`, `UnreadableError`,
    `DiskFullError`, `UnwritableError`, `Stopped`, and what the feed raises.
    """
    # 1) the source has to be what the plan was made from
    before = Identity.of(job.source)
    found = stored_tensors(job.source, job.shard.stored.name)
    if before.size != job.shard.stored.size or not set(job.shard.stored.tensors) <= set(found):
        raise SourceChangedError(f"{job.source}: changed since its header was read; run the same command again")
    run = _ShardRun(job, stopped, feed or Feed(job.source))
    with SequentialWriter(job.target, run.largest) as writer:
        # 2) header, then everything that keeps the source's order, then the tail
        writer.append(job.header)
        run.stream_through(writer, advance)
        for write in job.plan.tail:
            run.write_late(writer, write, advance)
        writer.finish()
        # 3) nobody may have written to the source meanwhile
        if Identity.of(job.source) != before:
            raise SourceChangedError(f"{job.source}: changed while it was being read; run the same command again")
        source = run.digest.hexdigest() if run.digest else job.sha256 if job.shard.whole else ""
        return ShardRecord(job.plan.name, writer.size, writer.sha256, source)


class _ShardRun:
    """One pass under way: the blocks of the source, and the scales found so far."""

    def __init__(self, job: ShardJob, stopped: Callable[[], bool], feed: Feed) -> None:
        self.job, self.stopped, self.feed = job, stopped, feed
        self.blocks = list(shard_blocks(job.shard))
        self.reader = RowReader(job.source.parent, {job.shard.stored.name: feed})
        self.digest = hashlib.sha256() if job.hashed and job.shard.whole else None
        self.tensors = {tensor.name: tensor for tensor in job.shard.tensors}
        self.joined = {joined.name: joined for joined in job.shard.joined}
        self.scales = {
            write.source: np.empty(math.prod(write.shape), np.float32)
            for write in job.plan.writes
            if write.kind == "scale" and write.name not in job.finished
        }

    @property
    def largest(self) -> int:
        """The most bytes that a block becomes."""
        return max((block.numel * DTYPE_BYTES[block.tensor.dtype] for block in self.blocks if block.tensor), default=1)

    def stream_through(self, writer: SequentialWriter, advance: Callable[[int], None]) -> None:
        """Pass over the whole source: find the scales, and write what keeps the source's order."""
        streamed = {write.source: write for write in self.job.plan.writes[: self.job.plan.streamed]}
        late = sum(self._bytes_here(expert) for joined in self.job.shard.joined for expert in joined.experts)
        with closing(stream(self.feed, self.blocks, self.stopped, self.digest)) as blocks:
            for block, data in blocks:
                if block.tensor is not None:
                    name, content = block.tensor.name, self.reader.content(block, data)
                    if name in self.scales:
                        self.scales[name][block.begin : block.end] = self._scales_of(rows(block.tensor, content), block)
                    if name in streamed:
                        self._put(writer, streamed[name], block, content)
                if block.hashed:
                    passed = min(late, block.nbytes) if block.passing else 0  # done when it is read again
                    late -= passed
                    advance(block.nbytes - passed)

    def write_late(self, writer: SequentialWriter, write: Write, advance: Callable[[int], None]) -> None:
        """Write one tensor of the tail: a scale from memory, anything else from a second look at the source.

        Joined experts are in memory one at a time.
        """
        if write.name in self.job.finished:
            data = memoryview(bytearray(write.nbytes))
            self.job.finished[write.name].read(0, data)
            writer.append(data)
        elif write.kind == "scale":
            writer.append(encode(self.scales[write.source], write.dtype))
        elif write.kind == "joined":
            joined = self.joined[write.source]
            for number in range(len(joined.experts)):
                if self.stopped():
                    raise Stopped
                writer.append(self.reader.expert(joined, number))
                advance(self._bytes_here(joined.experts[number]))
        else:
            with closing(stream(self.feed, tensor_blocks(self.tensors[write.source]), self.stopped)) as blocks:
                for block, data in blocks:
                    self._put(writer, write, block, self.reader.content(block, data))

    def _bytes_here(self, parts: Sequence[LogicalTensor]) -> int:
        """The bytes of parts of an expert that are stored in this file."""
        return sum(part.stored.nbytes for part in parts if part.shard == self.job.shard.stored.name)

    def _put(self, writer: SequentialWriter, write: Write, block: RowBlock, content: memoryview) -> None:
        """Write what a block of the source becomes: a part of a finished tensor, codes, or its numbers."""
        assert block.tensor is not None
        if write.name in self.job.finished:
            begin, end = (at * write.nbytes // block.tensor.numel for at in (block.at, block.at + block.numel))
            self.job.finished[write.name].read(begin, writer.reserve(end - begin))
        elif write.kind == "codes":
            bits = rows(block.tensor, content)
            codes = np.frombuffer(writer.reserve(bits.size), np.int8).reshape(bits.shape)
            scales = self.scales[write.source][block.begin : block.end]
            row_codes(bits, scales, codes, self.job.arithmetic.quotient, self.job.arithmetic.low)
        else:
            writer.append(content)

    def _scales_of(self, bits: Bits, block: RowBlock) -> Scales:
        assert block.tensor is not None
        amax = row_amax(bits)
        if not np.isfinite(amax).all():
            row = int(np.argmin(np.isfinite(amax)))
            kind = "NaN" if np.isnan(amax[row]) else "infinity"
            name = block.tensor.name
            raise NonFiniteWeightError(
                f"{block.tensor.shard}: {name} has {kind} in row {block.begin + row}, so it has no scale; "
                f"repair the source, or leave the layer in {block.tensor.dtype} with --exclude '{name}'"
            )
        return self.job.arithmetic.scales(amax, block.tensor.dtype)
