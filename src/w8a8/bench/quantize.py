"""`w8a8 bench quantize`: quantize a checkpoint of Gemma 4 31B's layers, and copy it, by turns.

Every run is a whole process, timed from start to exit; its peak memory comes from the kernel and is at least the
launcher's 8 MiB. Runs take turns, so that a noisy machine is noisy for all alike; between runs the output is removed
and the disk synced. `cp -r` does not sync its copy, so where memory can cache the copy, `cp -r` ends before the disk is
done. `w8a8 quantize` syncs, hashes what it writes and opens the result again. Two more rows are for comparison: the
copy with a sync, and reading and hashing the source.
"""

import json
import math
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from w8a8.bench.model import HIDDEN, INTERMEDIATE, LAYER, LAYER_BYTES
from w8a8.bench.peers import PEERS
from w8a8.bench.process import timed
from w8a8.checkpoint.header import write_header
from w8a8.errors import W8A8Error
from w8a8.machine import usable_cores
from w8a8.terminal.output import plain_table
from w8a8.terminal.wording import clean

LAYERS_PER_SHARD = 2

_HASH = """
import hashlib, sys, threading
def digest(path):
    with open(path, "rb") as file:
        hashlib.file_digest(file, "sha256")
threads = [threading.Thread(target=digest, args=[path]) for path in sys.argv[1:]]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


@dataclass(frozen=True, slots=True)
class Contender:
    """A command to be timed; `environment(run)` is added to its environment in run number `run`.

    `fresh` contenders start without the output of the contender before them.
    """

    name: str
    command: Sequence[str]
    environment: Callable[[int], dict[str, str]] = lambda _run: {}
    fresh: bool = True


@dataclass(frozen=True, slots=True)
class Row:
    """One contender: the seconds of all its runs, and their largest peak memory (maximum resident set)."""

    name: str
    all_seconds: tuple[float, ...]
    peak_mib: float

    @property
    def seconds(self) -> float:
        """Median of `all_seconds`."""
        return statistics.median(self.all_seconds)


@dataclass(frozen=True, slots=True)
class BenchResult:
    """The table; `failed` holds a reason for each peer that did not run."""

    bytes: int
    cores: int
    rows: tuple[Row, ...]
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def baseline(self) -> float:
        """Median seconds of `cp -r`."""
        return self.rows[0].seconds

    def to_dict(self) -> dict[str, Any]:
        """Return the table as plain JSON values."""
        rows = [
            {**asdict(row), "seconds": row.seconds, "ratio_to_cp": row.seconds / self.baseline} for row in self.rows
        ]
        return {**asdict(self), "rows": rows}


def bench(
    gib: float, *, runs: int, peers: bool, folder: Path, notice: Callable[[str], None] = lambda _: None
) -> BenchResult:
    """Make the checkpoint (once), run every contender `runs` times by turns, and collect the table."""
    # 1) The checkpoint, which a later bench finds again.
    folder = folder.absolute()
    source, out = folder / f"gemma-4-31b-layers-{gib:g}GiB", folder / "w8a8-bench-out"
    make_checkpoint(source, gib, notice)
    size = sum(file.stat().st_size for file in _shards(source))
    with tempfile.TemporaryDirectory(dir=folder) as caches:
        # 2) The contenders; a peer whose environment cannot be built is left out.
        contenders = _contenders(source, out, caches)
        failed: dict[str, str] = {}
        for peer in PEERS if peers else ():
            notice(f"preparing {peer.name} in {folder / peer.key}")
            try:
                contenders.append(Contender(peer.name, peer.command(folder, source, out)))
            except W8A8Error as error:
                failed[peer.name] = str(error)
        # 3) The race.
        try:
            rows = race(contenders, runs, out, failed, notice)
        finally:
            shutil.rmtree(out, ignore_errors=True)
    return BenchResult(size, usable_cores(), rows, failed)


def show(result: BenchResult, say: Callable[[Any], None]) -> None:
    """Print the table for a person; `say` prints text and Rich tables."""
    table = plain_table("seconds", "min-max", "x cp -r", "peak MiB", "contender", left=0)
    for row in result.rows:
        table.add_row(
            f"{row.seconds:.2f}",
            f"{min(row.all_seconds):.2f}-{max(row.all_seconds):.2f}",
            f"{row.seconds / result.baseline:.2f}",
            f"{row.peak_mib:.0f}",
            row.name,
        )
    say(f"{result.bytes / 2**30:.2f} GiB, {result.cores} cores, medians of {len(result.rows[0].all_seconds)}")
    say(table)
    for name, reason in result.failed.items():
        say(f"[yellow]{clean(name)} did not run:[/yellow] {clean(reason)}")


def _contenders(source: Path, out: Path, caches: str) -> list[Contender]:
    """List `cp -r` first, which all are compared with, then this tool, then its parts."""
    quantize = [sys.executable, "-m", "w8a8", "quantize", str(source), str(out), "--quiet"]
    verify = [sys.executable, "-m", "w8a8", "verify", str(out), "--source", str(source), "--quiet"]

    def warm(_run: int) -> dict[str, str]:
        return {"NUMBA_CACHE_DIR": f"{caches}/warm"}

    def cold(run: int) -> dict[str, str]:
        return {"NUMBA_CACHE_DIR": f"{caches}/cold{run}"}

    return [
        Contender("cp -r", ["cp", "-r", str(source), str(out)]),
        Contender("cp -r, synced", ["sh", "-c", 'cp -r "$0" "$1" && sync -f "$1"', str(source), str(out)]),
        Contender("w8a8 quantize", quantize, warm),
        Contender("w8a8 verify", verify, warm, fresh=False),
        Contender("w8a8 quantize, first ever (cold JIT)", quantize, cold),
        Contender("SHA-256 of the source alone", [sys.executable, "-c", _HASH, *map(str, _shards(source))]),
    ]


def race(
    contenders: Sequence[Contender], runs: int, out: Path, failed: dict[str, str], notice: Callable[[str], None]
) -> tuple[Row, ...]:
    """Time every contender `runs` times by turns. A peer that fails gets its reason in `failed`; the others go on."""
    theirs = {peer.name for peer in PEERS}
    seconds: dict[str, list[float]] = {c.name: [] for c in contenders}
    peaks: dict[str, list[float]] = {c.name: [] for c in contenders}
    for run in range(-1, runs):  # the first round fills the page cache and the warm JIT cache, for all alike
        for c in contenders:
            if c.name in failed or (run < 0 and c.name in theirs):
                continue
            try:
                took, peak = _timed(c.command, c.environment(run), out, fresh=c.fresh)
            except W8A8Error as error:
                if c.name not in theirs:
                    raise
                failed[c.name] = str(error)
                continue
            if run >= 0:
                seconds[c.name].append(took)
                peaks[c.name].append(peak)
                notice(f"run {run + 1}/{runs}  {c.name}: {took:.2f} s, {peak:.0f} MiB")
    names = [c.name for c in contenders if c.name not in failed]
    return tuple(Row(name, tuple(seconds[name]), max(peaks[name])) for name in names)


def _shards(source: Path) -> list[Path]:
    return sorted(source.glob("*.safetensors"))


def make_checkpoint(
    folder: Path, gib: float, notice: Callable[[str], None] = lambda _: None, shards: int | None = None
) -> None:
    """Write a BF16 checkpoint of as many Gemma 4 31B decoder layers as fit into `gib` GiB (at least one).

    In `shards` files, by default in one for two layers.
    """
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_size": HIDDEN,
              "intermediate_size": INTERMEDIATE}  # fmt: skip
    layer = {f"{leaf}.weight": shape for leaf, shape in LAYER.items()}
    write_checkpoint(folder, config, layer, max(1, int(gib * 2**30 // LAYER_BYTES)), notice, shards)


def write_checkpoint(
    folder: Path,
    config: dict[str, Any],
    layer: Mapping[str, tuple[int, ...]],
    layers: int,
    notice: Callable[[str], None],
    shards: int | None = None,
) -> None:
    """Write a BF16 checkpoint of random numbers: `layers` times the tensors of `layer`, shapes by name; once."""
    config = {**config, "num_hidden_layers": layers, "w8a8_bench": 1}
    if (folder / "config.json").is_file() and json.loads((folder / "config.json").read_text()) == config:
        return
    nbytes = layers * sum(2 * math.prod(shape) for shape in layer.values())
    notice(f"making {layers} layers, {nbytes / 2**30:.2f} GiB, in {folder}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    values = np.random.default_rng(0).standard_normal(1 << 24, dtype=np.float32) * 0.02
    pool = (values.view(np.uint32) >> 16).astype(np.uint16)
    whole = {f"model.layers.{number}.{leaf}": shape for number in range(layers) for leaf, shape in layer.items()}
    count = shards or math.ceil(layers / LAYERS_PER_SHARD)
    limit = nbytes / count if shards else nbytes / layers * LAYERS_PER_SHARD
    members: list[dict[str, tuple[int, ...]]] = [{} for _ in range(count)]
    position = 0
    for tensor, shape in whole.items():
        size = 2 * math.prod(shape)
        members[int((position + size / 2) / limit)][tensor] = shape
        position += size
    weight_map = {}
    for i, tensors in enumerate(filter(None, members)):
        name = f"model-{i + 1:05}-of-{count:05}.safetensors"
        _write_shard(folder / name, tensors, pool)
        weight_map.update(dict.fromkeys(tensors, name))
    index = {"metadata": {"total_size": nbytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    os.sync()


def _write_shard(path: Path, tensors: Mapping[str, tuple[int, ...]], pool: NDArray[np.uint16]) -> None:
    """Fill the tensors with random BF16 numbers: pieces of 2 MiB, each from a random place in `pool`."""
    rows, position = [], 0
    for name, shape in tensors.items():
        end = position + 2 * math.prod(shape)
        rows.append((name, "BF16", shape, position, end))
        position = end
    rng = np.random.default_rng(len(path.name) + position)
    with path.open("wb") as file:
        file.write(write_header(rows, {"format": "pt"}))
        left = position // 2
        while left:
            start = int(rng.integers(0, len(pool) - (1 << 20)))
            part = pool[start : start + min(left, 1 << 20)]
            file.write(part.tobytes())
            left -= len(part)


def _timed(command: Sequence[str], environment: dict[str, str], out: Path, *, fresh: bool) -> tuple[float, float]:
    """Run a command to its end, and return its seconds and peak MiB; if `fresh`, without an earlier `out`."""
    if fresh:
        shutil.rmtree(out, ignore_errors=True)
    os.sync()
    run = timed(command, environment)
    if run.returncode != 0:
        raise W8A8Error(f"{' '.join(command[:4])} ... failed with {run.returncode}: {run.complaint}")
    return run.seconds, run.peak_mib
