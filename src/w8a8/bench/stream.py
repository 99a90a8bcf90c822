"""`w8a8 bench stream`: quantizing a model while it is downloaded, against downloading it and quantizing it.

A server on this machine gives the model at a set bandwidth, to every client alike. Three contenders take turns, each a
whole process: the download alone (huggingface_hub's own), quantizing what is here already, and `w8a8 quantize` from the
server, whose time should be the larger of the two others, not their sum. Its disk is looked at ten times a second: the
source files that it holds, whole or on their way.
"""

import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from w8a8.bench.quantize import Contender, Row, make_checkpoint, race
from w8a8.bench.shop import REPOSITORY
from w8a8.execute.staging import Staging
from w8a8.machine import usable_cores
from w8a8.reading import real
from w8a8.terminal.output import plain_table
from w8a8.terminal.wording import plural

DOWNLOAD, HERE, STREAM = "download alone", "quantize a folder", "quantize from the Hub"
LOOK_SECONDS = 0.1

_DOWNLOAD = (
    "import sys; from huggingface_hub import snapshot_download; snapshot_download(sys.argv[1], local_dir=sys.argv[2])"
)


@dataclass(frozen=True, slots=True)
class StreamResult:
    """The rows of the contenders; `bandwidth` in bytes a second, `peak_disk` in bytes of source files held."""

    bytes: int
    shards: int
    cores: int
    bandwidth: float
    rows: tuple[Row, ...]
    peak_disk: int

    @property
    def ratio(self) -> float:
        """Seconds of quantizing while downloading, as a multiple of the larger of the two alone."""
        seconds = {row.name: row.seconds for row in self.rows}
        return seconds[STREAM] / max(seconds[DOWNLOAD], seconds[HERE])

    def to_dict(self) -> dict[str, Any]:
        """Return the table as plain JSON values."""
        rows = [{**asdict(row), "seconds": row.seconds} for row in self.rows]
        return {**asdict(self), "rows": rows, "ratio_to_larger": self.ratio}


def bench(
    gib: float,
    megabytes: float,
    *,
    runs: int,
    folder: Path,
    shards: int | None = None,
    notice: Callable[[str], None] = lambda _: None,
) -> StreamResult:
    """Make the checkpoint (once), and time the contenders `runs` times by turns, at `megabytes` a second."""
    folder = real(folder)
    source = folder / (f"gemma-4-31b-layers-{gib:g}GiB" + (f"-in-{shards}" if shards else ""))
    make_checkpoint(source, gib, notice, shards)
    with tempfile.TemporaryDirectory(dir=folder) as scratch, served(source, megabytes * 1e6) as url:
        out = Path(scratch) / "out"
        environment = {**asking(url, Path(scratch)), "NUMBA_CACHE_DIR": f"{scratch}/numba"}
        quantize = [sys.executable, "-m", "w8a8", "quantize", "--quiet"]
        commands = {
            DOWNLOAD: [sys.executable, "-c", _DOWNLOAD, REPOSITORY, str(out)],
            HERE: [*quantize, str(source), str(out)],
            STREAM: [*quantize, REPOSITORY, str(out)],
        }
        contenders = [Contender(name, command, lambda _run: environment) for name, command in commands.items()]
        with _watched(Staging.of(out)) as held:
            rows = race(contenders, runs, out, {}, notice)
    sizes = [file.stat().st_size for file in source.glob("*.safetensors")]
    return StreamResult(sum(sizes), len(sizes), usable_cores(), megabytes * 1e6, rows, max(held))


def show(result: StreamResult, say: Callable[[Any], None]) -> None:
    """Print the table for a person; `say` prints text and Rich tables."""
    table = plain_table("seconds", "min-max", "peak MiB", "contender", left=0)
    for row in result.rows:
        spread = f"{min(row.all_seconds):.2f}-{max(row.all_seconds):.2f}"
        table.add_row(f"{row.seconds:.2f}", spread, f"{row.peak_mib:.0f}", row.name)
    say(
        f"{result.bytes / 2**30:.2f} GiB in {plural(result.shards, 'shard')} at {result.bandwidth / 1e6:.0f} MB/s, "
        f"{result.cores} cores, medians of {len(result.rows[0].all_seconds)}"
    )
    say(table)
    say(
        f"quantizing while downloading takes {result.ratio:.2f} x the larger of both; "
        f"at most {result.peak_disk / 2**30:.2f} GiB of the source on the disk"
    )


def asking(url: str, scratch: Path) -> dict[str, str]:
    """The environment of a process that asks the Hub at `url`, and keeps what it caches in `scratch`."""
    return {
        "HF_ENDPOINT": url, "HF_HOME": f"{scratch}/hf", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip


@contextmanager
def served(folder: Path, rate: float) -> Iterator[str]:
    """The address of a Hub that serves `folder` at `rate` bytes a second."""
    command = [sys.executable, "-m", "w8a8.bench.shop", str(folder), str(rate)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdin is not None
        try:
            yield server.stdout.readline().strip()
        finally:
            server.stdin.close()


@contextmanager
def _watched(staging: Staging) -> Iterator[list[int]]:
    """The bytes of source files that a run holds, looked at until the context ends."""
    ended, held = threading.Event(), [0]

    def look() -> None:
        while not ended.wait(LOOK_SECONDS):
            held.append(staging.arrived())

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield held
    finally:
        ended.set()
        watcher.join()
