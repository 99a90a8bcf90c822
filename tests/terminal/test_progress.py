"""The live line: what it says of work that passes in several streams, for people and for machines."""

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import llama_tensors, write_checkpoint
from tests.command import cli
from tests.execute.runs import large_checkpoint, signal_after_a_shard
from w8a8.terminal.output import Terminal
from w8a8.terminal.progress import Live, live


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that passes only when it is called."""
    now = [1000.0]
    monkeypatch.setattr("w8a8.terminal.progress.time.monotonic", lambda: now[0])

    def pass_(seconds: float) -> None:
        now[0] += seconds

    return pass_


def events(text: str) -> list[dict[str, Any]]:
    """The events on standard error, of which every line is one."""
    found = [json.loads(line) for line in text.splitlines()]
    assert all(event["time"].endswith("Z") for event in found)
    return found


def line(total: int, shown: list[str], interval: float = 5.0) -> Live:
    return Live("making", total, "bytes", lambda line, now: shown.append(line.text(now)), interval)


def test_the_slowest_stream_says_how_long_it_takes(clock: Callable[[float], None]) -> None:
    shown: list[str] = []
    made = line(10_000_000_000, shown)
    fetched, sent = made.lane("downloaded"), made.lane("sent", 5_000_000_000)
    for _ in range(100):
        clock(0.5)
        sent(1_000_000)
        fetched(40_000_000)
        made(20_000_000)
    assert len(shown) == 10
    # what is made takes another 200 s, what is sent 2450 s
    assert shown[-1] == "2.0 GB of 10.0 GB (20%), 39.3 MB/s, 41 min left, 4.0 GB downloaded, 100.0 MB of 5.0 GB sent"


def test_what_an_earlier_run_did_is_soon_no_speed(clock: Callable[[float], None]) -> None:
    shown: list[str] = []
    made = line(100_000_000_000, shown)
    made(50_000_000_000)
    for _ in range(200):
        clock(0.5)
        made(5_000_000)
    assert "10.0 MB/s" in shown[-1]
    assert shown[-1].endswith("82 min left")


@pytest.mark.parametrize("width", [60, 100, 160])
def test_a_terminal_shows_one_line_whatever_its_width(width: int) -> None:
    script = """
from w8a8.terminal.output import Terminal
from w8a8.terminal.progress import live
with live(Terminal(), "quantizing", 10_000_000_000) as line:
    fetched = line.lane("downloaded")
    for _ in range(20):
        time.sleep(0.1)
        fetched(400_000_000)
        line(200_000_000)
"""
    terminal, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    child = subprocess.Popen(
        [sys.executable, "-c", "import time" + script], stderr=other, env={**environment, "TERM": "xterm"}
    )
    os.close(other)
    seen = b""
    with suppress(OSError):  # that is how a terminal says that nobody writes any more
        while piece := os.read(terminal, 1 << 16):
            seen += piece
    os.close(terminal)
    assert child.wait() == 0
    assert seen.count(b"\x1b[1A") == 1  # the cursor goes up a line at the end, over the only one
    assert b"quantizing" in seen.rpartition(b"\r\n")[0].rpartition(b"\r")[2]
    assert b"4.0 GB of 10.0 GB (40%)" in seen
    assert (b"8.0 GB downloaded" in seen) is (width > 60)


def test_steps_of_many_minutes_have_a_speed(clock: Callable[[float], None]) -> None:
    shown: list[str] = []
    layers = Live("calibrating", 60, "layers", lambda line, now: shown.append(line.text(now)), 5.0)
    for _ in range(30):
        clock(600.0)
        layers(1)
    assert shown[-1] == "30 of 60 layers, 5 h 0 min left"


def test_any_thread_may_call_it() -> None:
    made = line(8000, [])

    def make() -> None:
        for _ in range(1000):
            made(1)

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made.main.done == 8000


def test_progress_as_events(clock: Callable[[float], None], capsys: pytest.CaptureFixture[str]) -> None:
    with live(Terminal(log_json=True), "making", 4000) as made:
        sent = made.lane("sent", 2000)
        for _ in range(4):
            clock(1.0)
            made(1000)
        sent(500)
        made.ending |= {"nodes": []}
    begin, *between, end = events(capsys.readouterr().err)
    assert begin.items() >= {"event": "begin", "what": "making", "unit": "bytes", "total": 4000}.items()
    assert [event["done"] for event in between] == [1000, 2000, 3000, 4000]
    assert [event["eta"] for event in between] == [3.0, 2.0, 1.0, 0.0]
    assert between[1].items() >= {"event": "progress", "total": 4000, "rate": 1000.0}.items()
    assert end.items() >= {"event": "end", "seconds": 4.0, "done": 4000, "eta": 12.0, "nodes": []}.items()
    assert end["sent"] == {"done": 500, "total": 2000, "rate": 125.0}


def test_all_that_a_command_says_of_its_work_is_events(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", llama_tensors(), config={"model_type": "unheard"})
    run = cli("quantize", source, tmp_path / "out", "--log-json")
    assert run.returncode == 0, run.stderr
    found = [event for event in events(run.stderr) if event["event"] != "progress"]  # where it takes a second
    assert [event["event"] for event in found] == ["begin", "notice", "end"]
    assert "unheard" in found[1]["text"]
    assert found[2]["done"] == found[2]["total"] == (source / "model.safetensors").stat().st_size
    assert "is whole" not in run.stderr
    again = cli("quantize", source, tmp_path / "out", "--log-json")
    (error,) = [event for event in events(again.stderr) if event["event"] == "error"]
    assert (error["error"], error["exit_code"]) == ("TargetExistsError", again.returncode)


def test_an_interrupt_is_an_event(tmp_path: Path) -> None:
    source, out = large_checkpoint(tmp_path / "source", shards=6, shard_mb=8), tmp_path / "out"
    process = signal_after_a_shard(signal.SIGINT, source, out, "--log-json")
    _, errors = process.communicate(timeout=60)
    last = events(errors)[-1]
    assert (last["event"], last["exit_code"], process.returncode) == ("interrupted", 130, 130)
