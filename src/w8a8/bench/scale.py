"""`w8a8 bench scale`: time against workers on this machine, and a model of what bounds a run beyond it.

The speeds of a run's parts are measured one by one, on one thread, by its processor time where the part computes. The
model (`bounds.py`) predicts from them what whole runs take; real runs, whole processes with 1, 2, 4, ... workers by
turns, say how far it is off. Then it is asked about models and numbers of nodes that are not here. The network's speed
is given, not measured; TLS, and what a cluster takes to start, are left out.
"""

import hashlib
import mmap
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from w8a8.bench.bounds import NODES, Forecast, Speeds, Work, forecast, forecasts
from w8a8.bench.process import timed
from w8a8.bench.quantize import Contender, make_checkpoint, race
from w8a8.bench.shop import REPOSITORY
from w8a8.bench.sources import decoding
from w8a8.bench.stream import asking, served
from w8a8.checkpoint.header import write_header
from w8a8.checkpoint.stream import BLOCK_BYTES, read_exactly
from w8a8.errors import W8A8Error
from w8a8.execute.workers import worker_count
from w8a8.formats.arithmetic import EXACT
from w8a8.kernels.cpu.rows import row_amax, row_codes
from w8a8.machine import usable_cores
from w8a8.reading import real
from w8a8.storage.writer import SequentialWriter
from w8a8.terminal.output import plain_table

SAMPLE_BYTES = 256 << 20
"""Bytes of each part that are timed at a time."""
TURNS = 3
UNLIMITED = 1e12

_ARRIVE = """
import sys, time
from pathlib import Path
from w8a8.checkpoint.hub import HubFolder
from w8a8.storage.download import fetch
folder = HubFolder.find(sys.argv[1], None)
file = max(folder.files.values(), key=lambda file: file.size)
began = time.thread_time()
fetch(folder, file, Path(sys.argv[2]))
print(file.size / (time.thread_time() - began))
"""


@dataclass(frozen=True, slots=True)
class Point:
    """Runs with a number of workers, threads or Ray's: the seconds of each, and what the model says."""

    workers: int
    ray: bool
    all_seconds: tuple[float, ...]
    predicted: float
    bound: str

    @property
    def seconds(self) -> float:
        """Median of `all_seconds`."""
        return statistics.median(self.all_seconds)

    @property
    def error(self) -> float:
        """How far the model is off, as a share of what was measured."""
        return self.predicted / self.seconds - 1


@dataclass(frozen=True, slots=True)
class ScaleResult:
    """Speeds of parts, points measured and predicted, and forecasts for nodes of `cores` cores each."""

    bytes: int
    shards: int
    cores: int
    speeds: Speeds
    points: tuple[Point, ...]
    forecasts: tuple[Forecast, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain JSON values."""
        points = [{**asdict(point), "seconds": point.seconds, "error": point.error} for point in self.points]
        return {**asdict(self), "points": points}


def bench(
    gib: float,
    *,
    shards: int,
    megabytes: float,
    runs: int,
    folder: Path,
    cores: int | None = None,
    ray: bool = False,
    notice: Callable[[str], None] = lambda _: None,
) -> ScaleResult:
    """Measure parts and whole runs of a checkpoint of `gib` GiB in `shards` files; forecast for nodes of `cores`.

    A node's network gives `megabytes` MB a second. With `ray`, the same numbers of Ray workers are measured, too.
    """
    # 1) The checkpoint, which a later bench finds again
    folder = real(folder)
    source = folder / f"gemma-4-31b-layers-{gib:g}GiB-in-{shards}"
    make_checkpoint(source, gib, notice, shards)
    here, most = usable_cores(), worker_count()
    counts = sorted({min(2**power, most) for power in range(most.bit_length() + 1)})
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        # 2) The parts, then whole runs, by turns
        environment = {"NUMBA_CACHE_DIR": f"{scratch}/numba"}
        tiny = Path(scratch) / "tiny"
        _write_tiny(tiny)
        speeds = _speeds(source, Path(scratch), megabytes * 1e6, notice)
        out, contenders = Path(scratch) / "out", []
        ways = [(workers, False) for workers in counts] + [(workers, True) for workers in counts if ray]
        for workers, spread in ways:
            command = _command(source, out, workers, ray=spread)
            contenders.append(Contender(_name(workers, ray=spread), command, lambda _run: environment))
        rows = race(contenders, runs, out, {}, notice)
        starts = {spread: _start(tiny, out, environment, ray=spread) for _, spread in ways}
    # 3) What the model says of the same runs, and of others
    sizes = [file.stat().st_size for file in source.glob("*.safetensors")]
    work = Work(sum(sizes), sum(sizes) / 2, len(sizes), cached=True)
    points = []
    for (workers, spread), row in zip(ways, rows, strict=True):
        own = Speeds(**{**asdict(speeds), "start": starts[spread]})
        predicted, bound = forecast(work, own, cores=here, workers=workers)
        points.append(Point(workers, spread, row.all_seconds, predicted, bound))
    speeds = Speeds(**{**asdict(speeds), "start": starts[False]})
    cores = cores or here
    asked = tuple(forecasts(speeds, cores, min(8, cores)))
    return ScaleResult(sum(sizes), len(sizes), cores, speeds, tuple(points), asked)


def show(result: ScaleResult, say: Callable[[Any], None]) -> None:
    """Print the tables for a person; `say` prints text and Rich tables."""
    speeds = result.speeds
    say(f"{result.bytes / 2**30:.2f} GiB in {result.shards} shards, medians of {len(result.points[0].all_seconds)}")
    table = plain_table("workers", "seconds", "min-max", "model", "error", "bound by", left=0)
    for point in result.points:
        spread = f"{min(point.all_seconds):.2f}-{max(point.all_seconds):.2f}"
        name = _name(point.workers, ray=point.ray)
        table.add_row(
            name, f"{point.seconds:.2f}", spread, f"{point.predicted:.2f}", f"{point.error:+.0%}", point.bound
        )
    say(table)
    say(
        f"measured, GB/s a core: reading {speeds.read / 1e9:.2f}, SHA-256 {speeds.sha256 / 1e9:.2f}, quantizing BF16 "
        f"{speeds.bf16 / 1e9:.2f}, FP8 {speeds.fp8 / 1e9:.2f}, writing {speeds.write / 1e9:.2f}, downloading "
        f"{speeds.arrive / 1e9:.2f}; GB/s of the disk: reading {speeds.disk_read / 1e9:.2f}, writing "
        f"{speeds.disk_write / 1e9:.2f}; start {speeds.start:.1f} s"
    )
    say(
        f"the model, for 1 to {NODES[-1]} nodes of {result.cores} cores, with this disk and "
        f"{speeds.network / 1e9:.2f} GB/s of network; what the Hub gives and gets passes through one of them; "
        "bound by (c)ores, (d)isk, (n)etwork, too few (s)hards"
    )
    for way in dict.fromkeys(f.way for f in result.forecasts):
        own = [f for f in result.forecasts if f.way == way]
        grid = plain_table("", "", *map(str, NODES), left=2)
        for size, source in dict.fromkeys((f.size, f.source) for f in own):
            cells = [f"{_short(f.seconds)} {f.bound[0]}" for f in own if (f.size, f.source) == (size, source)]
            grid.add_row(size, source, *cells)
        say(f"{way}:")
        say(grid)


def _short(seconds: float) -> str:
    """A time as a table has room for it: `54s`, `12m`, `3.4h`."""
    return (
        f"{seconds:.0f}s" if seconds < 100 else f"{seconds / 60:.0f}m" if seconds < 6000 else f"{seconds / 3600:.1f}h"
    )


def _name(workers: int, *, ray: bool) -> str:
    return f"{workers}{' of Ray' if ray else ''}"


def _command(source: Path, out: Path, workers: int, *, ray: bool) -> list[str]:
    more = ["--ray", "local"] if ray else []
    return [
        sys.executable,
        "-m",
        "w8a8",
        "quantize",
        "--quiet",
        str(source),
        str(out),
        "--workers",
        str(workers),
        *more,
    ]


def _start(tiny: Path, out: Path, environment: dict[str, str], *, ray: bool) -> float:
    """The seconds of a run that has nothing to do."""
    taken = []
    for _ in range(TURNS):
        run = timed([*_command(tiny, out, 1, ray=ray), "--overwrite"], environment)
        if run.returncode:
            raise W8A8Error(f"a run of one small tensor failed: {run.complaint}")
        taken.append(run.seconds)
    return statistics.median(taken)


def _write_tiny(folder: Path) -> None:
    """A checkpoint of one small matrix."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    header = write_header([("model.layers.0.mlp.down_proj.weight", "BF16", (64, 64), 0, 8192)], {})
    (folder / "model.safetensors").write_bytes(header + bytes(8192))


def _speeds(source: Path, scratch: Path, network: float, notice: Callable[[str], None]) -> Speeds:
    """Measure the parts."""
    shard = max(source.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    buffer = memoryview(mmap.mmap(-1, BLOCK_BYTES))
    buffer[:] = np.random.default_rng(0).bytes(BLOCK_BYTES)
    bits = np.frombuffer(buffer, np.uint16).reshape(-1, 2048) & np.uint16(0xBFFF)  # finite
    codes = np.empty(bits.shape, np.int8)

    def quantize(values: Any) -> None:
        row_codes(values, EXACT.scales(row_amax(values), "BF16"), codes, EXACT.quotient, EXACT.low)

    tensor, decode, decoded = decoding(
        {
            "weight": ("F8_E4M3", np.frombuffer(buffer, np.uint8)[: 1 << 21].reshape(1024, 2048) & np.uint8(0x77)),
            "weight_scale_inv": ("F32", np.ones((8, 16), np.float32)),
        }
    )

    def fp8() -> None:
        decode()
        quantize(decoded)

    found = {
        "read": _per_second(lambda: _read(shard, buffer), min(SAMPLE_BYTES, shard.stat().st_size), times=1),
        "sha256": _per_second(lambda: hashlib.sha256(buffer), BLOCK_BYTES),
        "bf16": _per_second(lambda: quantize(bits), BLOCK_BYTES),
        "fp8": _per_second(fp8, tensor.stored.nbytes),
    }
    found |= _writing(scratch / "written", buffer, found["sha256"])
    found["disk_read"] = _cold(shard, buffer)
    found["arrive"] = _arriving(source, scratch)
    for name, speed in found.items():
        notice(f"{name}: {speed / 1e9:.2f} GB/s")
    return Speeds(**found, network=network, start=0.0)


def _per_second(part: Callable[[], Any], nbytes: int, times: int | None = None) -> float:
    """Bytes per second of the calling thread's processor time: the median of some turns, after one that warms up."""
    times = times or SAMPLE_BYTES // nbytes
    taken = []
    for _ in range(TURNS + 1):
        began = time.thread_time()
        for _ in range(times):
            part()
        taken.append(time.thread_time() - began)
    return times * nbytes / max(statistics.median(taken[1:]), 1e-9)


def _read(path: Path, buffer: memoryview) -> None:
    """Read the first bytes of a file, a block at a time."""
    fd = os.open(path, os.O_RDONLY)
    try:
        left = min(SAMPLE_BYTES, path.stat().st_size)
        for offset in range(0, left, BLOCK_BYTES):
            read_exactly(fd, buffer[: min(BLOCK_BYTES, left - offset)], offset, path)
    finally:
        os.close(fd)


def _cold(path: Path, buffer: memoryview) -> float:
    """Bytes per second of reading what is not in the page cache, where the kernel can be asked to forget it."""
    taken = []
    for _ in range(TURNS):
        if hasattr(os, "posix_fadvise"):
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
        began = time.perf_counter()
        _read(path, buffer)
        taken.append(time.perf_counter() - began)
    return min(SAMPLE_BYTES, path.stat().st_size) / statistics.median(taken)


def _writing(path: Path, buffer: memoryview, sha256: float) -> dict[str, float]:
    """Bytes per second of writing: on one core, and to the disk, without the hash that is made on the way."""
    nbytes = SAMPLE_BYTES // BLOCK_BYTES * BLOCK_BYTES
    processor, wall = [], []
    for _ in range(TURNS):
        began, cpu = time.perf_counter(), time.thread_time()
        with SequentialWriter(path) as writer:
            for _ in range(nbytes // BLOCK_BYTES):
                writer.append(buffer)
            writer.finish()
        processor.append(time.thread_time() - cpu)
        wall.append(time.perf_counter() - began)
    path.unlink()
    used = statistics.median(processor)
    hashing = min(nbytes / sha256, 0.95 * used)
    return {"write": nbytes / (used - hashing), "disk_write": nbytes / (statistics.median(wall) - hashing)}


def _arriving(source: Path, scratch: Path) -> float:
    """Bytes per second of one core's time that come over HTTP, are hashed, and are written."""
    with served(source, UNLIMITED) as url:
        run = timed([sys.executable, "-c", _ARRIVE, REPOSITORY, str(scratch / "arrived")], asking(url, scratch))
    (scratch / "arrived").unlink(missing_ok=True)
    if run.returncode:
        raise W8A8Error(f"the download from this machine failed: {run.complaint}")
    return float(run.stdout)
