"""A result that is sent to another place while it is made: here, to a folder."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.checkpoints import folder_bytes
from tests.execute.runs import large_checkpoint, staging_of
from w8a8 import quantize
from w8a8.checkpoint.stream import file_sha256
from w8a8.errors import DiskFullError, HubError
from w8a8.execute import run
from w8a8.execute.delivery import Delivery
from w8a8.execute.shard import ShardRecord
from w8a8.execute.status import status
from w8a8.storage.folders import taken

SHARDS, MB = 8, 2


@dataclass
class Shelf:
    """A folder that takes a result. It refuses the shard that comes when `left` have come."""

    folder: Path
    departs: bool
    left: int = SHARDS
    came: list[str] = field(default_factory=list)
    most: int = 0

    def held(self, shards: Sequence[ShardRecord]) -> set[str]:
        return {s.name for s in shards if s.receipt == str(self.folder) and (self.folder / s.name).exists()}

    def send(self, path: Path, shard: ShardRecord, stopped: Callable[[], bool]) -> str:
        if len(self.came) == self.left:
            raise HubError("no more for now")
        self.came.append(shard.name)
        self.most = max(self.most, sum(map(taken, path.parent.glob("*.safetensors"))))
        assert file_sha256(path) == shard.sha256
        shutil.copy(path, self.folder)
        return str(self.folder)

    def finish(self, folder: Path, shards: Sequence[ShardRecord]) -> None:
        assert {shard.receipt for shard in shards} == {str(self.folder)}
        for path in folder.iterdir():
            if path.suffix != ".safetensors":
                shutil.copy(path, self.folder)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return large_checkpoint(tmp_path / "source", shards=SHARDS, shard_mb=2 * MB)


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    (tmp_path / "shelf").mkdir()
    return Shelf(tmp_path / "shelf", departs=True)


def test_what_departs_leaves_nothing_here_and_is_the_same(source: Path, shelf: Shelf, tmp_path: Path) -> None:
    expected = quantize(source, tmp_path / "whole").out
    delivery: Delivery = shelf
    quantize(source, tmp_path / "out", delivery=delivery, workers=1)
    assert folder_bytes(shelf.folder) == folder_bytes(expected)
    assert not (tmp_path / "out").exists()
    assert not staging_of(tmp_path / "out").exists()
    assert shelf.most <= 3.5 * MB * 1e6  # the one being made, and two that wait


def test_what_does_not_depart_is_here_too(source: Path, shelf: Shelf, tmp_path: Path) -> None:
    shelf.departs = False
    quantize(source, tmp_path / "out", delivery=shelf)
    assert folder_bytes(shelf.folder) == folder_bytes(tmp_path / "out")
    assert not staging_of(tmp_path / "out").exists()


@pytest.mark.parametrize("departs", [True, False])
def test_a_place_that_fails_stops_the_run_and_gets_the_rest_alone(
    source: Path, shelf: Shelf, tmp_path: Path, departs: bool
) -> None:
    shelf.departs, shelf.left = departs, 3
    out = tmp_path / "out"
    with pytest.raises(HubError, match="no more for now"):
        quantize(source, out, delivery=shelf, workers=1)
    assert not out.exists()
    found = status(out)
    assert found.shards_sent == 3
    assert found.shards_done < SHARDS or not departs
    shelf.left = SHARDS
    notices: list[str] = []
    quantize(source, out, delivery=shelf, notice=notices.append)
    assert notices == [f"resuming: {found.shards_done} of {SHARDS} shards are done already"]
    assert sorted(shelf.came) == sorted(set(shelf.came))
    assert folder_bytes(shelf.folder) == folder_bytes(quantize(source, tmp_path / "whole").out)


def test_what_is_gone_from_there_is_made_again(source: Path, shelf: Shelf, tmp_path: Path) -> None:
    shelf.left = 3
    with pytest.raises(HubError):
        quantize(source, tmp_path / "out", delivery=shelf)
    shelf.left = SHARDS + 1
    (shelf.folder / shelf.came[0]).unlink()
    quantize(source, tmp_path / "out", delivery=shelf)
    assert shelf.came.count(shelf.came[0]) == 2
    assert folder_bytes(shelf.folder) == folder_bytes(quantize(source, tmp_path / "whole").out)


def test_what_departed_is_made_again_for_another_place(source: Path, shelf: Shelf, tmp_path: Path) -> None:
    shelf.left = 3
    with pytest.raises(HubError):
        quantize(source, tmp_path / "out", delivery=shelf)
    assert folder_bytes(quantize(source, tmp_path / "out").out) == folder_bytes(
        quantize(source, tmp_path / "whole").out
    )


def test_room_is_needed_for_those_alone_that_are_here_at_once(
    source: Path, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 4 * MB * 1_000_000
    monkeypatch.setattr(run, "SLACK_BYTES", 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(free, 0, free))
    with pytest.raises(DiskFullError):
        quantize(source, tmp_path / "out", workers=1)
    quantize(source, tmp_path / "out", delivery=shelf, workers=1)
    assert len(folder_bytes(shelf.folder)) > SHARDS
