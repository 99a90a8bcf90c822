"""`quantize --push` from Hub to Hub, ended at drawn moments by a signal or either Hub; the same command then completes.

`W8A8_KILLS` is the number of ended runs here, by default five.
"""

import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

import pytest

from tests.checkpoint.hub import Hub as Source
from tests.checkpoint.hub import local_hub
from tests.checkpoints import folder_bytes
from tests.execute.runs import FORK, large_checkpoint, staging_of
from tests.publish.hub import Hub, ask, receiving_hub
from w8a8 import quantize
from w8a8.publish.card.text import README
from w8a8.storage.folders import taken

pytestmark = pytest.mark.slow

ENDED = int(os.environ.get("W8A8_KILLS", "5"))
SHARDS, MB = 8, 2
REPO = "me/large-W8A8"
SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
HELD = 7.3e6
"""The most bytes on the disk: two source shards of two megabytes each, three of the result of one, and headers."""


@dataclass(frozen=True)
class World:
    """Two Hubs, the folder that the command is given in, and what the repository is to show."""

    source: Source
    hub: Hub
    work: Path
    expected: dict[str, bytes]

    def prepare(self) -> None:
        """Make all as it was before."""
        self.hub.repositories.clear()
        self.hub.objects.clear()
        self.hub.received.clear()
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()

    def shown(self) -> dict[str, bytes]:
        """What the repository shows, without its card."""
        files = self.hub.repositories[REPO].files if REPO in self.hub.repositories else {}
        return {name: data for name, data in files.items() if name != README}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    home = tmp_path_factory.mktemp("interrupted")
    folder = large_checkpoint(home / "large", shards=SHARDS, shard_mb=MB)
    files = {"org/large": folder_bytes(folder)}
    with local_hub(files) as source, receiving_hub() as hub, pytest.MonkeyPatch.context() as patch:
        hub.elsewhere = source.url
        ask(hub, home / "cache", patch)
        expected = folder_bytes(quantize("org/large", home / "whole").out)
        yield World(source, hub, home / "work", expected)


def main(work: Path, args: tuple[str, ...]) -> None:
    """Run `w8a8 ARGS` in this process, in the folder `work`; all it says goes to a file beside it."""
    os.chdir(work)
    fd = os.open(work.with_name("log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    from w8a8 import cli

    sys.argv = ["w8a8", *args]
    cli.main()


def run(world: World, args: tuple[str, ...], seconds: float | None = None, number: int = signal.SIGKILL) -> int:
    """Run a command, and send it a signal after `seconds`; return its exit code."""
    process = FORK.Process(target=main, args=(world.work, args))
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        assert process.pid is not None
        os.kill(process.pid, number)
    process.join(120)
    code = process.exitcode
    assert code is not None
    process.close()
    return code


@contextmanager
def watched(folder: Path) -> Iterator[list[int]]:
    """The most bytes that the shards below `folder` took on the disk while the context lasted."""
    most, ended = [0], threading.Event()

    def look() -> None:
        while not ended.wait(0.01):
            with suppress(OSError):
                most[0] = max(most[0], sum(taken(p) for p in folder.rglob("*.safetensors*")))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()


def test_whatever_ends_a_run_the_same_command_shows_the_same_result(world: World) -> None:
    log = world.work.with_name("log")
    to_hub = ("quantize", "org/large", "--push", REPO, "--workers", "1", "--disk-budget", "4MB")
    # 1) Run it whole, twice: the second time tells how long it takes
    for _ in range(2):
        world.prepare()
        began = time.perf_counter()
        with watched(world.work) as most:
            assert run(world, to_hub) == 0, log.read_text()
        took = time.perf_counter() - began
        assert world.shown() == world.expected
        assert 1e6 < most[0] <= HELD
    # 2) End it at drawn moments, up to three times in a row
    drawn, left = random.Random(15), ENDED
    while left:
        world.prepare()
        args = to_hub if drawn.random() < 0.75 else ("quantize", "org/large", "out", *to_hub[2:])
        for _ in range(min(left, drawn.randint(1, 3))):
            left -= ended(world, args, took, drawn)
            assert world.shown() in ({}, world.expected)
        # 3) The same command completes, unless it just had
        shutil.rmtree(world.work / "out", ignore_errors=True)
        with watched(world.work) as most:
            assert run(world, args) == 0, log.read_text()
        assert world.shown() == world.expected
        assert set(world.hub.received.values()) == {1}
        assert len(world.hub.repositories[REPO].messages) == 1
        assert not staging_of(world.work / "large-W8A8").exists()
        assert not staging_of(world.work / "out").exists()
        if args == to_hub:
            assert not [*world.work.iterdir()]
            assert most[0] <= HELD
        else:
            assert folder_bytes(world.work / "out") == world.hub.repositories[REPO].files


def ended(world: World, args: tuple[str, ...], took: float, drawn: random.Random) -> bool:
    """Run a command that a signal ends, or one of the Hubs; return whether it was ended."""
    what, moment = drawn.choice((*SIGNALS, "from", "to")), drawn.random()
    if isinstance(what, signal.Signals):
        return run(world, args, moment * took, what) != 0
    if what == "from":
        given = [*range(SHARDS + drawn.randrange(SHARDS))]  # headers come first

        def fault(name: str, _begin: int) -> HTTPStatus | None:
            if not name.endswith(".safetensors") or (given and given.pop() >= 0):
                return None
            return HTTPStatus.FORBIDDEN

        world.source.fault = fault
    else:
        world.hub.uploads_left = drawn.randrange(SHARDS)
        world.hub.then = HTTPStatus.CONFLICT
    code = run(world, args)
    world.source.fault = lambda _name, _begin: None
    world.hub.uploads_left = world.hub.then = None
    return code != 0
