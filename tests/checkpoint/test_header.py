import json
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.files import entry, raw_shard
from w8a8.checkpoint import TensorSpec, read_header
from w8a8.checkpoint.header import DTYPE_BITS, write_header
from w8a8.errors import (
    DuplicateTensorError,
    HeaderError,
    HeaderTooLargeError,
    OffsetsError,
    TensorSizeError,
    TruncatedShardError,
    W8A8Error,
)

A = entry("F32", [2, 2], 0, 16)
B = entry("BF16", [4], 16, 24)
DATA = bytes(24)
HUGE = 2**62

BROKEN: dict[str, tuple[type[W8A8Error], Any, str]] = {
    "pickle": (HeaderError, b"\x80\x02}q\x00.", "not JSON"),
    "half JSON": (HeaderError, b'{"a": ', "not JSON"),
    "not UTF-8": (HeaderError, b'{"\xff": 1}', "not JSON"),
    "empty": (HeaderError, b"", "not JSON"),
    "nested deeply": (HeaderError, b'{"a":' + b"[" * 100_000, "not JSON"),
    "number of 5000 digits": (HeaderError, b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
    "list": (HeaderError, [1], "not an object"),
    "null": (HeaderError, None, "not an object"),
    "tensor is a number": (HeaderError, {"a": 1}, "'a' lacks"),
    "no offsets": (HeaderError, {"a": {"dtype": "F32", "shape": [1]}}, "'a' lacks"),
    "metadata with a number": (HeaderError, {"a": A, "__metadata__": {"n": 1}}, "__metadata__"),
    "metadata of 10 MB": (HeaderError, {"a": A, "__metadata__": {"n": "x" * 10_000_000}}, "10,000,001 characters"),
    "unknown dtype": (HeaderError, {"a": entry("F33", [6], 0, 24)}, "'F33'"),
    "dtype in lower case": (HeaderError, {"a": entry("f32", [6], 0, 24)}, "'f32'"),
    "dtype is a list": (HeaderError, {"a": {**A, "dtype": ["F32"]}}, "['F32']"),
    "shape is a number": (HeaderError, {"a": {**A, "shape": 4}}, "shape 4"),
    "negative dims": (HeaderError, {"a": entry("F32", [-2, -2], 0, 16)}, "[-2, -2]"),
    "boolean dim": (HeaderError, {"a": entry("F32", [True, 4], 0, 16)}, "[True, 4]"),
    "float dim": (HeaderError, {"a": entry("F32", [2.0, 2], 0, 16)}, "[2.0, 2]"),
    "dim is a string": (HeaderError, {"a": entry("F32", ["4"], 0, 16)}, "['4']"),
    "dim is null": (HeaderError, {"a": entry("F32", [None], 0, 16)}, "[None]"),
    "dim over 64 bits": (HeaderError, {"a": entry("F32", [2**64], 0, 16)}, "18446744073709551616"),
    "product overflows": (TensorSizeError, {"a": entry("F32", [HUGE, HUGE], 0, 16)}, "larger than any"),
    "product is 2^64": (TensorSizeError, {"a": entry("U8", [2**32, 2**32], 0, 0)}, "larger than any"),
    "300 huge dims": (TensorSizeError, {"a": entry("U8", [HUGE] * 300, 0, 16)}, "larger than any"),
    "zero comes late": (TensorSizeError, {"a": entry("U8", [HUGE] * 9 + [0], 0, 0)}, "larger than any"),
    "shape too small": (TensorSizeError, {"a": entry("F32", [5], 0, 24)}, "needs 20 bytes"),
    "dtype too wide": (TensorSizeError, {"a": entry("F64", [6], 0, 24)}, "needs 48 bytes"),
    "one offset": (OffsetsError, {"a": {**A, "data_offsets": [0]}}, "[0]"),
    "offsets are a string": (OffsetsError, {"a": {**A, "data_offsets": "0,16"}}, "'0,16'"),
    "negative offset": (OffsetsError, {"a": entry("F32", [2, 2], -16, 0)}, "[-16, 0]"),
    "float offsets": (OffsetsError, {"a": entry("F32", [2, 2], 0.0, 16.0)}, "[0.0, 16.0]"),
    "backwards": (OffsetsError, {"a": entry("F32", [2, 2], 16, 0)}, "before it begins"),
    "overlap": (OffsetsError, {"a": A, "b": entry("BF16", [8], 8, 24)}, "'b' overlaps"),
    "same range twice": (OffsetsError, {"a": A, "b": A}, "overlaps"),
    "hole": (OffsetsError, {"a": A, "b": entry("BF16", [2], 20, 24)}, "'b' leaves a hole"),
    "hole at the start": (OffsetsError, {"b": B}, "'b' leaves a hole"),
    "bytes at the end": (OffsetsError, {"a": A}, "8 bytes after"),
    "truncated": (TruncatedShardError, {"a": A, "b": B, "c": entry("U8", [9], 24, 33)}, "truncated"),
    "beyond the end": (OffsetsError, {"a": entry("U8", [8], 10**12, 10**12 + 8)}, "hole"),
}  # fmt: skip


def test_tensors_come_in_file_order_with_offsets_counted_from_the_start_of_the_file(tmp_path: Path) -> None:
    path = raw_shard(tmp_path / "x.safetensors", {"b": B, "__metadata__": {"format": "pt"}, "a": A}, DATA)

    header = read_header(path)

    start = header.data_start
    assert header.tensors == (
        TensorSpec("a", "F32", (2, 2), "x.safetensors", start, 16),
        TensorSpec("b", "BF16", (4,), "x.safetensors", start + 16, 8),
    )
    assert header.metadata == {"format": "pt"}
    assert header.file_size == start + 24 == path.stat().st_size


def test_scalars_and_empty_tensors_are_tensors(tmp_path: Path) -> None:
    entries = {"scalar": entry("I64", [], 0, 8), "empty": entry("F32", [0, 2**40], 8, 8)}

    header = read_header(raw_shard(tmp_path / "x", entries, bytes(8)))

    assert [(t.name, t.numel, t.nbytes) for t in header.tensors] == [("scalar", 1, 8), ("empty", 0, 0)]


def test_metadata_of_null_is_none_as_the_library_has_it(tmp_path: Path) -> None:
    header = read_header(raw_shard(tmp_path / "x", {"a": entry("F32", [2], 0, 8), "__metadata__": None}, bytes(8)))

    assert header.metadata == {}
    assert [tensor.name for tensor in header.tensors] == ["a"]


@pytest.mark.parametrize(
    "header",
    [b'{"a":' + b"[" * 99_000_000, b'{"a":[' + b"1," * 45_000_000, '{"😀'.encode() + b"a" * 99_000_000 + b'":1}'],
    ids=["nested", "numbers", "wide text"],
)
def test_a_header_of_too_much_is_refused_before_it_is_parsed(tmp_path: Path, header: bytes) -> None:
    path = raw_shard(tmp_path / "x", header)
    del header

    tracemalloc.start()
    with pytest.raises(HeaderError, match=r"more than 2,000,000 values|bytes of text"):
        read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 110_000_000
    path.unlink()


def test_what_is_written_is_read_back_and_data_start_at_a_multiple_of_eight(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(write_header([("größe", "U8", (3,), 0, 3)], {"format": "pt", "n": "1"}) + bytes(3))

    header = read_header(path)

    assert header.data_start % 8 == 0
    assert header.metadata == {"format": "pt", "n": "1"}
    assert [(t.name, t.dtype, t.shape) for t in header.tensors] == [("größe", "U8", (3,))]


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_is_as_wide_as_the_safetensors_library_says(tmp_path: Path, dtype: str) -> None:
    nbytes = 4 * DTYPE_BITS[dtype] // 8

    header = read_header(raw_shard(tmp_path / "x", {"t": entry(dtype, [4], 0, nbytes)}, bytes(nbytes)))

    assert header.tensors[0].nbytes == nbytes


@pytest.mark.parametrize(("error", "header", "says"), BROKEN.values(), ids=BROKEN)
def test_a_header_that_breaks_a_rule_is_refused_by_name(
    tmp_path: Path, error: type[W8A8Error], header: Any, says: str
) -> None:
    path = raw_shard(tmp_path / "broken.safetensors", header, DATA)

    with pytest.raises(error) as raised:
        read_header(path)

    assert type(raised.value) is error
    assert str(raised.value).startswith(f"{path}: ")
    assert says in str(raised.value)


@pytest.mark.parametrize("header", [b'{"a": 1, "a": 1}', b'{"a": {"dtype": "U8", "dtype": "I8"}}'])
def test_a_name_that_stands_twice_is_refused(tmp_path: Path, header: bytes) -> None:
    with pytest.raises(DuplicateTensorError, match="twice"):
        read_header(raw_shard(tmp_path / "x", header))


@pytest.mark.parametrize("size", range(8))
def test_a_file_too_short_for_a_length_is_truncated(tmp_path: Path, size: int) -> None:
    (tmp_path / "x").write_bytes(bytes(size))

    with pytest.raises(TruncatedShardError, match=f"{size} bytes are too few"):
        read_header(tmp_path / "x")


@pytest.mark.parametrize("length", [17, 2**20, 100_000_001, 2**63, 2**64 - 1])
def test_a_length_beyond_the_file_or_the_cap_is_refused_without_allocating_it(tmp_path: Path, length: int) -> None:
    path = raw_shard(tmp_path / "x", b"{}" + bytes(14), length=length)

    tracemalloc.start()
    with pytest.raises(HeaderTooLargeError, match=f"{length:,} bytes"):
        read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 1 << 20


def test_a_length_over_the_cap_is_refused_even_if_the_file_is_that_long(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 200_000_000))
        file.truncate(300_000_000)

    with pytest.raises(HeaderTooLargeError, match="the format's 100,000,000"):
        read_header(path)


@pytest.mark.parametrize(
    "entries",
    [
        {"a": entry("U8", [HUGE] * 100_000, 0, 16)},
        {"a": entry("U8", "9" * 1_000_000, 0, 16)},
        {"a" * 1_000_000: 1},
        {"a": entry("U8", [1], *["0" * 1_000_000] * 2)},
    ],
    ids=["dims", "shape", "name", "offsets"],
)
def test_what_is_megabytes_long_is_refused_quickly_in_a_short_message(tmp_path: Path, entries: Any) -> None:
    path = raw_shard(tmp_path / "x", entries)

    start = time.perf_counter()
    with pytest.raises(HeaderError) as raised:
        read_header(path)

    assert time.perf_counter() - start < 2
    assert len(str(raised.value)) < 1000


def test_a_name_of_several_lines_makes_a_message_of_one(tmp_path: Path) -> None:
    path = raw_shard(tmp_path / "x", json.dumps({"two\nlines": 1}).encode())

    with pytest.raises(HeaderError, match=r"'two\\nlines'"):
        read_header(path)
