import errno
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from w8a8.errors import DiskFullError, UnwritableError
from w8a8.storage import writer as module
from w8a8.storage.writer import PAGE, SequentialWriter, disk_errors, write_json, write_whole

LARGEST = 3 * PAGE + 5

sizes = st.one_of(st.integers(0, 20), st.integers(PAGE - 2, PAGE + 2), st.integers(0, LARGEST))


def write(path: Path, parts: list[tuple[bool, bytes]]) -> SequentialWriter:
    """Write `parts`, each appended or put into reserved space."""
    with SequentialWriter(path, LARGEST) as writer:
        for reserved, data in parts:
            if reserved:
                writer.reserve(len(data))[:] = data
            else:
                writer.append(data)
        writer.finish()
    return writer


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), sizes), max_size=12), st.randoms(use_true_random=False))
def test_what_is_appended_and_reserved_is_the_file_and_its_checksum(
    tmp_path_factory: pytest.TempPathFactory, shape: list[tuple[bool, int]], random: Random
) -> None:
    path = tmp_path_factory.mktemp("writer") / "file"
    parts = [(reserved, random.randbytes(size)) for reserved, size in shape]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK_BYTES", PAGE)
        writer = write(path, parts)
    whole = b"".join(data for _, data in parts)
    assert path.read_bytes() == whole
    assert (writer.size, writer.sha256) == (len(whole), hashlib.sha256(whole).hexdigest())


def test_a_file_that_was_there_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 3 * PAGE)
    write(path, [(False, b"new")])
    assert path.read_bytes() == b"new"


def test_a_disk_that_wants_another_alignment_gets_ordinary_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAGE", 1)  # so that direct writes are as unaligned as can be
    monkeypatch.setattr(module, "BLOCK_BYTES", 1000)
    data = bytes(range(256)) * 40 + b"odd"
    writer = write(tmp_path / "file", [(False, data)] * 3)
    assert (tmp_path / "file").read_bytes() == data * 3
    assert writer.sha256 == hashlib.sha256(data * 3).hexdigest()


def test_a_full_disk_says_so() -> None:
    with pytest.raises(DiskFullError, match="/dev/full: the disk is full"):
        write(Path("/dev/full"), [(False, b"x" * PAGE)])


def test_a_missing_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(UnwritableError, match="No such file"):
        write(tmp_path / "none" / "file", [])


@pytest.mark.parametrize(
    ("code", "kind"), [(errno.ENOSPC, DiskFullError), (errno.EDQUOT, DiskFullError), (errno.EROFS, UnwritableError)]
)
def test_disk_errors_are_full_or_unwritable(code: int, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="/some/file"), disk_errors(Path("/some/file")):
        raise OSError(code, "as the system says")


def test_a_small_file_is_replaced_whole_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "result.json"
    write_whole(target, b"old")
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", fail)
        with pytest.raises(DiskFullError, match="disk is full; free"):
            write_whole(target, b"new")
    assert target.read_bytes() == b"old"
    write_whole(target, b"new")
    assert target.read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_a_small_file_of_a_long_job_says_that_its_work_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(DiskFullError, match="What is finished is kept; free"):
        write_json(tmp_path / "config.json", {}, resumable=True)


def test_half_a_character_is_written_as_json_spells_it(tmp_path: Path) -> None:
    write_json(tmp_path / "result.json", {"größe": "\ud800"})
    assert json.loads((tmp_path / "result.json").read_text(encoding="utf-8")) == {"größe": "\ud800"}


def test_what_a_kill_left_is_used_up_and_modes_and_links_stay(tmp_path: Path) -> None:
    target, left = tmp_path / "result.json", tmp_path / ".result.json.tmp"
    write_whole(target, b"old")
    target.chmod(0o640)
    left.write_bytes(b"half of something longer")
    write_whole(target, b"new")
    assert (target.read_bytes(), target.stat().st_mode & 0o777) == (b"new", 0o640)
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    (tmp_path / "mine").write_text("mine")
    left.symlink_to(tmp_path / "mine")
    with pytest.raises(UnwritableError):
        write_whole(target, b"newer")
    assert (tmp_path / "mine").read_text() == "mine"


def test_two_writers_of_one_file_take_turns(tmp_path: Path) -> None:
    contents = [bytes([number]) * 100_000 for number in range(40)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda data: write_whole(tmp_path / "result", data), contents))
    assert (tmp_path / "result").read_bytes() in contents
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_a_pipe_that_nobody_reads_is_no_place_to_write(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnwritableError, match="pipe: cannot be written"):
        write_whole(tmp_path / "pipe", b"result")
    assert (tmp_path / "pipe").is_fifo()


def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_whole(tmp_path / "pipe", b"result")
    assert os.read(reader, 100) == b"result"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()


def fail(_fd: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")
