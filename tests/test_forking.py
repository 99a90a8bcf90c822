"""A command that is forked ends and says what one started anew does."""

import os
import signal
from pathlib import Path

import pytest

from tests.command import W8A8, python
from tests.forking import Forked, can_fork


@pytest.mark.parametrize("arguments", [["inspect", "llama"], ["inspect", "nowhere", "--json"], ["card", "--help"]])
def test_a_fork_says_what_a_process_started_anew_says(
    arguments: list[str], llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(llama.parent)
    anew = python(*W8A8[1:], *arguments)
    forked = Forked(arguments, os.environ)
    assert forked.communicate() == (anew.stdout, anew.stderr)
    assert forked.returncode == anew.returncode


def test_a_fork_reads_its_variables(llama: Path) -> None:
    forked = Forked(["quantize", "--dry-run"], {**os.environ, "MODEL_IN": str(llama)})
    assert "lm_head" in forked.communicate()[0]
    assert forked.returncode == 0


def test_a_signal_ends_a_fork() -> None:
    forked = Forked(["chat", "http://127.0.0.1:9/v1"], os.environ)
    forked.kill()
    assert forked.wait() == -signal.SIGKILL


def test_variables_that_are_read_early_need_a_process_started_anew() -> None:
    can_fork(["inspect"], os.environ)
    assert can_fork(["inspect"], {**os.environ, "HF_TOKEN": "x"})
    assert not can_fork(["inspect"], {**os.environ, "W8A8_CPU": "generic"})
    assert not can_fork(["bench", "quantize"], os.environ)
