import hashlib
import os
import random
import threading
from contextlib import closing, suppress
from pathlib import Path

import pytest

from w8a8.checkpoint import stream as module
from w8a8.checkpoint.stream import BUFFERS, Block, Stopped, file_sha256, stream
from w8a8.errors import SourceChangedError, UnreadableError

BLOCK = 64


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", BLOCK)


def blocks_of(size: int) -> list[Block]:
    return [Block(offset, min(BLOCK, size - offset)) for offset in range(0, size, BLOCK)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(random.Random(0).randbytes(100 * BLOCK + 7))
    return path


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("read ")]


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
