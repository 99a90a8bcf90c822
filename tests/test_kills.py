"""Kills at random moments of every command that writes: nothing is torn, and the same command then completes.

Each kill is a SIGKILL. Processes are forked from one that has imported everything, so that moments lie in the work.
`W8A8_KILLS` is the number of kills in all, by default ten.
"""

import json
import multiprocessing
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.calibrate.checkpoints import make, write_text
from tests.checkpoints import folder_bytes, llama_tensors, write_checkpoint
from tests.evals.api import KEY, running_api, write_data
from tests.publish.hub import TOKEN, Hub, receiving_hub
from tests.runtime.moe import make as make_mixture
from tests.sources.makers import rewrite
from w8a8 import quantize

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("W8A8_KILLS", "10"))
QUESTIONS = 20
REPO = "me/tiny-W8A8"

SERVER = multiprocessing.get_context("forkserver")
IMPORTS = [
    *("w8a8.cli", "w8a8.execute", "w8a8.calibrate.run", "w8a8.evals.gsm8k.run", "w8a8.publish.report.figures"),
    *("w8a8.publish.card.write", "w8a8.publish.push", "w8a8.verification.run", "w8a8.evals.server"),
    *("transformers.models.llama.modeling_llama", "matplotlib.pyplot", "jinja2", "openai", "huggingface_hub.hf_api"),
]

Files = Mapping[str, bytes]


@dataclass(frozen=True)
class Command:
    """A command line, and the folder that all it writes lies in, hidden files aside.

    `before` lays out what is there before. `read` gives what counts of the folder: file contents by name.
    """

    name: str
    args: tuple[str, ...]
    folder: Path
    before: Callable[[Path], object] = lambda folder: None
    read: Callable[[Path], Files] = folder_bytes
    done_already: int = 0


@dataclass(frozen=True)
class World:
    """Sources, results and servers that all commands share."""

    home: Path
    hub: Hub
    api: str

    def command(self, name: str) -> Command:
        """Make the command of this name."""
        home, work = self.home, self.home / "work"
        source, out = str(home / "llama"), str(work / "out")
        match name:
            case "quantize":
                return Command(name, ("quantize", source, out, "--workers", "1"), work, done_already=40)
            case "mixture in FP8":
                return Command(name, ("quantize", str(home / "fp8"), out, "--workers", "1"), work, done_already=40)
            case "fill":
                before = lambda work: (work / "out").mkdir()  # noqa: E731
                return Command(name, ("quantize", source, out, "--workers", "1"), work, before, done_already=40)
            case "overwrite":
                return Command(name, ("quantize", source, out, "--overwrite"), work, self._old_out)
            case "recipe":
                options = ("--recipe", "smooth", "--calibration", str(home / "miller.txt"), "--samples", "4")
                calibrating = ("quantize", str(home / "small"), out, *options, "--tokens", "48")
                return Command(name, calibrating, work, done_already=40)
            case "report":
                return Command(name, ("report", str(home / "made"), "--out", str(work / "r.html")), work, _old_report)
            case "card":
                return Command(name, ("card", out, "--overwrite"), work, self._strange_card)
            case "eval":
                data, result = str(home / "data"), str(work / "adder.json")
                asking = ("eval", "gsm8k", "--base-url", self.api, "--data", data, "--out", result)
                return Command(name, asking, work, read=_outcomes)
            case _:
                return Command("push", ("push", str(home / "made"), REPO), work, self._empty_hub, self._pushed)

    def _old_out(self, work: Path) -> None:
        shutil.copytree(self.home / "old", work / "out")

    def _strange_card(self, work: Path) -> None:
        shutil.copytree(self.home / "made", work / "out")
        (work / "out" / "README.md").write_text("by hand")

    def _empty_hub(self, _: Path) -> None:
        self.hub.repositories.clear()
        self.hub.objects.clear()

    def _pushed(self, _: Path) -> Files:
        return dict(self.hub.repositories[REPO].files) if REPO in self.hub.repositories else {}


NAMES: tuple[str, ...] = ("quantize", "mixture in FP8", "fill", "overwrite", "recipe", "report", "card", "eval", "push")


def _old_report(work: Path) -> None:
    (work / "r.html").write_text("an older one")
    (work / "errors.png").write_text("an older one")


def _outcomes(work: Path) -> Files:
    """What was answered: a result also tells when, and how long it took."""
    return {path.name: json.dumps(json.loads(path.read_text())["outcomes"]).encode() for path in work.glob("*.json")}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    home = tmp_path_factory.mktemp("kills")
    source = write_checkpoint(home / "llama", llama_tensors(), shards=4)
    (source / "tokenizer.json").write_text("{}")
    rewrite(make_mixture(home / "qwen3_moe", "qwen3_moe"), home / "fp8", "fp8", shards=4)
    quantize(write_checkpoint(home / "older", llama_tensors(seed=1)), home / "old")
    make(home / "small", num_hidden_layers=2)
    quantize(home / "small", home / "made")
    write_text(home)
    write_data(home / "data", QUESTIONS)
    with ExitStack() as stack:
        hub = stack.enter_context(receiving_hub())
        api = stack.enter_context(running_api())
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name in [name for name in os.environ if name.startswith("HF_") or name.lower().endswith("_proxy")]:
            patch.delenv(name)
        values = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home / "hf"), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        for name, value in {**values, "OPENAI_API_KEY": KEY, "OMP_NUM_THREADS": "1"}.items():
            patch.setenv(name, value)
        SERVER.set_forkserver_preload(IMPORTS)
        yield World(home, hub, api.url)


def main(args: tuple[str, ...], log: str) -> None:
    """Run `w8a8 ARGS` in this process; all it says goes to the file `log`."""
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    from w8a8 import cli

    sys.argv = ["w8a8", *args]
    cli.main()


def run(command: Command, log: Path, seconds: float | None = None) -> int:
    """Run a command, and kill it after `seconds`; return its exit code."""
    process: Any = SERVER.Process(target=main, args=(command.args, str(log)))
    process.start()
    process.join(seconds)
    process.kill()
    process.join(120)
    code = process.exitcode
    process.close()
    assert code is not None
    return int(code)


@pytest.mark.parametrize("number", range(len(NAMES)), ids=lambda number: NAMES[number])
def test_a_kill_tears_nothing_and_the_same_command_completes(world: World, tmp_path: Path, number: int) -> None:
    command, log = world.command(NAMES[number]), tmp_path / "log"

    def prepared() -> Files:
        shutil.rmtree(command.folder, ignore_errors=True)
        command.folder.mkdir()
        command.before(command.folder)
        return command.read(command.folder)

    # 1) Run it whole, twice: the second time tells how long it takes
    for _ in range(2):
        old = prepared()
        began = time.perf_counter()
        assert run(command, log) == 0, log.read_text()
        took = time.perf_counter() - began
        new = command.read(command.folder)
    assert new != old
    # 2) Kill it at random moments
    moments, left = random.Random(number), KILLS * (number + 1) // len(NAMES) - KILLS * number // len(NAMES)
    while left:
        old = prepared()
        killed = run(command, log, moments.uniform(0, took)) == -9
        left -= killed
        # 3) Every file is there as it was before, or as it is to be, or not at all
        found = {name: data for name, data in command.read(command.folder).items() if not _hidden(name)}
        assert [name for name, data in found.items() if data not in (old.get(name), new.get(name))] == []
        # 4) The same command completes, unless it just had
        code = run(command, log)
        assert code == 0 or (code == command.done_already and found == new), log.read_text()
        assert command.read(command.folder) == new
        assert [path.name for path in command.folder.iterdir() if path.name.startswith(".")] == []


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in Path(name).parts)
