"""`w8a8 eval kld` as a user runs it."""

import hashlib
import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.command import W8A8, cli
from tests.evals.kld.llamas import LETTERS, measure
from w8a8.errors import UnwritableError
from w8a8.evals.kld.run import prepare
from w8a8.publish.results import read_kld
from w8a8.storage.writer import write_json

pytestmark = pytest.mark.slow


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(LETTERS.documents[0])
    return path


def test_the_file_and_the_json_are_the_result(pair: tuple[Path, Path], book: Path, tmp_path: Path) -> None:
    out = tmp_path / "kld.json"
    out.write_text("an older result")
    options = ("--text", book, "--tokens", "50", "--context", "16", "--out", out, "--json", "--quiet")
    done = cli("eval", "kld", *pair, *options)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert json.loads(out.read_text()) == found
    assert read_kld(out).mean.value == found["kl"]["mean"]  # as card and report read it
    assert (found["kind"], found["schema"], found["tokens"]) == ("w8a8.kld", 1, 50)
    assert found["text"] == {
        "name": "book.txt",
        "sha256": hashlib.sha256(book.read_bytes()).hexdigest(),
        "tokens": len(book.read_text()),
    }
    assert found["kl"].keys() == {"mean", "median", "p99", "max", "interval"}
    assert [band["first"] for band in found["positions"]] == [0]
    assert sum(bin_["count"] for bin_ in found["histogram"]) == 50
    assert sorted(path.name for path in tmp_path.iterdir()) == ["book.txt", "kld.json"]


def test_a_person_reads_a_table(pair: tuple[Path, Path], book: Path) -> None:
    done = cli("eval", "kld", *pair, "--text", book)
    assert done.returncode == 0, done.stderr
    for words in ("mean KL divergence", "same likeliest token", "perplexity, candidate", "16-31", "▇"):
        assert words in done.stdout
    assert "loading" in done.stderr


def test_where_the_result_cannot_go_is_known_before_the_work(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UnwritableError, match="not a folder that can be written"):
        prepare(*pair, LETTERS, out=tmp_path / "nowhere" / "kld.json")
    (tmp_path / "taken").mkdir()
    with pytest.raises(UnwritableError, match="cannot be written"):
        write_json(tmp_path / "taken", measure(*pair).to_dict(), indent=1)
    assert list(tmp_path.iterdir()) == [tmp_path / "taken"]


def test_an_interrupt_ends_it_in_order(pair: tuple[Path, Path], tmp_path: Path) -> None:
    long = tmp_path / "long.txt"
    long.write_text("the miller had gone down to the river. " * 10_000)
    options = ("--text", long, "--tokens", "1000000", "--out", tmp_path / "kld.json")
    command: list[str | Path] = [*W8A8, "eval", "kld", *pair, *options]
    work = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert work.stderr is not None
    wait_for(work.stderr.readline, f"loading {pair[1]}")
    time.sleep(0.5)
    work.send_signal(signal.SIGINT)
    _, said = work.communicate(timeout=300)
    assert work.returncode == 130, said
    assert "interrupted; nothing was written" in said
    assert "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["long.txt"]


def wait_for(read: Callable[[], str], line: str) -> None:
    while (found := read().strip()) != line:
        assert found, "ended too early"
