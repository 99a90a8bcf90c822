import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest

import w8a8
from tests.checkpoints import Array, folder_bytes, llama_tensors, write_checkpoint, write_shard
from tests.execute import runs
from tests.execute.runs import finish, finished_shards, large_checkpoint, names, staging_of, start, wait_for
from w8a8.checkpoint.reader import INDEX
from w8a8.errors import (
    DiskFullError,
    SelfCheckError,
    SourceChangedError,
    TargetExistsError,
    UnreadableError,
    UnwritableError,
    UsageError,
)
from w8a8.quantization import Options

pytestmark = pytest.mark.slow

Tensors = dict[str, tuple[str, Array]]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", llama_tensors(), shards=3)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


# --- what a run writes -------------------------------------------------------------------------------------------


def test_the_result_is_the_same_whatever_the_workers_and_the_place(source: Path, tmp_path: Path) -> None:
    results = []
    for workers in (1, 2, 7):
        w8a8.quantize(source, tmp_path / f"out {workers}", workers=workers)
        results.append(folder_bytes(tmp_path / f"out {workers}"))
    assert results[0] == results[1] == results[2]


def test_the_source_is_left_as_it_was(source: Path, out: Path) -> None:
    before = {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in source.iterdir()}
    w8a8.quantize(source, out)
    assert {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in source.iterdir()} == before


def test_config_index_and_sidecars_go_along(source: Path, out: Path) -> None:
    (source / "tokenizer.json").write_text('{"ä": 1}')
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("{{ tools }}")
    result = w8a8.quantize(source, out)
    assert (out / "tokenizer.json").read_text() == '{"ä": 1}'
    assert (out / "additional_chat_templates" / "tool.jinja").read_text() == "{{ tools }}"
    config = json.loads((out / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "quark"
    assert config == json.loads((source / "config.json").read_text())
    index = json.loads((out / INDEX).read_text())
    sizes = {write.name: write.nbytes for write in result.plan.writes()}
    assert index["weight_map"].keys() == sizes.keys()
    assert index["metadata"]["total_size"] == sum(sizes.values())


def test_all_source_bytes_are_announced_as_done(source: Path, out: Path) -> None:
    lock, done = threading.Lock(), 0

    def advance(count: int) -> None:
        nonlocal done
        with lock:
            done += count

    w8a8.quantize(source, out, advance=advance)
    assert done == sum(file.stat().st_size for file in source.glob("*.safetensors"))


def test_an_empty_shard_is_carried_along(source: Path, out: Path) -> None:
    tensors: Tensors = {"none": ("I64", np.zeros((0, 3), np.int64))}
    index = json.loads((source / INDEX).read_text())
    write_shard(source / "model-00004-of-00004.safetensors", tensors)
    index["weight_map"]["none"] = "model-00004-of-00004.safetensors"
    (source / INDEX).write_text(json.dumps(index))
    w8a8.quantize(source, out)
    assert w8a8.verify(out, source).ok


# --- where it may write ------------------------------------------------------------------------------------------


def test_an_existing_out_stays_as_it_is(source: Path, out: Path) -> None:
    w8a8.quantize(source, out, Options(format="compressed-tensors"))
    before = folder_bytes(out)
    code, result, stderr = runs.quantize(source, out)
    assert (code, result["error"]) == (40, "TargetExistsError")
    assert "--overwrite" in stderr
    assert folder_bytes(out) == before
    assert names(out.parent) == ["out", "source"]


def test_overwriting_gives_what_a_new_folder_gives(source: Path, out: Path) -> None:
    w8a8.quantize(source, out, Options(format="compressed-tensors"))
    (out / "stale.txt").write_text("of the old one")
    w8a8.quantize(source, out, overwrite=True)
    w8a8.quantize(source, out.with_name("fresh"))
    assert folder_bytes(out) == folder_bytes(out.with_name("fresh"))
    assert names(out.parent) == ["fresh", "out", "source"]


def test_a_failed_overwriting_leaves_the_old(source: Path, out: Path) -> None:
    w8a8.quantize(source, out, Options(format="compressed-tensors"))
    before = folder_bytes(out)

    def advance(_count: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        w8a8.quantize(source, out, overwrite=True, advance=advance)
    assert folder_bytes(out) == before


@pytest.mark.parametrize("inside", ["source", "source/out", "."])
def test_source_and_target_may_not_contain_each_other(source: Path, tmp_path: Path, inside: str) -> None:
    before = folder_bytes(tmp_path)
    with pytest.raises(UsageError, match="may not contain each other"):
        w8a8.quantize(source, tmp_path / inside, overwrite=True)
    assert folder_bytes(tmp_path) == before


def test_a_link_into_the_source_is_seen_through(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(UsageError, match="may not contain each other"):
        w8a8.quantize(source, tmp_path / "link" / "out")


@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_leads_to_where_the_result_goes(source: Path, tmp_path: Path, out: Path, *, dangling: bool) -> None:
    if not dangling:
        w8a8.quantize(source, tmp_path / "disk" / "real", Options(format="compressed-tensors"))
    out.symlink_to("disk/real")
    w8a8.quantize(source, out, overwrite=True)
    assert out.is_symlink()
    assert w8a8.verify(out, source).ok
    assert names(tmp_path / "disk") == ["real"]


def test_a_second_run_on_the_same_out_ends_at_once_and_the_first_goes_on(tmp_path: Path, out: Path) -> None:
    source = large_checkpoint(tmp_path / "source", shards=4, shard_mb=20)
    first = start(source, out)
    wait_for((staging_of(out) / "journal.jsonl").exists, first)
    first.send_signal(signal.SIGSTOP)  # so that it is still at work when the second has started
    code, result, stderr = runs.quantize(source, out)
    first.send_signal(signal.SIGCONT)
    assert (code, result["error"]) == (41, "TargetBusyError")
    assert "another run is writing it now" in stderr
    assert finish(first)[0] == 0
    assert w8a8.verify(out, source).ok


def test_an_unwritable_parent_says_so(source: Path, out: Path) -> None:
    w8a8.quantize(source, out)  # what it imports, another user may not be able to read
    folder = Path(tempfile.mkdtemp())  # not pytest's, which other users may not enter
    shutil.copytree(source, folder / "source")
    folder.chmod(0o555)

    def as_nobody() -> None:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        with pytest.raises(UnwritableError, match=r"\.out\.w8a8: cannot be written \(Permission denied\)"):
            w8a8.quantize(folder / "source", folder / "out")

    process = runs.FORK.Process(target=as_nobody)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert names(folder) == ["source"]
    folder.chmod(0o755)
    shutil.rmtree(folder)


def test_unwritable_has_an_exit_code_of_its_own(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, result, _ = runs.quantize(source, tmp_path / "file" / "out")
    assert (code, result["error"]) == (43, "UnwritableError")


# --- full disks --------------------------------------------------------------------------------------------------


def sparse_checkpoint(folder: Path, nbytes: int) -> Path:
    """A checkpoint that claims about `nbytes` and takes up none."""
    name = "model.layers.0.mlp.down_proj.weight"
    write_checkpoint(folder, {name: ("BF16", np.zeros((1, 1), np.float32))})
    rows = nbytes // 8192
    header = json.dumps({name: {"dtype": "BF16", "shape": [rows, 4096], "data_offsets": [0, rows * 8192]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(folder / "model.safetensors", 8 + len(header) + rows * 8192)
    return folder


def test_a_result_larger_than_the_disk_is_refused_before_work_starts(tmp_path: Path, out: Path) -> None:
    source = sparse_checkpoint(tmp_path / "source", 3 * shutil.disk_usage(tmp_path).free)
    code, result, stderr = runs.quantize(source, out)
    assert (code, result["error"]) == (42, "DiskFullError")
    assert "are free; free some space" in stderr
    assert names(tmp_path) == ["source"]


class Disk(Protocol):
    """A folder whose disk can be full."""

    folder: Path

    def fill(self) -> None: ...
    def free(self) -> None: ...


class TinyDisk:
    """A file system of its own in memory, filled by a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fill(self) -> None:
        with suppress(OSError), (self.folder / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(1 << 12))

    def free(self) -> None:
        (self.folder / "filler").unlink()


class FullDevice:
    """For users who may not mount: the shards yet to be written lead to /dev/full."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fill(self) -> None:
        for i in range(1, 5):
            with suppress(FileExistsError):
                self._shard(i).symlink_to("/dev/full")

    def free(self) -> None:
        for i in range(1, 5):
            if self._shard(i).is_symlink():
                self._shard(i).unlink()

    def _shard(self, number: int) -> Path:
        return staging_of(self.folder / "out") / "out" / f"model-{number:05}-of-00004.safetensors"


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path | None]:
    """A mounted 48 MB; None where this user may not mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", folder], check=False)
    yield folder if mount.returncode == 0 else None
    if mount.returncode == 0:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("kind", [TinyDisk, FullDevice])
def test_a_disk_that_fills_up_keeps_what_is_finished_and_goes_on_when_there_is_room(
    tmp_path: Path, tiny_disk: Path | None, kind: Callable[[Path], Disk]
) -> None:
    source = large_checkpoint(tmp_path / "source", shards=4, shard_mb=12)
    disk = kind(tiny_disk or tmp_path) if kind is TinyDisk and tiny_disk else FullDevice(tmp_path)
    out = disk.folder / "out"
    left = 20_000_000  # within the second shard

    def advance(count: int) -> None:
        nonlocal left
        if left > 0 and (left := left - count) <= 0:
            disk.fill()

    with pytest.raises(DiskFullError, match=r"the disk is full\. What is finished is kept"):
        w8a8.quantize(source, out, workers=1, advance=advance)
    assert not out.exists()
    assert finished_shards(out) > 0
    disk.free()
    assert w8a8.quantize(source, out).resumed > 0
    w8a8.quantize(source, tmp_path / "expected")
    assert folder_bytes(out) == folder_bytes(tmp_path / "expected")


def test_sidecars_count_towards_the_room_that_is_needed(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (source / "tokenizer.json").open("wb") as file:
        file.truncate(3 * shutil.disk_usage(source).free)
    with pytest.raises(DiskFullError, match="GB are free"):
        w8a8.quantize(source, out)
    assert names(out.parent) == ["source"]


# --- what goes wrong on the way ----------------------------------------------------------------------------------


def test_a_source_that_becomes_shorter_is_noticed_and_nothing_published(tmp_path: Path, out: Path) -> None:
    source = large_checkpoint(tmp_path / "source", shards=2, shard_mb=40)
    shard = source / "model-00002-of-00002.safetensors"  # the larger, so the first

    def advance(_count: int) -> None:
        if shard.stat().st_size > 1000:
            os.truncate(shard, 1000)

    with pytest.raises(SourceChangedError, match=shard.name):
        w8a8.quantize(source, out, workers=1, advance=advance)
    assert names(tmp_path) == ["source"]


def test_a_source_that_changed_since_it_was_planned_is_noticed(source: Path, out: Path) -> None:
    from w8a8.quantization import prepare, run

    job = prepare(source)
    write_checkpoint(source, llama_tensors(hidden=32), shards=3)
    with pytest.raises(SourceChangedError, match="since its header was read"):
        run(job, out)
    assert not out.exists()


def test_one_failing_shard_ends_the_run_and_keeps_the_others(source: Path, out: Path) -> None:
    largest_first = sorted(source.glob("*.safetensors"), key=lambda file: -file.stat().st_size)
    last, away = largest_first[-1], source.with_name("away")

    def advance(_count: int) -> None:
        if last.exists():
            last.rename(away)

    with pytest.raises(UnreadableError, match=last.name):
        w8a8.quantize(source, out, workers=1, advance=advance)
    assert not out.exists()
    assert finished_shards(out) == 2
    away.rename(last)
    assert w8a8.quantize(source, out).resumed == 2
    assert w8a8.verify(out, source).ok


def test_a_result_that_does_not_check_out_is_not_published_and_not_resumed(source: Path, out: Path) -> None:
    """Damage done to the finished first shard while the second is at work."""
    first = staging_of(out) / "out" / "model-00001-of-00003.safetensors"
    journal = staging_of(out) / "journal.jsonl"

    def advance(_count: int) -> None:
        if journal.read_text().count("source_sha256") == 2:
            done = next(file for file in first.parent.iterdir() if file.name in journal.read_text())
            done.write_bytes(bytes(done.stat().st_size))

    with pytest.raises(SelfCheckError, match="does not open"):
        w8a8.quantize(source, out, workers=1, advance=advance)
    assert names(out.parent) == ["source"]
    assert w8a8.quantize(source, out).resumed == 0


def test_a_finished_out_is_not_made_twice(source: Path, out: Path) -> None:
    w8a8.quantize(source, out)
    with pytest.raises(TargetExistsError):
        w8a8.quantize(source, out)


# --- memory ------------------------------------------------------------------------------------------------------

PEAK = """
import sys, w8a8
w8a8.quantize(sys.argv[1], sys.argv[2], workers=2)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def peak_mib(source: Path, out: Path) -> float:
    """Peak resident memory of a process that quantizes `source`."""
    done = subprocess.run([sys.executable, "-c", PEAK, source, out], capture_output=True, text=True, check=True)
    return int(done.stdout) / 1024


def test_memory_does_not_grow_with_the_checkpoint_nor_with_its_shards(tmp_path: Path) -> None:
    small = peak_mib(large_checkpoint(tmp_path / "small", shards=2, shard_mb=30), tmp_path / "small out")
    many = peak_mib(large_checkpoint(tmp_path / "many", shards=8, shard_mb=50), tmp_path / "many out")
    large = peak_mib(large_checkpoint(tmp_path / "large", shards=2, shard_mb=200), tmp_path / "large out")
    assert max(many, large) - small < 30, (small, many, large)
