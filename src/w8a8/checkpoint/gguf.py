"""One GGUF file's header: read, checked rule by rule, turned into `TensorSpec`s; and written again without its data.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) is, in little-endian numbers: `GGUF`, a version,
the number of tensors and of fields, the fields (a key, a type, a value), a line for each tensor (name, sizes from the
innermost outwards, ggml type, offset), and the tensors, each from a multiple of the alignment on. A header is an
attacker's text until these hold: everything it counts fits in the file, and within the bounds below; names are there
once; types are known; rows are whole blocks; tensors tile the data but for padding, and end where the file does.
"""

import io
import math
import os
import struct
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from w8a8.checkpoint.header import TensorSpec
from w8a8.errors import (
    DuplicateTensorError,
    HeaderError,
    HeaderTooLargeError,
    OffsetsError,
    TensorSizeError,
    TruncatedShardError,
)
from w8a8.reading import UnfitError, open_file, reading, show

MAGIC = b"GGUF"
VERSIONS = (2, 3)
"""Version 1 counted in 32 bits; no file of it is left. 2 and 3 differ in nothing that a little-endian file shows."""

MAX_HEADER_BYTES = 100_000_000
"""Vocabularies make the largest headers: Gemma's 262,144 tokens and their scores take 8 MB, with merges 15 MB."""

MAX_FIELDS = 4096
MAX_TENSORS = 200_000
MAX_KEY = 1024
MAX_TOKEN = 1024
"""Bytes of a text in a list. Rebuilding a tokenizer's merges takes the square of a token's length."""

MAX_LIST = 1_000_000
MAX_KEPT = 65_536
"""Numbers of a list that are kept: what a config needs has one a layer."""

MAX_DIMENSIONS = 4

TEXT, LIST = 8, 9
NUMBERS: Mapping[int, str] = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
"""Type of a value -> its format in `struct`."""


class GgmlType(NamedTuple):
    """A dtype of ggml: its name, elements of a block, bytes of a block."""

    name: str
    elements: int
    nbytes: int


GGML_TYPES: Mapping[int, GgmlType] = {
    number: GgmlType(*values)
    for number, values in {
        0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
        7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
        12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
        16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
        20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
        24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
        29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
        39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
    }.items()
}  # fmt: skip
"""`enum ggml_type` of ggml.h -> what it is; numbers that are missing were dtypes once."""

Value = int | float | bool | str | tuple[int | float | bool, ...]


@dataclass(frozen=True, slots=True)
class Field:
    """A field of the header, which lies in the file from byte `begin` to byte `end`.

    `value` is a number, a text, or a list's numbers; of a list of texts, or a long one, it is the number of entries.
    """

    key: str
    value: Value
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """A checked header: its fields by key, and its tensors in file order.

    A tensor's `dtype` is ggml's name for it, its `shape` has the outermost size first, as safetensors has it.
    """

    fields: Mapping[str, Field]
    tensors: tuple[TensorSpec, ...]
    file_size: int

    def text(self, key: str) -> str:
        """A field's text; empty where there is none."""
        value = self.fields[key].value if key in self.fields else ""
        return value if isinstance(value, str) else ""

    def number(self, key: str) -> int | None:
        """A field's whole number; None where there is none."""
        value = self.fields[key].value if key in self.fields else None
        return value if isinstance(value, int) else None


def read_gguf(path: Path, shard: str | None = None) -> GgufHeader:
    """Read and check the header of the GGUF file at `path`; `shard` is the name it goes by.

    Raises `HeaderError`, `HeaderTooLargeError`, `DuplicateTensorError`, `TensorSizeError`, `OffsetsError`,
    `TruncatedShardError` or `UnreadableError`.
    """
    with reading(path), io.BufferedReader(_open(path), 1 << 16) as file:
        cursor = _Cursor(file, os.fstat(file.fileno()).st_size, path)
        tensors, fields = _counts(cursor)
        found: dict[str, Field] = {}
        for _ in range(fields):
            field = _field(cursor)
            if found.setdefault(field.key, field) is not field:
                raise HeaderError(f"{path}: the header has the field {show(field.key)} twice")
        lines = [_line(cursor) for _ in range(tensors)]
    header = GgufHeader(found, (), cursor.size)
    alignment = _alignment(header, path)
    start = -(-cursor.position // alignment) * alignment
    specs = sorted((_spec(line, shard or path.name, start, path) for line in lines), key=lambda spec: spec.offset)
    _check_names(specs, path)
    _check_tiling(specs, start, alignment, cursor.size, path)
    return GgufHeader(found, tuple(specs), cursor.size)


def write_outline(source: Path, header: GgufHeader, target: Path, without: Container[str] = ()) -> None:
    """Write a GGUF file with the fields of `source`, whose header is `header`, and tensors of one element each.

    What reads only fields and the tensors' names sees the same model in it, and no weight can be read by mistake.
    `without` are keys of fields to leave out.
    """
    names = [tensor.name for tensor in header.tensors]
    kept = [field for key, field in header.fields.items() if key != "general.alignment" and key not in without]
    with reading(source), open_file(source) as file, target.open("wb") as out:
        out.write(MAGIC + struct.pack("<IQQ", VERSIONS[-1], len(names), len(kept)))
        for field in kept:
            file.seek(field.begin)
            out.write(file.read(field.end - field.begin))
        for number, name in enumerate(names):
            out.write(_text(name) + struct.pack("<IQIQ", 1, 1, 0, 32 * number))
        out.write(bytes(-out.tell() % 32 + 32 * len(names)))


def _open(path: Path) -> io.FileIO:
    try:
        return open_file(path)
    except UnfitError as error:
        raise HeaderError(f"{path}: no GGUF, but {error}") from error


class _Cursor:
    """Reads a header from front to back, never beyond the file or the largest header."""

    def __init__(self, file: IO[bytes], size: int, path: Path) -> None:
        self.file, self.size, self.path = file, size, path
        self.position = 0

    def claim(self, nbytes: int, what: str) -> None:
        """Raise unless that many bytes may still be read."""
        if self.position + nbytes > self.size:
            raise TruncatedShardError(
                f"{self.path}: the file ends at byte {self.size:,}, in the middle of {what}; download it again"
            )
        if self.position + nbytes > MAX_HEADER_BYTES:
            raise HeaderTooLargeError(
                f"{self.path}: the header has more than {MAX_HEADER_BYTES:,} bytes, at {what}; the file is damaged"
            )

    def bytes(self, count: int, what: str) -> bytes:
        self.claim(count, what)
        data = self.file.read(count)
        if len(data) < count:
            raise TruncatedShardError(f"{self.path}: became shorter while it was read; run the same command again")
        self.position += count
        return data

    def numbers(self, form: str, what: str) -> tuple[int, ...]:
        return struct.unpack("<" + form, self.bytes(struct.calcsize("<" + form), what))

    def string(self, limit: int, what: str) -> str:
        (length,) = self.numbers("Q", what)
        if length > limit:
            self.claim(length, what)
            raise HeaderError(f"{self.path}: {what} has {length:,} bytes, more than {limit:,}; the file is damaged")
        try:
            return self.bytes(length, what).decode()
        except UnicodeDecodeError as error:
            raise HeaderError(f"{self.path}: {what} is not UTF-8; the file is damaged") from error


def _counts(cursor: _Cursor) -> tuple[int, int]:
    """The numbers of tensors and of fields."""
    path = cursor.path
    if cursor.size < 24 or cursor.bytes(4, "the magic number") != MAGIC:
        raise HeaderError(f"{path}: no GGUF: it does not begin with {MAGIC.decode()}; download it again")
    version, tensors, fields = cursor.numbers("IQQ", "the counts")
    if version not in VERSIONS:
        what = "for big-endian machines" if version & 0xFFFF == 0 else f"of version {version}"
        raise HeaderError(
            f"{path}: a GGUF {what}; only versions {VERSIONS[0]} and {VERSIONS[1]}, little-endian, are read"
        )
    for count, limit, name, least in ((tensors, MAX_TENSORS, "tensors", 24), (fields, MAX_FIELDS, "fields", 13)):
        if count > limit:
            raise HeaderTooLargeError(f"{path}: the header claims {count:,} {name}, more than {limit:,}")
        cursor.claim(count * least, f"{count:,} {name}")
    return tensors, fields


def _field(cursor: _Cursor) -> Field:
    begin = cursor.position
    key = cursor.string(MAX_KEY, "a field's key")
    what = f"the field {show(key)}"
    (kind,) = cursor.numbers("I", what)
    value = _list(cursor, what) if kind == LIST else _value(cursor, kind, what)
    return Field(key, value, begin, cursor.position)


def _value(cursor: _Cursor, kind: int, what: str) -> Value:
    if kind == TEXT:
        return cursor.string(MAX_HEADER_BYTES, what)
    if kind not in NUMBERS:
        raise HeaderError(f"{cursor.path}: {what} has a value of type {kind}, which GGUF does not know")
    return cursor.numbers(NUMBERS[kind], what)[0]


def _list(cursor: _Cursor, what: str) -> Value:
    kind, count = cursor.numbers("IQ", what)
    if kind != TEXT and kind not in NUMBERS:
        raise HeaderError(f"{cursor.path}: {what} is a list of type {kind}; lists hold numbers or texts")
    if count > MAX_LIST:
        raise HeaderTooLargeError(f"{cursor.path}: {what} claims {count:,} entries, more than {MAX_LIST:,}")
    if kind == TEXT:
        cursor.claim(8 * count, what)
        for _ in range(count):
            cursor.string(MAX_TOKEN, f"an entry of {what}")
        return count
    form = f"{count}{NUMBERS[kind]}"
    if count <= MAX_KEPT:
        return cursor.numbers(form, what)
    cursor.bytes(struct.calcsize("<" + form), what)
    return count


class _Line(NamedTuple):
    name: str
    sizes: tuple[int, ...]
    kind: int
    offset: int


def _line(cursor: _Cursor) -> _Line:
    name = cursor.string(MAX_KEY, "a tensor's name")
    what = f"tensor {show(name)}"
    (dimensions,) = cursor.numbers("I", what)
    if dimensions > MAX_DIMENSIONS:
        raise HeaderError(f"{cursor.path}: {what} has {dimensions} dimensions, more than {MAX_DIMENSIONS}")
    sizes = cursor.numbers(f"{dimensions}Q", what)
    kind, offset = cursor.numbers("IQ", what)
    return _Line(name, sizes, kind, offset)


def _alignment(header: GgufHeader, path: Path) -> int:
    alignment = header.number("general.alignment") if "general.alignment" in header.fields else 32
    if not alignment or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise HeaderError(f"{path}: general.alignment is no power of two from 8 on; the file is damaged")
    return alignment


def _spec(line: _Line, shard: str, start: int, path: Path) -> TensorSpec:
    where = f"{path}: tensor {show(line.name)}"
    known = GGML_TYPES.get(line.kind)
    if known is None:
        raise HeaderError(f"{where} has ggml type {line.kind}, which this version does not know")
    shape = tuple(reversed(line.sizes))
    if not all(shape) or math.prod(shape) >= 2**53:  # four factors: no long multiplication
        raise TensorSizeError(f"{where}: sizes {show(list(shape))} are none, or larger than any file")
    if (shape[-1] if shape else 1) % known.elements:
        raise TensorSizeError(f"{where}: rows of {shape[-1]:,} are no whole blocks of {known.elements} ({known.name})")
    if line.offset >= 2**53:
        raise OffsetsError(f"{where} begins at byte {line.offset:,} of the data, beyond any file")
    nbytes = math.prod(shape) // known.elements * known.nbytes
    return TensorSpec(line.name, known.name, shape, shard, start + line.offset, nbytes)


def _check_names(specs: list[TensorSpec], path: Path) -> None:
    seen: set[str] = set()
    for spec in specs:
        if spec.name in seen:
            raise DuplicateTensorError(f"{path}: the header names {show(spec.name)} twice")
        seen.add(spec.name)


def _check_tiling(specs: list[TensorSpec], start: int, alignment: int, size: int, path: Path) -> None:
    position = start
    for spec in specs:
        if spec.offset != position:
            problem = "overlaps the tensor before it" if spec.offset < position else "leaves a hole before it"
            raise OffsetsError(f"{path}: tensor {show(spec.name)} {problem} (byte {spec.offset:,}, not {position:,})")
        end = spec.offset + spec.nbytes
        position = -(-end // alignment) * alignment
        if end > size:
            raise TruncatedShardError(
                f"{path}: {size:,} bytes long, but tensor {show(spec.name)} ends at byte {end:,}; "
                "the file is truncated, download it again"
            )
    if size > position:
        raise OffsetsError(f"{path}: {size - position:,} bytes after the last tensor belong to none")


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
