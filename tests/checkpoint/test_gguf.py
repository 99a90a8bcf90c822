"""A GGUF header: read as gguf's own writer wrote it; every damage is named; nothing is allocated that is not there."""

import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from w8a8.checkpoint.gguf import read_gguf, write_outline
from w8a8.errors import (
    DuplicateTensorError,
    HeaderError,
    HeaderTooLargeError,
    OffsetsError,
    TensorSizeError,
    TruncatedShardError,
    W8A8Error,
)


def text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def field(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def line(name: str, sizes: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


ARCHITECTURE = field("general.architecture", 8, text("llama"))


def raw(
    *parts: bytes, fields: int = 1, tensors: int = 1, data: int = 128, version: int = 3, magic: bytes = b"GGUF"
) -> bytes:
    head = magic + struct.pack("<IQQ", version, tensors, fields) + b"".join(parts)
    return head + bytes(-len(head) % 32 + data)


def write(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 1)
    writer.add_array("llama.some", [1, 2, 3])
    writer.add_token_list(["a", "b"])
    writer.add_tensor("one", np.zeros((4, 64), np.float16))
    blocks = np.zeros((3, 2 * 34), np.uint8)
    writer.add_tensor("two", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("three", np.zeros(5, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    header = read_gguf(path)
    reader = gguf.GGUFReader(path)
    assert [(t.name, t.dtype, t.shape, t.offset, t.nbytes) for t in header.tensors] == [
        (t.name, t.tensor_type.name, tuple(map(int, t.shape))[::-1], t.data_offset, t.n_bytes) for t in reader.tensors
    ]
    assert {key: found.value for key, found in header.fields.items()} == {
        "general.architecture": "llama",
        "llama.block_count": 1,
        "llama.some": (1, 2, 3),
        "tokenizer.ggml.tokens": 2,
    }
    assert header.number("llama.block_count") == 1
    assert header.text("general.architecture") == "llama"


def test_an_outline_has_the_fields_and_names_and_no_data(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    header = read_gguf(path)
    write_outline(path, header, tmp_path / "outline.gguf", without=["llama.some"])
    outline = read_gguf(tmp_path / "outline.gguf")
    assert {key: found.value for key, found in outline.fields.items()} == {
        key: found.value for key, found in header.fields.items() if key != "llama.some"
    }
    assert [(t.name, t.shape) for t in outline.tensors] == [(t.name, (1,)) for t in header.tensors]
    reader = gguf.GGUFReader(tmp_path / "outline.gguf")
    assert reader.fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]


DAMAGES = {
    "another magic": (raw(magic=b"GGML"), HeaderError, "no GGUF"),
    "nothing": (b"", HeaderError, "no GGUF"),
    "big-endian": (raw(version=3 << 24), HeaderError, "big-endian"),
    "version 1": (raw(version=1), HeaderError, "version 1"),
    "too many tensors": (raw(tensors=10**15), HeaderTooLargeError, "1,000,000,000,000,000 tensors"),
    "too many fields": (raw(fields=10**15), HeaderTooLargeError, "fields"),
    "more tensors than bytes": (raw(tensors=100_000), TruncatedShardError, "100,000 tensors"),
    "a long key": (raw(struct.pack("<Q", 2**62)), TruncatedShardError, "key"),
    "a key of 2 kB": (raw(field("k" * 2000, 4, b"1234")), HeaderError, "2,000 bytes"),
    "a key that is no text": (raw(field("", 4, b"")[:8] + b"", text(b"\xff" * 40)), HeaderError, "type"),
    "no UTF-8": (raw(text(b"\xff" * 40)), HeaderError, "UTF-8"),
    "a value of type 13": (raw(field("k", 13, bytes(8))), HeaderError, "type 13"),
    "a list of lists": (raw(field("k", 9, struct.pack("<IQ", 9, 1))), HeaderError, "type 9"),
    "a list longer than the file": (raw(field("k", 9, struct.pack("<IQ", 4, 1_000_000))), TruncatedShardError, "'k'"),
    "an endless list": (raw(field("k", 9, struct.pack("<IQ", 8, 2**60))), HeaderTooLargeError, "entries"),
    "a long token": (raw(field("k", 9, struct.pack("<IQ", 8, 1) + text("x" * 5000))), HeaderError, "5,000 bytes"),
    "a field twice": (raw(ARCHITECTURE, ARCHITECTURE, fields=2), HeaderError, "twice"),
    "alignment 7": (raw(field("general.alignment", 4, struct.pack("<I", 7)), line("a")), HeaderError, "alignment"),
    "alignment as text": (raw(field("general.alignment", 8, text("32")), line("a")), HeaderError, "alignment"),
    "five dimensions": (raw(ARCHITECTURE, line("a", (1,) * 5)), HeaderError, "5 dimensions"),
    "an unknown dtype": (raw(ARCHITECTURE, line("a", kind=4)), HeaderError, "ggml type 4"),
    "a size of 0": (raw(ARCHITECTURE, line("a", (0, 4))), TensorSizeError, "sizes"),
    "a size beyond any file": (raw(ARCHITECTURE, line("a", (2**63, 2**63))), TensorSizeError, "sizes"),
    "half a block": (raw(ARCHITECTURE, line("a", (16, 2), kind=8)), TensorSizeError, "blocks of 32"),
    "an offset beyond any file": (raw(ARCHITECTURE, line("a", offset=2**63)), OffsetsError, "beyond"),
    "an offset past the end": (raw(ARCHITECTURE, line("a", offset=32)), OffsetsError, "hole"),
    "an overlap": (raw(ARCHITECTURE, line("a"), line("b", offset=32), tensors=2), OffsetsError, "overlaps"),
    "a hole": (raw(ARCHITECTURE, line("a"), line("b", offset=256), tensors=2, data=400), OffsetsError, "hole"),
    "one name": (raw(ARCHITECTURE, line("a"), line("a", offset=128), tensors=2), DuplicateTensorError, "twice"),
    "too short": (raw(ARCHITECTURE, line("a"), data=100), TruncatedShardError, "truncated"),
    "bytes left over": (raw(ARCHITECTURE, line("a"), data=200), OffsetsError, "belong to none"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damage_is_named(damage: str, tmp_path: Path) -> None:
    data, error, message = DAMAGES[damage]
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(error, match=message) as raised:
        read_gguf(path)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    assert len(str(raised.value).replace(str(path), "")) < 300


def _flip(data: bytearray, chance: random.Random) -> None:
    data[chance.randrange(len(data))] = chance.randrange(256)


def _number(data: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(data) - 8)
    data[at : at + 8] = struct.pack("<Q", chance.choice([0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1]))


def _cut(data: bytearray, chance: random.Random) -> None:
    del data[chance.randrange(len(data)) :]


def test_damaged_anywhere_it_opens_or_says_why(tmp_path: Path) -> None:
    whole = write(tmp_path / "m.gguf").read_bytes()
    chance = random.Random(5)
    damages: list[Callable[[bytearray, random.Random], None]] = [_flip, _number, _cut]
    refused = 0
    for _ in range(600):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            if len(data) > 8:
                chance.choice(damages)(data, chance)
        (tmp_path / "damaged.gguf").write_bytes(data)
        try:
            header = read_gguf(tmp_path / "damaged.gguf")
        except W8A8Error:
            refused += 1
        else:
            assert all(t.offset + t.nbytes <= len(data) for t in header.tensors)
    assert refused > 200
