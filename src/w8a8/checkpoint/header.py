"""One safetensors file's header: read, checked rule by rule, turned into `TensorSpec`s; and written.

The format (https://github.com/huggingface/safetensors#format) is eight bytes of little-endian length N, N bytes of
JSON, then the data. A header is an attacker's text until these hold, and each has its own error because each has its
own cause: N fits in the file and under the format's cap; the JSON is an object without repeated keys; every dtype is
known; shape times dtype is the byte range; the ranges tile the data exactly, without overlap or hole; the file is as
long as they say. The safetensors library checks the file again before the result is used.
"""

import io
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open

from w8a8.errors import (
    DuplicateTensorError,
    HeaderError,
    HeaderTooLargeError,
    OffsetsError,
    TensorSizeError,
    TruncatedShardError,
)
from w8a8.reading import UnfitError, open_file, parse_json, reading, show

MAX_HEADER_BYTES = 100_000_000
"""The safetensors library's own cap."""

MAX_HEADER_VALUES = 2_000_000
"""A tensor takes a dozen; the largest models published have 200,000 tensors, in sixty files and more."""

MAX_METADATA = 10_000_000
"""Characters of `__metadata__`; files that transformers writes have a dozen."""

DTYPE_BYTES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
"""Bytes per element of every dtype of the format that fills whole bytes."""

DTYPE_BITS: Mapping[str, int] = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6} | {
    dtype: 8 * nbytes for dtype, nbytes in DTYPE_BYTES.items()
}
"""Bits per element of every dtype of the format."""


class Shaped(Protocol):
    """What a stored and a logical tensor have in common: a name, a safetensors dtype and a shape."""

    @property
    def name(self) -> str:
        """The tensor's name."""

    @property
    def dtype(self) -> str:
        """Its safetensors dtype."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """The place of one tensor: `nbytes` bytes from byte `offset` of the file named `shard`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements (1 for a scalar)."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header: its tensors in file order, and where the data starts."""

    tensors: tuple[TensorSpec, ...]
    metadata: Mapping[str, str]
    data_start: int
    file_size: int


def read_header(path: Path, shard: str | None = None) -> Header:
    """Read and check the header of the safetensors file at `path`; `shard` is the name it goes by.

    Raises `HeaderTooLargeError`, `HeaderError`, `DuplicateTensorError`, `TensorSizeError`, `OffsetsError`,
    `TruncatedShardError` or `UnreadableError`.
    """
    shard = shard or path.name
    with reading(path), io.BufferedReader(_open(path)) as file:
        size = os.fstat(file.fileno()).st_size
        length = _header_length(file.read(8), size, path)
        raw = file.read(length)
    entries = _parse(raw, path)
    del raw
    metadata = _metadata(entries.pop("__metadata__", None), path)
    data_start = 8 + length
    tensors = sorted((_tensor(name, entry, shard, data_start, path) for name, entry in entries.items()), key=_by_offset)
    _check_tiling(tensors, data_start, size, path)
    _ask_the_library(path)
    return Header(tuple(tensors), metadata, data_start, size)


def write_header(tensors: Iterable[tuple[str, str, tuple[int, ...], int, int]], metadata: Mapping[str, str]) -> bytes:
    """Encode a header for `(name, dtype, shape, begin, end)` rows, padded with spaces so that data start 8-aligned."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    for name, dtype, shape, begin, end in tensors:
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _open(path: Path) -> io.FileIO:
    try:
        return open_file(path)
    except UnfitError as error:
        raise HeaderError(f"{path}: no safetensors, but {error}") from error


def _by_offset(tensor: TensorSpec) -> tuple[int, int]:
    return tensor.offset, tensor.nbytes


def _header_length(prefix: bytes, file_size: int, path: Path) -> int:
    if len(prefix) < 8:
        raise TruncatedShardError(f"{path}: {file_size} bytes are too few for a safetensors file; download it again")
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER_BYTES:
        raise HeaderTooLargeError(
            f"{path}: the header claims {length:,} bytes, more than the format's {MAX_HEADER_BYTES:,}; "
            "this is not a safetensors file, or it is damaged"
        )
    if 8 + length > file_size:
        raise HeaderTooLargeError(
            f"{path}: the header claims {length:,} bytes, the whole file has {file_size:,}; download it again"
        )
    return int(length)


def _parse(raw: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise DuplicateTensorError(f"{path}: the header names {show(repeated)} twice")
        return result

    try:
        entries = parse_json(raw, values=MAX_HEADER_VALUES, pairs=unique)
    except UnfitError as error:
        raise HeaderError(f"{path}: the header is not JSON that can be read ({error}); the file is damaged") from error
    if not isinstance(entries, dict):
        raise HeaderError(f"{path}: the header is JSON, but not an object; the file is damaged")
    return entries


def _metadata(value: Any, path: Path) -> dict[str, str]:
    if value is None:  # the library takes a null for none
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise HeaderError(f"{path}: __metadata__ must map strings to strings")
    if (length := sum(map(len, (*value, *value.values())))) > MAX_METADATA:
        raise HeaderError(f"{path}: __metadata__ holds {length:,} characters, more than {MAX_METADATA:,}")
    return value


def _tensor(name: str, entry: Any, shard: str, data_start: int, path: Path) -> TensorSpec:
    where = f"{path}: tensor {show(name)}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise HeaderError(f"{where} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise HeaderError(f"{where} has dtype {show(dtype)}, which this version does not know")
    if not isinstance(shape, list) or not all(_is_size(n) for n in shape):
        raise HeaderError(f"{where} has shape {show(shape)}, which is not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(n) for n in offsets):
        raise OffsetsError(f"{where} has data_offsets {show(offsets)}, which are not two positions")
    begin, end = offsets
    if end < begin:
        raise OffsetsError(f"{where} ends at byte {end:,}, before it begins at {begin:,}")
    expected = _nbytes(shape, dtype)
    if expected is None:
        raise TensorSizeError(f"{where}: {dtype} {show(shape)} is larger than any file")
    if end - begin != expected:
        raise TensorSizeError(
            f"{where}: {dtype} {show(shape)} needs {expected:,} bytes, its offsets give {end - begin:,}"
        )
    return TensorSpec(name, dtype, tuple(shape), shard, data_start + begin, end - begin)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _nbytes(shape: list[int], dtype: str) -> int | None:
    """Count a tensor's bytes; None once 64 bits do not hold them: a million dimensions would multiply for hours."""
    nbits = DTYPE_BITS[dtype]
    for size in shape:
        nbits *= size
        if nbits >= 2**66:
            return None
    return -(-nbits // 8)


def _check_tiling(tensors: list[TensorSpec], data_start: int, file_size: int, path: Path) -> None:
    position = data_start
    for tensor in tensors:
        if tensor.offset != position:
            problem = "overlaps the tensor before it" if tensor.offset < position else "leaves a hole before it"
            raise OffsetsError(
                f"{path}: tensor {show(tensor.name)} {problem} (byte {tensor.offset:,}, not {position:,})"
            )
        position += tensor.nbytes
    if position > file_size:
        raise TruncatedShardError(
            f"{path}: {file_size:,} bytes long, but its tensors end at byte {position:,}; "
            "the file is truncated, download it again"
        )
    if position < file_size:
        raise OffsetsError(f"{path}: {file_size - position:,} bytes after the last tensor belong to none")


def _ask_the_library(path: Path) -> None:
    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise HeaderError(f"{path}: the safetensors library refuses it: {error}") from error
