import hashlib
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.checkpoints import folder_bytes, llama_tensors, write_checkpoint
from tests.execute.runs import at_line_of_staging, names, staging_of
from w8a8 import quantize
from w8a8.checkpoint.stream import Identity
from w8a8.errors import TargetBusyError, TargetExistsError, UnwritableError, UsageError
from w8a8.execute.shard import ShardRecord
from w8a8.execute.staging import Job, Staging

pytestmark = pytest.mark.slow

FILE = Identity(inode=1, size=3, mtime_ns=1, ctime_ns=1)
SOURCES = {"a": FILE, "b": FILE, "c": FILE}
JOB = Job("1", "quark", "rtn", "plan", SOURCES)
OTHER = replace(JOB, format="compressed-tensors")
SOURCE = Path("source")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", llama_tensors(layers=1, hidden=16, intermediate=16), shards=2)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A checkpoint that is not what `source` gives."""
    return write_checkpoint(tmp_path / "old", llama_tensors(layers=1, hidden=8, intermediate=8))


def shard(staging: Staging, name: str, data: bytes = b"abc") -> ShardRecord:
    """Write and record a finished shard."""
    (staging.folder / name).write_bytes(data)
    record = ShardRecord(name, len(data), hashlib.sha256(data).hexdigest(), hashlib.sha256(b"src").hexdigest())
    staging.record(record)
    return record


def interrupted(out: Path) -> None:
    """Leave an unfinished run of `JOB` with one shard, half of another and a sidecar."""
    with Staging.claim(out, overwrite=False) as staging:
        staging.begin(JOB, SOURCE)
        shard(staging, "a")
        (staging.folder / "b").write_bytes(b"ha")
        (staging.folder / "templates").mkdir()
        (staging.folder / "templates" / "x.jinja").write_text("left")


def test_a_finished_folder_appears_and_the_hidden_one_goes(out: Path) -> None:
    with Staging.claim(out, overwrite=False) as staging:
        staging.begin(JOB, SOURCE)
        shard(staging, "a")
        assert not out.exists()
        staging.publish()
    assert folder_bytes(out) == {"a": b"abc"}
    assert not staging_of(out).exists()


def test_the_parents_of_out_are_made(tmp_path: Path) -> None:
    with Staging.claim(tmp_path / "new" / "newer" / "out", overwrite=False) as staging:
        staging.begin(JOB, SOURCE)
        staging.publish()
    assert (tmp_path / "new" / "newer" / "out").is_dir()


def test_a_second_claim_is_refused_and_harms_nothing_however_early_it_comes(out: Path) -> None:
    with Staging.claim(out, overwrite=False) as first:
        with pytest.raises(TargetBusyError):
            Staging.claim(out, overwrite=False)
        first.begin(JOB, SOURCE)
        with pytest.raises(TargetBusyError):
            Staging.claim(out, overwrite=True)
        shard(first, "a")
        first.publish()
    assert folder_bytes(out) == {"a": b"abc"}


def test_a_claim_is_free_again_after_an_error(out: Path) -> None:
    with pytest.raises(ZeroDivisionError), Staging.claim(out, overwrite=False):
        raise ZeroDivisionError
    with Staging.claim(out, overwrite=False):
        pass


def test_nothing_is_left_where_no_shard_was_finished(out: Path) -> None:
    with Staging.claim(out, overwrite=False) as staging:
        staging.begin(JOB, SOURCE)
        (staging.folder / "a").write_bytes(b"ha")
    assert names(out.parent) == []


def test_the_same_job_goes_on_with_its_finished_shards_alone(out: Path) -> None:
    interrupted(out)
    with Staging.claim(out, overwrite=False) as staging:
        assert staging.begin(JOB, SOURCE) is None
        assert list(staging.finished) == ["a"]
        assert folder_bytes(staging.folder) == {"a": b"abc"}


@pytest.mark.parametrize(
    ("job", "says"),
    [
        (OTHER, "another format"),
        (replace(JOB, sources={**SOURCES, "b": replace(FILE, mtime_ns=2)}), "made from another b;"),
        (replace(JOB, sources={**SOURCES, "b": replace(FILE, size=4)}), "made from another b;"),
        (replace(JOB, sources={**SOURCES, "d": FILE}), "made from another d;"),
        (replace(JOB, version="2"), "another version"),
    ],
)
def test_another_job_says_what_differs_and_starts_over(out: Path, job: Job, says: str) -> None:
    interrupted(out)
    with Staging.claim(out, overwrite=False) as staging:
        notice = staging.begin(job, SOURCE)
        assert notice is not None
        assert says in notice
        assert staging.finished == {}
        assert names(staging.folder) == []
        shard(staging, "b")
    with Staging.claim(out, overwrite=False) as staging:
        assert staging.begin(job, SOURCE) is None
        assert list(staging.finished) == ["b"]


def test_a_finished_shard_of_another_size_is_done_again(out: Path) -> None:
    interrupted(out)
    (staging_of(out) / "out" / "a").write_bytes(b"abcd")
    with Staging.claim(out, overwrite=False) as staging:
        staging.begin(JOB, SOURCE)
        assert staging.finished == {}


def test_a_journal_entry_cut_short_is_passed_over_and_harms_no_later_one(out: Path) -> None:
    interrupted(out)
    with (staging_of(out) / "journal.jsonl").open("a") as journal:
        journal.write('\n{"name": "b", "si')
    for expected in (["a"], ["a", "c"]):
        with Staging.claim(out, overwrite=False) as staging:
            staging.begin(JOB, SOURCE)
            assert list(staging.finished) == expected
            shard(staging, "c")


def test_a_journal_of_zeros_starts_over(out: Path) -> None:
    """What a power failure can leave of a file that was never synced."""
    interrupted(out)
    (staging_of(out) / "journal.jsonl").write_bytes(bytes(100))
    with Staging.claim(out, overwrite=False) as staging:
        staging.begin(JOB, SOURCE)
        assert staging.finished == {}


def test_what_a_killed_publishing_left_behind_is_cleared_away(out: Path) -> None:
    interrupted(out)
    (staging_of(out) / "out").rename(out)  # killed between the rename and the clearing
    with pytest.raises(TargetExistsError):
        Staging.claim(out, overwrite=False)
    assert names(out.parent) == ["out"]


def test_a_published_result_can_be_made_again_after_a_killed_clearing(out: Path) -> None:
    interrupted(out)
    (staging_of(out) / "out").rename(out)
    (out / "config.json").write_text("{}")
    with Staging.claim(out, overwrite=True) as staging:
        staging.begin(JOB, SOURCE)
        assert staging.finished == {}
        shard(staging, "b")
        staging.publish()
    assert folder_bytes(out) == {"b": b"abc"}


def test_an_existing_out_is_refused_and_an_interrupted_run_beside_it_kept(out: Path) -> None:
    interrupted(out)
    out.mkdir()
    (out / "config.json").write_text("{}")
    with pytest.raises(TargetExistsError, match="--overwrite"):
        Staging.claim(out, overwrite=False)
    assert folder_bytes(out) == {"config.json": b"{}"}
    with Staging.claim(out, overwrite=True) as staging:
        staging.begin(JOB, SOURCE)
        assert list(staging.finished) == ["a"]


def test_a_file_is_refused_even_with_overwrite(out: Path) -> None:
    out.write_text("a file")
    with pytest.raises(TargetExistsError, match="is a file"):
        Staging.claim(out, overwrite=True)
    assert out.read_text() == "a file"
    assert names(out.parent) == ["out"]


def test_a_folder_that_is_no_checkpoint_is_refused_even_with_overwrite(out: Path) -> None:
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="not a checkpoint"):
        Staging.claim(out, overwrite=True)
    assert folder_bytes(out) == {"thesis.tex": b"years of work"}


def test_a_mount_point_is_refused_before_any_work() -> None:
    # Only root can put the hidden folder beside /proc and so gets as far as looking at it.
    kind, says = (TargetExistsError, "mount point") if os.geteuid() == 0 else (UnwritableError, "Permission denied")
    with pytest.raises(kind, match=says):
        Staging.claim(Path("/proc"), overwrite=True)


def test_an_empty_folder_is_as_good_as_none(out: Path) -> None:
    out.mkdir()
    with Staging.claim(out, overwrite=False) as staging:
        staging.begin(JOB, SOURCE)
        shard(staging, "a")
        staging.publish()
    assert folder_bytes(out) == {"a": b"abc"}


def test_a_parent_that_is_a_file_is_unwritable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UnwritableError):
        Staging.claim(tmp_path / "file" / "out", overwrite=False)


def at_every_line(action: Callable[[], None], work: Callable[[], object], check: Callable[[int], None]) -> int:
    """Do `work` once per line of staging.py it comes to, each time with `action` there; `check` the exit codes."""
    number = 0
    while code := at_line_of_staging(number := number + 1, action, work):
        check(code)
    return number - 1


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt() -> None:
    raise KeyboardInterrupt


def test_killed_at_any_line_out_is_absent_or_whole_and_the_next_run_gives_the_same(source: Path, out: Path) -> None:
    quantize(source, out)
    expected = folder_bytes(out)
    shutil.rmtree(out)

    def check(code: int) -> None:
        assert code == -signal.SIGKILL
        if out.exists():
            assert folder_bytes(out) == expected
            with pytest.raises(TargetExistsError):
                quantize(source, out)
        else:
            quantize(source, out)
            assert folder_bytes(out) == expected
        assert names(out.parent) == ["out", "source"]
        shutil.rmtree(out)

    assert at_every_line(kill, lambda: quantize(source, out), check) > 30


def test_killed_at_any_line_of_overwriting_the_old_or_the_new_is_there_or_restored(
    source: Path, old: Path, out: Path
) -> None:
    quantize(old, out)
    before = folder_bytes(out)
    quantize(source, out, overwrite=True)
    after = folder_bytes(out)
    quantize(old, out, overwrite=True)
    restored = 0

    def check(code: int) -> None:
        nonlocal restored
        assert code == -signal.SIGKILL
        restored += not out.exists()
        assert not out.exists() or folder_bytes(out) in (before, after)
        with pytest.raises(TargetExistsError):
            quantize(source, out)
        assert folder_bytes(out) in (before, after)
        quantize(source, out, overwrite=True)
        assert folder_bytes(out) == after
        assert not staging_of(out).exists()
        quantize(old, out, overwrite=True)

    assert at_every_line(kill, lambda: quantize(source, out, overwrite=True), check) > 30
    assert restored > 0


def test_interrupted_at_any_line_of_overwriting_the_old_or_the_new_is_there(source: Path, old: Path, out: Path) -> None:
    quantize(old, out)
    before = folder_bytes(out)
    quantize(source, out, overwrite=True)
    after = folder_bytes(out)
    quantize(old, out, overwrite=True)

    def check(code: int) -> None:
        assert code == 130
        assert folder_bytes(out) in (before, after)
        quantize(source, out, overwrite=True)
        assert folder_bytes(out) == after
        assert not staging_of(out).exists()
        quantize(old, out, overwrite=True)

    assert at_every_line(interrupt, lambda: quantize(source, out, overwrite=True), check) > 30
