"""One source shard in, one output shard out, in one pass.

The plan has already placed every byte, so this is a loop over blocks: rows of a layer become scales and codes,
everything else goes through as it is. Scales are held until the end of the shard (0.1% of it), where the plan puts
them together with the few tensors that would have broken the alignment of others.
"""

import hashlib
import math
import threading
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from w8a8.checkpoint import Shard, TensorSpec, read_header, reading
from w8a8.checkpoint.stream import Block, Identity, read_exactly, row_bytes, shard_blocks, stream, tensor_blocks
from w8a8.errors import NonFiniteWeightError, SourceChangedError
from w8a8.formats import Arithmetic
from w8a8.formats.arithmetic import encode
from w8a8.kernels.cpu.rows import BITS, Bits, row_amax, row_codes
from w8a8.plan import ShardPlan, Write
from w8a8.storage.writer import SequentialWriter

Scales = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """A finished output shard, and the source it was made of."""

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
        with reading(self.path), self.path.open("rb", buffering=0) as file:
            read_exactly(file.fileno(), into, self.spec.offset + begin, self.path)


def quantize_shard(
    source: Path,
    shard: Shard,
    plan: ShardPlan,
    header: bytes,
    target: Path,
    arithmetic: Arithmetic,
    stop: threading.Event,
    advance: Callable[[int], None],
    finished: Mapping[str, Finished],
) -> ShardRecord:
    """Write `plan` from the file `source` to the file `target`; `advance` is told of source bytes as they are done.

    Tensors of the result that are in `finished`, by name, are taken from there.

    Raises `NonFiniteWeightError`, `SourceChangedError`, `UnreadableError`, `DiskFullError`, `UnwritableError`, or
    `Stopped` once `stop` is set.
    """
    before = Identity.of(source)
    if before.size != shard.size or read_header(source, shard.name).tensors != shard.tensors:
        raise SourceChangedError(f"{source}: changed since its header was read; run the same command again")
    digest = hashlib.sha256()
    largest = max([1, *(min(t.nbytes, max(row_bytes(t), 1)) for t in shard.tensors)])
    with SequentialWriter(target, largest) as writer:
        writer.append(header)
        scales = _stream_through(source, shard, plan, writer, arithmetic, stop, digest, advance, finished)
        tensors = {tensor.name: tensor for tensor in shard.tensors}
        for write in plan.tail:
            _write_late(write, tensors[write.source], source, scales, writer, arithmetic, stop, finished)
        writer.finish()
        if Identity.of(source) != before:
            raise SourceChangedError(f"{source}: changed while it was being read; run the same command again")
        return ShardRecord(plan.name, writer.size, writer.sha256, digest.hexdigest())


def _stream_through(
    source: Path,
    shard: Shard,
    plan: ShardPlan,
    writer: SequentialWriter,
    arithmetic: Arithmetic,
    stop: threading.Event,
    digest: "hashlib._Hash",
    advance: Callable[[int], None],
    finished: Mapping[str, Finished],
) -> Mapping[str, Scales]:
    """Pass over the whole source; write what streams, and return the scales of the tensors quantized here."""
    streamed = {write.source for write in plan.writes[: plan.streamed]}
    scales = {
        write.source: np.empty(math.prod(write.shape), np.float32) for write in plan.writes if write.kind == "scale"
    }
    with closing(stream(source, shard_blocks(shard), stop, digest)) as blocks:
        for block, data in blocks:
            tensor = block.tensor
            if tensor is not None and tensor.name in finished:
                if tensor.name in streamed:
                    _write_finished(block, finished[tensor.name], writer)
            elif tensor is not None and tensor.name in scales:
                bits = _rows(tensor, data)
                rows = slice(block.row, block.row + len(bits))
                scales[tensor.name][rows] = _scales(bits, block, arithmetic)
                if tensor.name in streamed:
                    _write_codes(bits, scales[tensor.name][rows], writer, arithmetic)
            elif tensor is not None and tensor.name in streamed:
                writer.append(data)
            advance(block.nbytes)
    return scales


def _write_late(
    write: Write,
    tensor: TensorSpec,
    source: Path,
    scales: Mapping[str, Scales],
    writer: SequentialWriter,
    arithmetic: Arithmetic,
    stop: threading.Event,
    finished: Mapping[str, Finished],
) -> None:
    """Write one tensor of the tail: a scale from memory, anything else from a second look at the source."""
    if write.name in finished:
        data = memoryview(bytearray(write.nbytes))
        finished[write.name].read(0, data)
        writer.append(data)
        return
    if write.kind == "scale":
        writer.append(encode(scales[tensor.name], write.dtype))
        return
    with closing(stream(source, tensor_blocks(tensor), stop)) as blocks:
        for block, data in blocks:
            if write.kind == "copy":
                writer.append(data)
            else:
                bits = _rows(tensor, data)
                _write_codes(bits, scales[tensor.name][block.row : block.row + len(bits)], writer, arithmetic)


def _write_finished(block: Block, done: Finished, writer: SequentialWriter) -> None:
    """Write the part of a finished tensor that a block of its source stands for."""
    assert block.tensor is not None
    begin, end = (
        offset * done.spec.nbytes // block.tensor.nbytes
        for offset in (block.offset - block.tensor.offset, block.offset - block.tensor.offset + block.nbytes)
    )
    done.read(begin, writer.reserve(end - begin))


def _rows(tensor: TensorSpec, data: memoryview) -> Bits:
    bits: Bits = np.frombuffer(data, BITS[tensor.dtype]).reshape(-1, tensor.shape[1])
    return bits


def _scales(bits: Bits, block: Block, arithmetic: Arithmetic) -> Scales:
    assert block.tensor is not None
    amax = row_amax(bits)
    if not np.isfinite(amax).all():
        row = int(np.argmin(np.isfinite(amax)))
        kind = "NaN" if np.isnan(amax[row]) else "infinity"
        name = block.tensor.name
        raise NonFiniteWeightError(
            f"{block.tensor.shard}: {name} has {kind} in row {block.row + row}, so it has no scale; "
            f"repair the source, or leave the layer as it is with --exclude '{name}'"
        )
    return arithmetic.scales(amax, block.tensor.dtype)


def _write_codes(bits: Bits, scales: Scales, writer: SequentialWriter, arithmetic: Arithmetic) -> None:
    codes = np.frombuffer(writer.reserve(bits.size), np.int8).reshape(bits.shape)
    row_codes(bits, scales, codes, arithmetic.quotient, arithmetic.low)
