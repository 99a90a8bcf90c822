"""What lies beside OUT may be damaged, or be another's: resuming trusts nothing that it cannot check."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import w8a8
from tests.checkpoint.files import hub_cache
from tests.checkpoints import folder_bytes, llama_tensors, write_checkpoint
from tests.execute.runs import FORK, finished_shards, names, staging_of
from w8a8 import quantize
from w8a8.errors import SourceChangedError, UnwritableError, UsageError

SHARDS = 3
FIRST = f"model-00001-of-0000{SHARDS}.safetensors"

Files = dict[str, bytes]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", llama_tensors(layers=1, hidden=16, intermediate=16), shards=SHARDS)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def whole(source: Path, tmp_path: Path) -> Files:
    """What an uninterrupted run gives."""
    quantize(source, tmp_path / "whole")
    return folder_bytes(tmp_path / "whole")


def interrupted(source: Path, out: Path, *, hash_source: bool = False) -> Path:
    """Leave a run with two finished shards; return the one of them that was finished first."""

    def advance(_: int) -> None:
        if finished_shards(out) == 2:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        quantize(source, out, workers=1, hash_source=hash_source, advance=advance)
    assert finished_shards(out) == 2
    return min(staging_of(out).joinpath("out").glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)


def resumed(source: Path, out: Path) -> tuple[int, str]:
    """Run again: how many shards it did not have to do, and what it said."""
    said: list[str] = []
    result = quantize(source, out, notice=said.append)
    assert not staging_of(out).exists()
    return result.resumed, "\n".join(said)


def test_a_finished_shard_that_was_damaged_is_made_again(source: Path, out: Path, whole: Files) -> None:
    shard = interrupted(source, out)
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    done, said = resumed(source, out)
    assert f"{shard.name}: not what an interrupted run wrote any more; made again" in said
    assert done == 1
    assert folder_bytes(out) == whole


def test_a_finished_shard_that_became_a_link_is_made_again(source: Path, out: Path, whole: Files) -> None:
    shard = interrupted(source, out)
    elsewhere = out.with_name("elsewhere")
    shard.rename(elsewhere)
    shard.symlink_to(elsewhere)
    before = elsewhere.read_bytes()
    assert resumed(source, out)[0] == 1
    assert folder_bytes(out) == whole
    assert not (out / shard.name).is_symlink()
    assert elsewhere.read_bytes() == before


@pytest.mark.parametrize(
    "line",
    [
        b"[1]",
        b"null",
        b"garbage",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"name": ["x"], "size": 1, "sha256": "", "source_sha256": ""}',
        b'{"name": "x", "size": "1", "sha256": "", "source_sha256": ""}',
        b'{"name": "x", "size": 1, "sha256": {}, "source_sha256": ""}',
        b'{"version": "1"}',
        b'"\xff\xfe"',
        b'"' + b"x" * 9_000_000 + b'"',
        bytes(100),
    ],
    ids=lambda line: repr(line[:12]),
)
@pytest.mark.parametrize("at", [0, 1])
def test_a_damaged_journal_starts_over_and_says_so(source: Path, out: Path, whole: Files, line: bytes, at: int) -> None:
    interrupted(source, out)
    journal = staging_of(out) / "journal.jsonl"
    lines = journal.read_bytes().splitlines()
    journal.write_bytes(b"\n".join([*lines[:at], line, *lines[at:], b""]))
    done, said = resumed(source, out)
    assert done == 0
    assert "the journal of an interrupted run is damaged" in said
    assert "starting over" in said
    assert folder_bytes(out) == whole


def test_a_doubled_first_line_starts_over_and_a_doubled_entry_says_nothing_new(
    source: Path, out: Path, whole: Files
) -> None:
    interrupted(source, out)
    journal = staging_of(out) / "journal.jsonl"
    job, *entries = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([job, *entries, *entries]))
    assert resumed(source, out)[0] == 2
    shutil.rmtree(out)
    interrupted(source, out)
    journal.write_bytes(b"".join([job, job, *entries]))
    assert resumed(source, out)[0] == 0
    assert folder_bytes(out) == whole


def folder(path: Path) -> None:
    (path / "inside").mkdir(parents=True)


def link(path: Path) -> None:
    path.symlink_to(path.with_name("elsewhere"))


@pytest.mark.parametrize("make", [folder, os.mkfifo, link])
def test_what_is_no_file_is_no_journal(source: Path, out: Path, whole: Files, make: Callable[[Path], None]) -> None:
    interrupted(source, out)
    journal = staging_of(out) / "journal.jsonl"
    journal.unlink()
    make(journal)
    done, said = resumed(source, out)
    assert done == 0
    assert "the journal of an interrupted run is damaged" in said
    assert folder_bytes(out) == whole


@pytest.mark.parametrize("dangling", [False, True])
def test_a_staging_folder_that_is_a_link_is_refused(source: Path, out: Path, *, dangling: bool) -> None:
    elsewhere = out.with_name("elsewhere")
    if not dangling:
        (elsewhere / "out").mkdir(parents=True)
        (elsewhere / "out" / "thesis.tex").write_text("years of work")
        (elsewhere / "old").mkdir()
    staging_of(out).symlink_to(elsewhere)
    with pytest.raises(UnwritableError, match=r"\.out\.w8a8: is a link.*remove it"):
        quantize(source, out)
    if not dangling:
        assert folder_bytes(elsewhere) == {"out/thesis.tex": b"years of work"}
        assert names(elsewhere) == ["old", "out"]
    assert staging_of(out).is_symlink()
    assert not out.exists()


def test_a_staging_folder_that_is_a_file_is_refused(source: Path, out: Path) -> None:
    staging_of(out).write_text("mine")
    with pytest.raises(UnwritableError, match="not a folder"):
        quantize(source, out)
    assert staging_of(out).read_text() == "mine"


@pytest.mark.parametrize("name", ["x" * 250, "x" * 300, "file/x"])
def test_a_name_that_no_folder_can_have_is_unwritable(source: Path, out: Path, name: str) -> None:
    out.with_name("file").touch()
    with pytest.raises(UnwritableError):
        quantize(source, out.with_name(name) if "/" not in name else out.parent / name)


@pytest.mark.parametrize("name", ["out", "old", "filling.jsonl"])
def test_links_inside_the_staging_folder_are_not_followed(source: Path, out: Path, whole: Files, name: str) -> None:
    interrupted(source, out)
    elsewhere = out.with_name("elsewhere")
    elsewhere.mkdir()
    (elsewhere / "thesis.tex").write_text("years of work")
    path = staging_of(out) / name
    if name == "out":
        shutil.rmtree(path)
    path.symlink_to(elsewhere)
    resumed(source, out)
    assert folder_bytes(out) == whole
    assert folder_bytes(elsewhere) == {"thesis.tex": b"years of work"}


@pytest.mark.parametrize("make", [os.mkfifo, Path.touch])
def test_what_is_no_folder_is_not_taken_for_an_older_result(
    source: Path, out: Path, whole: Files, make: Callable[[Path], None]
) -> None:
    staging_of(out).mkdir()
    for name in ("old", "out"):
        make(staging_of(out) / name)
    quantize(source, out)
    assert folder_bytes(out) == whole


def test_a_folder_or_a_link_among_the_finished_shards_is_not_published(source: Path, out: Path, whole: Files) -> None:
    interrupted(source, out)
    staged = staging_of(out) / "out"
    (staged / "empty").mkdir()
    (staged / "linked").symlink_to(source)
    os.mkfifo(staged / "pipe")
    assert resumed(source, out)[0] == 2
    assert folder_bytes(out) == whole
    assert names(out) == sorted(whole)


@pytest.mark.parametrize("hashed", [False, True])
def test_a_source_replaced_by_one_of_the_same_size_and_time_starts_over(hashed: bool, source: Path, out: Path) -> None:
    shard = source / interrupted(source, out, hash_source=hashed).name
    status = shard.stat()
    data = bytearray(shard.read_bytes())
    data[-2] ^= 1
    shard.write_bytes(data)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    done, said = resumed(source, out)
    assert done == 0
    reason = "was made from" if hashed else "may have been made from"
    assert f"an interrupted run {reason} another {shard.name}; starting over" in said
    quantize(source, out.with_name("fresh"))
    assert folder_bytes(out) == folder_bytes(out.with_name("fresh"))


def test_a_source_that_was_moved_to_another_disk_is_gone_on_with(source: Path, out: Path, whole: Files) -> None:
    interrupted(source, out, hash_source=True)
    shutil.copytree(source, source.with_name("copy"))
    shutil.rmtree(source)
    source.with_name("copy").rename(source)
    assert resumed(source, out) == (2, f"resuming: 2 of {SHARDS} shards are done already")
    assert folder_bytes(out) == whole


def test_a_source_in_the_hubs_cache_is_known_by_the_names_of_its_files(source: Path, out: Path, tmp_path: Path) -> None:
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in source.glob("*.safetensors")}
    snapshot = hub_cache(tmp_path / "hub", source, "org/model", "c0ffee")
    quantize(snapshot, out)
    assert json.loads((out / "w8a8.json").read_text())["source"] == {
        "name": "org/model", "revision": "c0ffee", "sha256": digests, "quantized": "",
    }  # fmt: skip
    assert w8a8.verify(out, snapshot).checksums == 2 * SHARDS


def test_a_damaged_file_in_the_hubs_cache_is_found_where_it_is_hashed(source: Path, out: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path / "hub", source, "org/model", "c0ffee")
    shard = min(snapshot.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-2] ^= 1
    shard.resolve().write_bytes(data)
    with pytest.raises(
        SourceChangedError, match=rf"{shard.name}: its SHA-256 is not the one that the Hub gives for it"
    ):
        quantize(snapshot, out, hash_source=True)
    assert not out.exists()


def test_an_empty_folder_is_filled_and_stays_the_folder_it_was(
    source: Path, out: Path, whole: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    out.mkdir()
    out.chmod(0o2750)
    before = out.stat()
    monkeypatch.chdir(out)
    quantize("../source", ".")
    assert folder_bytes(Path()) == whole
    assert (out.stat().st_ino, out.stat().st_mode) == (before.st_ino, before.st_mode)
    assert names(out.parent) == ["out", "source", "whole"]


def test_killed_while_an_empty_folder_is_filled_the_next_run_completes_it(
    source: Path, out: Path, whole: Files
) -> None:
    for moved in range(1, len(whole) + 1):
        out.mkdir()
        process = FORK.Process(target=_killed_after, args=(moved, source, out))
        process.start()
        process.join(60)
        assert process.exitcode == 9
        assert len(names(out)) == moved
        assert ("config.json" in names(out)) == (moved == len(whole))
        assert {name: whole[name] for name in names(out)} == folder_bytes(out)
        if moved < len(whole):
            assert resumed(source, out)[0] == SHARDS
        assert folder_bytes(out) == whole
        shutil.rmtree(out)
        shutil.rmtree(staging_of(out), ignore_errors=True)


def _killed_after(moved: int, source: Path, out: Path) -> None:
    rename, left = Path.rename, [moved]

    def counted(self: Path, target: Path) -> Path:
        result = rename(self, target)
        left[0] -= target.parent == out
        if not left[0]:
            os._exit(9)
        return result

    Path.rename = counted  # type: ignore[method-assign,assignment]
    quantize(source, out)


def test_a_replaced_folder_hands_its_mode_on(source: Path, out: Path) -> None:
    quantize(source, out)
    out.chmod(0o710)
    quantize(source, out, overwrite=True)
    assert out.stat().st_mode & 0o7777 == 0o710


def test_the_folder_one_stands_in_is_not_replaced(
    source: Path, out: Path, whole: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(source, out)
    monkeypatch.chdir(out)
    with pytest.raises(UsageError, match="you are in this folder"):
        quantize("../source", ".", overwrite=True)
    assert folder_bytes(out) == whole
