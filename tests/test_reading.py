"""The guarded reader: what no file may do, whoever wrote it."""

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from w8a8.errors import UnreadableError
from w8a8.reading import MAX_JSON_VALUES, UnfitError, convert, open_file, parse_json, read_bytes, read_json, reading


@dataclass(frozen=True)
class Point:
    x: int
    y: float | None = None


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


NO_FILES: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "endless zeros": lambda path: path.symlink_to("/dev/zero"),
    "a terminal": lambda path: path.symlink_to("/dev/null"),
    "a folder": Path.mkdir,
    "a socket": _socket,
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("make", NO_FILES.values(), ids=NO_FILES)
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, make: Callable[[Path], object]) -> None:
    path = tmp_path / "x"
    make(path)

    with pytest.raises(UnreadableError, match="x: cannot be read"), reading(path):
        open_file(path)
    with pytest.raises((UnfitError, UnreadableError)):
        read_json(path, dict[str, Any])


def test_a_file_is_read_whole_up_to_its_limit(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")

    assert read_bytes(tmp_path / "x", 5) == b"12345"
    with pytest.raises(UnfitError, match="larger than 4 bytes"):
        read_bytes(tmp_path / "x", 4)


def test_a_sparse_file_of_terabytes_is_refused_by_its_size(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:
        file.truncate(2**42)

    with pytest.raises(UnfitError, match="larger than"):
        read_json(tmp_path / "x", dict[str, Any])


def test_what_has_no_end_is_not_read_on(tmp_path: Path) -> None:
    with pytest.raises(UnfitError, match="grew"):
        read_bytes(Path("/proc/self/status"), 100)  # its size is said to be zero


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b'\xef\xbb\xbf{"x": 1}', {"x": 1}),
        (b"[NaN, 1e999]", None),
        (b"9" * 4000, int("9" * 4000)),
        (b'"\\ud83d\\ude00"', "😀"),
        (b"[" * 100 + b"]" * 100, None),
    ],
)
def test_json_that_python_reads_is_read(text: bytes, value: Any) -> None:
    assert parse_json(text) == value or value is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "Expecting value"),
        (b"{'x': 1}", "property name"),
        (b'"\xff"', "utf-8"),
        (b'{"a": "\\ud800"}', "surrogates"),
        (b'{"\\udc00": 1}', "surrogates"),
        ('{"a": 1}'.encode("utf-16"), "utf-8"),
        (b"[" * 102 + b"]" * 102, "nested too deeply"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"9" * 5000, "4300 digits"),
        (b"[" + b"0," * MAX_JSON_VALUES + b"0]", "more than 1,000,000 values"),
        (b'"' + b"\\u0041" * 5_000_000 + b'"', "30,000,002 bytes"),
    ],
)
def test_json_that_no_one_should_read_is_refused(text: bytes, reason: str) -> None:
    with pytest.raises(UnfitError, match=reason):
        parse_json(text)


def test_a_schema_makes_values_of_one_type_and_names_what_does_not_fit(tmp_path: Path) -> None:
    (tmp_path / "x").write_text('{"x": 1, "y": 2, "else": []}')

    assert read_json(tmp_path / "x", Point) == Point(1, 2.0)
    with pytest.raises(UnfitError, match=r"`int`.*\$\.x"):
        convert({"x": "1"}, Point)
    with pytest.raises(UnfitError, match="missing required field `x`"):
        convert({}, Point)
    with pytest.raises(UnfitError):
        convert({"x": 1, "y": 10**400}, Point)


def test_a_list_where_an_object_should_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("[]")

    with pytest.raises(UnfitError, match="not a JSON object"):
        read_json(tmp_path / "x", dict[str, Any])
