import hashlib
import os
import random
import threading
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest

from tests.checkpoints import Array, write_shard
from w8a8.checkpoint import Shard, TensorSpec, read_header
from w8a8.checkpoint import stream as module
from w8a8.checkpoint.stream import BUFFERS, Block, Stopped, file_sha256, shard_blocks, stream
from w8a8.errors import SourceChangedError, UnreadableError

BLOCK = 64


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", BLOCK)


def shard_of(path: Path, tensors: dict[str, tuple[str, Array]]) -> Shard:
    write_shard(path, tensors)
    return Shard(path.name, path.stat().st_size, read_header(path).tensors)


def blocks_of(size: int) -> list[Block]:
    return [Block(None, 0, offset, min(BLOCK, size - offset)) for offset in range(0, size, BLOCK)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(random.Random(0).randbytes(100 * BLOCK + 7))
    return path


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("read ")]


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
    assert [(b.row, b.nbytes) for b in blocks if b.tensor and b.tensor.name == "short"] == [(0, 60), (6, 30)]
    assert [(b.row, b.nbytes) for b in blocks if b.tensor and b.tensor.name == "long"] == [(0, 400), (1, 400), (2, 400)]


def test_a_shard_without_tensors_is_its_header(tmp_path: Path) -> None:
    shard = shard_of(tmp_path / "shard", {})
    assert sum(block.nbytes for block in shard_blocks(shard)) == shard.size


def test_a_tensor_without_elements_has_no_blocks() -> None:
    assert list(module.tensor_blocks(TensorSpec("t", "F32", (0, 4), "s", 8, 0))) == []


def test_every_block_arrives_with_its_bytes_and_the_digest_sees_them_all(file: Path) -> None:
    digest = hashlib.sha256()
    data = b"".join(bytes(view) for _, view in stream(file, blocks_of(file.stat().st_size), digest=digest))
    assert data == file.read_bytes()
    assert digest.hexdigest() == hashlib.sha256(data).hexdigest() == file_sha256(file)


def test_a_file_that_became_shorter_is_an_error(file: Path) -> None:
    blocks = blocks_of(file.stat().st_size)
    with closing(stream(file, blocks)) as read:
        next(read)
        os.truncate(file, 50 * BLOCK)
        with pytest.raises(SourceChangedError, match="became shorter"):
            list(read)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UnreadableError, match="No such file"):
        list(stream(tmp_path / "none", blocks_of(1)))


def test_a_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UnreadableError, match="directory"):
        list(stream(tmp_path, blocks_of(1)))


def test_a_stop_reaches_the_consumer_after_at_most_the_filled_buffers(file: Path) -> None:
    stop, seen = threading.Event(), 0
    with closing(stream(file, blocks_of(file.stat().st_size), stop.is_set)) as read, suppress(Stopped):
        for _ in read:
            stop.set()
            seen += 1
    assert seen <= BUFFERS + 1
    assert not readers()


def test_closing_it_early_ends_its_thread(file: Path) -> None:
    with closing(stream(file, blocks_of(file.stat().st_size))) as read:
        next(read)
        assert readers()
    assert not readers()
