"""One source shard in, one output shard out, in one pass.

The plan has already placed every byte, so a run is a loop over blocks: rows of a layer become scales and codes,
everything else goes through unchanged. Scales (0.1% of a shard) are held until its end, where the plan puts them
together with the few tensors that would have broken the alignment of others.

A `ShardJob` is a value: it can be pickled, and any thread or machine that sees the files carries it out alike. What it
exchanges with the run it belongs to are messages: bytes done, and whether to stop.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from w8a8.checkpoint import Shard, TensorSpec, read_header
from w8a8.checkpoint.stream import Block, Identity, read_exactly, row_bytes, shard_blocks, stream, tensor_blocks
from w8a8.errors import NonFiniteWeightError, SourceChangedError
from w8a8.formats import Arithmetic
from w8a8.formats.arithmetic import encode
from w8a8.kernels.cpu.bits import Bits
from w8a8.kernels.cpu.rows import row_amax, row_codes
from w8a8.plan import ShardPlan, Write
from w8a8.reading import open_file, reading
from w8a8.sources.rows import rows
from w8a8.storage.writer import SequentialWriter

Scales = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """A finished output shard, and the SHA-256 of the source shard it was made from."""

    name: str
    size: int
    sha256: str
    source_sha256: str


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
    by name, are taken from there.
    """

    source: Path
    shard: Shard
    plan: ShardPlan
    header: bytes
    target: Path
    arithmetic: Arithmetic
    finished: Mapping[str, Finished] = field(default_factory=dict)


def quantize_shard(
    job: ShardJob,
    *,
    advance: Callable[[int], None] = lambda _: None,
    stopped: Callable[[], bool] = lambda: False,
) -> ShardRecord:
    """Carry out `job`: tell `advance` of source bytes as they are done, and end early once `stopped()` holds.

    Raises `NonFiniteWeightError`, `SourceChangedError`, `UnreadableError`, `DiskFullError`, `UnwritableError`, or
    `Stopped`.
    """
    # 1) the source has to be what the plan was made from
    before = Identity.of(job.source)
    if before.size != job.shard.size or read_header(job.source, job.shard.name).tensors != job.shard.tensors:
        raise SourceChangedError(f"{job.source}: changed since its header was read; run the same command again")
    largest = max([1, *(min(t.nbytes, max(row_bytes(t), 1)) for t in job.shard.tensors)])
    with SequentialWriter(job.target, largest) as writer:
        run = _ShardRun(job, writer, stopped)
        # 2) header, then everything that keeps the source's order, then the tail
        writer.append(job.header)
        run.stream_through(advance)
        for write in job.plan.tail:
            run.write_late(write)
        writer.finish()
        # 3) nobody may have written to the source meanwhile
        if Identity.of(job.source) != before:
            raise SourceChangedError(f"{job.source}: changed while it was being read; run the same command again")
        return ShardRecord(job.plan.name, writer.size, writer.sha256, run.source_digest.hexdigest())


class _ShardRun:
    """One pass under way: what is being written, and the scales found so far."""

    def __init__(self, job: ShardJob, writer: SequentialWriter, stopped: Callable[[], bool]) -> None:
        self.job, self.writer, self.stopped = job, writer, stopped
        self.source_digest = hashlib.sha256()
        self.tensors = {tensor.name: tensor for tensor in job.shard.tensors}
        self.scales = {
            write.source: np.empty(math.prod(write.shape), np.float32)
            for write in job.plan.writes
            if write.kind == "scale" and write.name not in job.finished
        }

    def stream_through(self, advance: Callable[[int], None]) -> None:
        """Pass over the whole source: find the scales, and write what keeps the source's order."""
        streamed = {write.source: write for write in self.job.plan.writes[: self.job.plan.streamed]}
        blocks_of_shard = shard_blocks(self.job.shard)
        with closing(stream(self.job.source, blocks_of_shard, self.stopped, self.source_digest)) as blocks:
            for block, data in blocks:
                tensor = block.tensor
                if tensor is not None and tensor.name in self.scales:
                    bits = rows(tensor, data)
                    self.scales[tensor.name][block.row : block.row + len(bits)] = self._scales_of(bits, block)
                if tensor is not None and (write := streamed.get(tensor.name)) is not None:
                    self._put(write, block, data)
                advance(block.nbytes)

    def write_late(self, write: Write) -> None:
        """Write one tensor of the tail: a scale from memory, anything else from a second look at the source."""
        if write.name in self.job.finished:
            data = memoryview(bytearray(write.nbytes))
            self.job.finished[write.name].read(0, data)
            self.writer.append(data)
        elif write.kind == "scale":
            self.writer.append(encode(self.scales[write.source], write.dtype))
        else:
            with closing(stream(self.job.source, tensor_blocks(self.tensors[write.source]), self.stopped)) as blocks:
                for block, data in blocks:
                    self._put(write, block, data)

    def _put(self, write: Write, block: Block, data: memoryview) -> None:
        """Write what a block of the source becomes: a part of a finished tensor, codes, or itself."""
        assert block.tensor is not None
        if write.name in self.job.finished:
            start = block.offset - block.tensor.offset
            begin, end = (at * write.nbytes // block.tensor.nbytes for at in (start, start + block.nbytes))
            self.job.finished[write.name].read(begin, self.writer.reserve(end - begin))
        elif write.kind == "codes":
            bits = rows(block.tensor, data)
            codes = np.frombuffer(self.writer.reserve(bits.size), np.int8).reshape(bits.shape)
            scales = self.scales[write.source][block.row : block.row + len(bits)]
            row_codes(bits, scales, codes, self.job.arithmetic.quotient, self.job.arithmetic.low)
        else:
            self.writer.append(data)

    def _scales_of(self, bits: Bits, block: Block) -> Scales:
        assert block.tensor is not None
        amax = row_amax(bits)
        if not np.isfinite(amax).all():
            row = int(np.argmin(np.isfinite(amax)))
            kind = "NaN" if np.isnan(amax[row]) else "infinity"
            name = block.tensor.name
            raise NonFiniteWeightError(
                f"{block.tensor.shard}: {name} has {kind} in row {block.row + row}, so it has no scale; "
                f"repair the source, or leave the layer in {block.tensor.dtype} with --exclude '{name}'"
            )
        return self.job.arithmetic.scales(amax, block.tensor.dtype)
