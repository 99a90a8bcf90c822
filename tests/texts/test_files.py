"""JSONL, as all texts are read."""

import pytest

from w8a8.errors import UsageError
from w8a8.texts.files import rows, strings


def test_every_value_has_its_place_and_empty_lines_hold_none() -> None:
    assert list(rows('{"text": "a\u2028b"}\r\n\n  \n3\n', "t.jsonl")) == [
        ("t.jsonl, line 1", {"text": "a\u2028b"}),
        ("t.jsonl, line 4", 3),
    ]
    assert list(rows("", "t.jsonl")) == []


@pytest.mark.parametrize("line", ["{", "nothing", "[" * 100_000])
def test_a_line_that_is_not_json_is_named(line: str) -> None:
    with pytest.raises(UsageError, match=r"^t\.jsonl, line 3: not JSON"):
        list(rows(f"1\n\n{line}\n", "t.jsonl"))


def test_a_record_has_all_of_its_strings_or_none() -> None:
    row = {"question": "?", "answer": "!", "number": 3}
    assert strings(row, "question", "answer") == ["?", "!"]
    assert strings(row, "question", "number") is None
    assert strings(row, "question", "more") is None
    assert strings(["question"], "question") is None
