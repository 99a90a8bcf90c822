"""Standard output that cannot take every character, or nothing at all: a clear end, and the work is kept."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import llama_tensors, write_checkpoint
from tests.command import W8A8, cli

NARROW = [
    {"PYTHONIOENCODING": "latin-1"},
    {"PYTHONIOENCODING": "ascii"},
    {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = llama_tensors(layers=1, hidden=16, intermediate=16)
    return write_checkpoint(tmp_path_factory.mktemp("output") / "größe 模型 •", tensors)


def shell(redirected: str, *args: str | Path, cwd: Path) -> "subprocess.CompletedProcess[str]":
    """Run `w8a8 ARGS` in a shell, redirected."""
    line = f'"$@" {redirected}'
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line, "bash", *W8A8, *args],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=120,
    )


@pytest.mark.parametrize("env", NARROW, ids=lambda env: next(iter(env.values())))
def test_an_encoding_that_lacks_characters_ends_nothing(source: Path, tmp_path: Path, env: dict[str, str]) -> None:
    out = tmp_path / "o ü 模"
    done = subprocess.run([*W8A8, "quantize", source, out], capture_output=True, env={**os.environ, **env}, timeout=120)
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False), done.stderr
    assert rb"\u6a21" in done.stdout or rb"\udce6" in done.stdout
    assert (out / "w8a8.json").is_file()


@pytest.mark.parametrize("env", NARROW[1:], ids=lambda env: next(iter(env.values())))
def test_help_is_plain_where_that_is_all_there_is(env: dict[str, str]) -> None:
    done = cli("fit", "--help", env=env, check=True)
    assert done.stdout.isascii()
    assert "* w8a8 fit ./gemma-W8A8" in done.stdout


def test_json_stays_json(source: Path) -> None:
    done = cli("inspect", source, "--json", env={"PYTHONIOENCODING": "ascii"}, check=True)
    assert json.loads(done.stdout)["name"].endswith("größe 模型 •")


@pytest.mark.parametrize(("to", "reason"), [("> /dev/full", "No space left on device"), (">&-", "Bad file descriptor")])
def test_a_result_that_cannot_be_shown_is_said_to_be_whole(source: Path, tmp_path: Path, to: str, reason: str) -> None:
    done = shell(to, "quantize", source, "out", "--quiet", cwd=tmp_path)
    assert done.stderr == f"w8a8: error: standard output cannot be written ({reason}); out is whole\n"
    assert done.returncode == 45
    assert cli("inspect", tmp_path / "out", check=True).stdout


@pytest.mark.parametrize("what", [["--help"], ["--version"], ["quantize", "--help"]])
def test_help_that_cannot_be_shown_is_an_error(tmp_path: Path, what: list[str]) -> None:
    done = shell("> /dev/full", *what, cwd=tmp_path)
    assert done.returncode == 45
    assert done.stderr == "w8a8: error: standard output cannot be written (No space left on device)\n"


def test_an_error_is_the_one_that_counts(tmp_path: Path) -> None:
    done = shell("> /dev/full", "inspect", "nowhere", "--json", cwd=tmp_path)
    assert done.returncode == 10
    assert "nowhere: no such folder" in done.stderr


def test_a_reader_that_went_away_ends_it_as_it_ends_other_programs(source: Path, tmp_path: Path) -> None:
    gone = "| (exec <&-; sleep 3)"
    done = shell(gone, "inspect", source, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (141, "")
    done = shell(gone, "quantize", source, "out", "--quiet", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (141, "w8a8: error: standard output was closed; out is whole\n")


@pytest.mark.parametrize("to", ["2> /dev/full", "2>&-"])
def test_notices_that_cannot_be_shown_are_lost_and_nothing_else(source: Path, tmp_path: Path, to: str) -> None:
    done = shell(to, "quantize", source, "out", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "out: " in done.stdout
    assert shell(to, "inspect", "nowhere", cwd=tmp_path).returncode == 10


@pytest.mark.parametrize(("source", "read"), [("<&-", "''"), ("< bytes", r"'\xe9\ufffd\n'")])
def test_input_that_is_closed_or_no_text_is_read_all_the_same(tmp_path: Path, source: str, read: str) -> None:
    (tmp_path / "bytes").write_bytes("é".encode() + b"\xff\n")
    code = "import sys; from w8a8.terminal.output import guard_streams as g; g(); print(ascii(sys.stdin.read()))"
    line = f'"$@" {source}'
    done = subprocess.run(
        ["bash", "-c", line, "bash", sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    assert (done.stdout.strip(), done.stderr) == (read, "")


def test_a_folder_that_was_removed_is_no_place_to_work_in(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", 'mkdir gone && cd gone && rmdir ../gone && "$@"', "bash", *W8A8, "inspect", "x"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (
        2,
        "w8a8: error: the folder you are in was removed; go to one that is there\n",
    )
