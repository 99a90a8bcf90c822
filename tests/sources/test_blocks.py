from pathlib import Path

import numpy as np
import pytest

from tests.checkpoints import Array, write_shard
from w8a8.checkpoint import Shard, TensorSpec, read_header, stream
from w8a8.sources.blocks import shard_blocks, tensor_blocks
from w8a8.sources.view import ViewShard, plain


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BLOCK_BYTES", 64)


def shard_of(path: Path, tensors: dict[str, tuple[str, Array]]) -> ViewShard:
    write_shard(path, tensors)
    stored = read_header(path).tensors
    return ViewShard(Shard(path.name, path.stat().st_size, stored), tuple(map(plain, stored)))


def test_blocks_cover_every_byte_of_a_shard_once_and_in_order(tmp_path: Path) -> None:
    tensors: dict[str, tuple[str, Array]] = {
        "scalar": ("F32", np.array(1, np.float32)),
        "none": ("I64", np.zeros((3, 0), np.int64)),
        "vector": ("I64", np.arange(50)),
        "matrix": ("BF16", np.zeros((9, 5), np.float32)),
        "long rows": ("F16", np.zeros((3, 100), np.float32)),
        "odd": ("U8", np.zeros((1, 3, 67), np.uint8)),
    }
    shard = shard_of(tmp_path / "shard", tensors)
    position = 0
    for block in shard_blocks(shard):
        assert block.offset == position
        assert block.nbytes > 0
        position += block.nbytes
    assert position == shard.size


def test_blocks_hold_whole_rows_even_where_one_is_longer_than_a_block(tmp_path: Path) -> None:
    tensors: dict[str, tuple[str, Array]] = {
        "short": ("BF16", np.zeros((9, 5), np.float32)),
        "long": ("F32", np.zeros((3, 100), np.float32)),
    }
    blocks = list(shard_blocks(shard_of(tmp_path / "shard", tensors)))
    assert [(b.begin, b.nbytes) for b in blocks if b.tensor and b.tensor.name == "short"] == [(0, 60), (6, 30)]
    assert [(b.begin, b.nbytes) for b in blocks if b.tensor and b.tensor.name == "long"] == [
        (0, 400),
        (1, 400),
        (2, 400),
    ]


def test_a_shard_without_tensors_is_its_header(tmp_path: Path) -> None:
    shard = shard_of(tmp_path / "shard", {})
    assert sum(block.nbytes for block in shard_blocks(shard)) == shard.size


def test_a_tensor_without_elements_has_no_blocks() -> None:
    assert list(tensor_blocks(plain(TensorSpec("t", "F32", (0, 4), "s", 8, 0)))) == []
