"""Real runs for these tests: checkpoints large enough to be interrupted, and processes to interrupt."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from tests.checkpoints import Array, write_checkpoint
from tests.command import W8A8
from tests.forking import Forked, can_fork
from w8a8.execute import staging
from w8a8.storage import folders, journal

STAGING = {staging.__file__, folders.__file__, journal.__file__}
Process = subprocess.Popen[str] | Forked
FORK = multiprocessing.get_context("fork")


def large_checkpoint(folder: Path, *, shards: int, shard_mb: int, seed: int = 0) -> Path:
    """Write a Llama of `shards` shards of about `shard_mb` megabytes each: a layer's weight and an odd tensor."""
    rng = np.random.default_rng(seed)
    columns = 2048
    rows = shard_mb * 1_000_000 // (2 * columns)
    tensors: dict[str, tuple[str, Array]] = {}
    for i in range(shards):
        # Clearing the exponent's top bit leaves magnitudes below 2: finite, whatever the other bits.
        bits = rng.integers(0, 1 << 16, (rows, columns), np.uint16) & np.uint16(0xBFFF)
        tensors[f"model.layers.{i}.mlp.down_proj.weight"] = ("BF16", bits)
    for i in range(shards):
        tensors[f"model.layers.{i}.odd"] = ("U8", rng.integers(0, 256, 3 + i, np.uint8))
    return write_checkpoint(folder, tensors, shards=shards)


def start(source: Path, out: Path, *options: str) -> Process:
    """Start `w8a8 quantize` on one worker, so that shards finish one by one."""
    arguments = ["quantize", str(source), str(out), "--workers", "1", "--json", *options]
    if can_fork(arguments, os.environ):
        return Forked(arguments, os.environ)
    return subprocess.Popen([*W8A8, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: Process) -> tuple[int, dict[str, Any], str]:
    """Wait for the end: exit code, the JSON printed, and the text on standard error."""
    stdout, stderr = process.communicate(timeout=120)
    return process.wait(), json.loads(stdout or "{}"), stderr


def quantize(source: Path, out: Path, *options: str) -> tuple[int, dict[str, Any], str]:
    """Run `w8a8 quantize` to its end, see `start` and `finish`."""
    return finish(start(source, out, *options))


def names(folder: Path) -> list[str]:
    """What lies in `folder`."""
    return sorted(entry.name for entry in folder.iterdir())


def staging_of(out: Path) -> Path:
    """The hidden folder beside `out`."""
    return out.parent / f".{out.name}.w8a8"


def finished_shards(out: Path) -> int:
    """How many shards the journal of an unfinished run lists."""
    try:
        return (staging_of(out) / "journal.jsonl").read_text().count('"source_sha256"')
    except OSError:
        return 0


def wait_for(condition: Callable[[], bool], process: Process) -> None:
    """Return as soon as `condition` holds, or the process has ended."""
    while not condition() and process.poll() is None:
        time.sleep(0.0005)


def signal_after_a_shard(number: signal.Signals, source: Path, out: Path, *options: str) -> Process:
    """Start a run and send it a signal once its first shard is finished, with others still to do."""
    process = start(source, out, *options)
    wait_for(lambda: finished_shards(out) > 0, process)
    process.send_signal(number)
    return process


def at_line_of_staging(number: int, action: Callable[[], None], work: Callable[[], object]) -> int:
    """Do `work` in a child that does `action` before its `number`-th line of staging code; return its exit code.

    The code is 0 where the work has fewer lines.
    """

    def child() -> None:
        left = number

        def in_staging(_frame: FrameType, event: str, _arg: object) -> Any:
            nonlocal left
            left -= event == "line"
            if left == 0 and event == "line":
                action()
            return in_staging

        def trace(frame: FrameType, _event: str, _arg: object) -> Any:
            return in_staging if frame.f_code.co_filename in STAGING else None

        sys.settrace(trace)
        try:
            work()
        except KeyboardInterrupt:
            os._exit(130)
        os._exit(0)

    process = FORK.Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode
