"""Runs that are killed, interrupted and terminated, for real, at moments all over their work."""

import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import folder_bytes
from tests.execute.runs import (
    finish,
    finished_shards,
    large_checkpoint,
    quantize,
    signal_after_a_shard,
    staging_of,
    start,
    wait_for,
)

pytestmark = pytest.mark.slow

SHARDS = 6
KILLS = 20
KILLS_OVERWRITING = 6

Files = dict[str, bytes]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return large_checkpoint(tmp_path_factory.mktemp("resume") / "source", shards=SHARDS, shard_mb=20)


@pytest.fixture(scope="module")
def whole(source: Path) -> Files:
    """What an uninterrupted run gives."""
    out = source.with_name("whole")
    code, result, _ = quantize(source, out)
    assert (code, result["resumed_shards"]) == (0, 0)
    return folder_bytes(out)


@pytest.fixture(scope="module")
def work_seconds(source: Path) -> float:
    """How long a run works, from the making of its hidden folder until that is gone again."""
    out = source.with_name("timed")
    process = start(source, out)
    wait_for(staging_of(out).exists, process)
    began = time.perf_counter()
    wait_for(lambda: not staging_of(out).exists(), process)
    seconds = time.perf_counter() - began
    assert finish(process)[0] == 0
    shutil.rmtree(out)
    return seconds


@pytest.fixture
def out(source: Path) -> Iterator[Path]:
    out = source.with_name("out")
    yield out
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(staging_of(out), ignore_errors=True)


def killed(source: Path, out: Path, seconds: float, *options: str) -> bool:
    """Kill a run `seconds` into its work; whether that was before its end."""
    process = start(source, out, *options)
    wait_for(staging_of(out).exists, process)
    time.sleep(seconds)
    process.kill()
    process.communicate()
    return staging_of(out).exists()


def test_a_run_killed_at_any_moment_goes_on_to_the_same_bytes(
    source: Path, whole: Files, work_seconds: float, out: Path
) -> None:
    moments = random.Random(0)
    resumed: list[int] = []
    while len(resumed) < KILLS:
        in_time = killed(source, out, moments.uniform(0, work_seconds))
        done = finished_shards(out)
        if not out.exists():
            code, result, stderr = quantize(source, out)
            assert code == 0, stderr
            assert result["resumed_shards"] == done
            assert ("resuming" in stderr) == (done > 0)
        if in_time:
            resumed.append(done)
        assert folder_bytes(out) == whole
        shutil.rmtree(out)
        shutil.rmtree(staging_of(out), ignore_errors=True)  # a kill after the publishing leaves its journal
    assert sum(done > 0 for done in resumed) >= KILLS // 4, resumed


def test_a_run_killed_after_every_shard_never_does_one_twice(source: Path, whole: Files, out: Path) -> None:
    done = 0
    while not out.exists():
        assert finished_shards(out) == done
        process = start(source, out)
        wait_for(lambda: out.exists() or finished_shards(out) > done, process)  # noqa: B023 - it ends here
        process.kill()
        process.communicate()
        done = max(finished_shards(out), done + 1)
    assert folder_bytes(out) == whole


def test_a_killed_overwriting_leaves_the_old_or_the_new_or_restores_the_old(
    source: Path, whole: Files, work_seconds: float, out: Path
) -> None:
    spellings = {"quark": whole, "compressed-tensors": whole_in_other_format(source, out)}
    moments, kills, old, new = random.Random(2), 0, "compressed-tensors", "quark"
    while kills < KILLS_OVERWRITING:
        kills += killed(source, out, moments.uniform(0.3, 1) * work_seconds, "--overwrite", "--format", new)
        if not out.exists():
            assert quantize(source, out)[0] == 40
            assert folder_bytes(out) == spellings[old]
        assert folder_bytes(out) in (spellings[old], spellings[new])
        code, _, stderr = quantize(source, out, "--overwrite", "--format", new)
        assert code == 0, stderr
        assert folder_bytes(out) == spellings[new]
        assert not staging_of(out).exists()
        old, new = new, old


def whole_in_other_format(source: Path, out: Path) -> Files:
    assert quantize(source, out, "--format", "compressed-tensors")[0] == 0
    return folder_bytes(out)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_ends_at_once_says_so_and_goes_on(
    source: Path, whole: Files, out: Path, number: signal.Signals, code: int
) -> None:
    process = signal_after_a_shard(number, source, out)
    sent = time.perf_counter()
    returned, _, stderr = finish(process)
    assert time.perf_counter() - sent < 2
    assert returned == code
    assert "give the same command again to go on from here" in stderr
    assert "Traceback" not in stderr
    assert not out.exists()
    done = finished_shards(out)
    assert done > 0
    returned, result, stderr = quantize(source, out)
    assert (returned, result["resumed_shards"]) == (0, done)
    assert f"resuming: {done} of {SHARDS} shards are done already" in stderr
    assert folder_bytes(out) == whole


def test_another_format_since_the_kill_starts_over(source: Path, whole: Files, out: Path) -> None:
    signal_after_a_shard(signal.SIGKILL, source, out).communicate()
    code, result, stderr = quantize(source, out, "--format", "compressed-tensors")
    assert (code, result["resumed_shards"]) == (0, 0)
    assert "an interrupted run had another format" in stderr
    assert "starting over" in stderr
    made = folder_bytes(out)
    shutil.rmtree(out)
    assert made == whole_in_other_format(source, out) != whole


@pytest.mark.parametrize("resized", [False, True])
def test_a_source_changed_since_the_kill_starts_over(tmp_path: Path, *, resized: bool) -> None:
    source, out = large_checkpoint(tmp_path / "source", shards=4, shard_mb=20), tmp_path / "out"
    signal_after_a_shard(signal.SIGKILL, source, out).communicate()
    assert finished_shards(out) > 0
    other = large_checkpoint(tmp_path / "other", shards=4, shard_mb=21 if resized else 20, seed=1)
    changed = "model-00001-of-00004.safetensors"
    shutil.copyfile(other / changed, source / changed)

    code, result, stderr = quantize(source, out)
    assert (code, result["resumed_shards"]) == (0, 0)
    assert f"an interrupted run was made from another {changed}; starting over" in stderr
    assert quantize(source, tmp_path / "fresh")[0] == 0
    assert folder_bytes(out) == folder_bytes(tmp_path / "fresh")
