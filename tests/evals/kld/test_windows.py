"""The text: where it comes from, and the windows it is cut into."""

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.evals.kld.llamas import make_llama
from w8a8.errors import SourceNotFoundError, UnreadableError, UsageError
from w8a8.evals.kld.run import prepare
from w8a8.evals.kld.windows import choose, cut
from w8a8.texts.files import Text


@given(
    documents=st.lists(st.lists(st.integers(1, 9), max_size=30), min_size=1, max_size=5),
    bos=st.sampled_from([None, 0]),
    context=st.integers(2, 12),
    tokens=st.integers(1, 100),
)
def test_windows_predict_every_token_once_from_what_lies_before_it(
    documents: list[list[int]], bos: int | None, context: int, tokens: int
) -> None:
    wanted = [(n, token) for n, ids in enumerate(documents) for token in (ids if bos == 0 else ids[1:])][:tokens]
    if not wanted:
        with pytest.raises(UsageError, match="no token"):
            cut(documents, bos, context, tokens)
        return
    found = cut(documents, bos, context, tokens)
    assert [(window.document, token) for window in found for token in window.ids[1:]] == wanted
    assert all(2 <= len(window.ids) <= context for window in found)
    if bos is None:
        assert all(contains(documents[window.document], window.ids) for window in found)
    else:
        assert all(window.ids[0] == bos for window in found)


def contains(whole: list[int], part: tuple[int, ...]) -> bool:
    return any(tuple(whole[i : i + len(part)]) == part for i in range(len(whole)))


def test_a_tokenizer_without_a_beginning_of_sequence_loses_the_first_token_alone(tmp_path: Path) -> None:
    plain = make_llama(tmp_path / "plain", bos=False)
    job = prepare(plain, plain, Text("t", ("abcabc",)), context=4)
    assert [len(window.ids) for window in job.windows] == [4, 3]
    assert job.windows[0].ids[-1] == job.windows[1].ids[0]
    assert job.tokens == 5


def test_a_plain_file_is_one_document_with_its_own_checksum(tmp_path: Path) -> None:
    data = "one\r\ntwo ñ\n".encode()
    (tmp_path / "t.txt").write_bytes(data)
    text = choose(text=tmp_path / "t.txt")
    assert text.documents == ("one\r\ntwo ñ\n",)
    assert text.sha256 == hashlib.sha256(data).hexdigest()


def test_jsonl_has_a_document_per_line(tmp_path: Path) -> None:
    rows = [{"text": "a\u2028b"}, {"question": "1 + 1?", "answer": "#### 2"}]
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "test.jsonl").write_text(lines)
    assert choose(jsonl=tmp_path / "test.jsonl").documents == ("a\u2028b", "1 + 1?\n#### 2")


def test_gsm8k_has_a_document_per_question_of_its_test_split(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": "#### 2"}))
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "How many legs have two hens? ", "answer": "#### 4"}))
    assert choose(data=tmp_path) == Text("GSM8K test", ("How many legs have two hens?\n#### 4",))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": 3}', "line 2: neither"),
        ('["text"]', "line 2: neither"),
        ('{"question": "?"}', "line 2: neither"),
        ("{", "line 2: not JSON"),
        ("[" * 100_000, "line 2: not JSON"),
    ],
)
def test_a_line_that_is_no_document_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n' + line)
    with pytest.raises(UsageError, match=message):
        choose(jsonl=tmp_path / "t.jsonl")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"\xe9t\xe9")
    with pytest.raises(UsageError, match="not UTF-8"):
        choose(text=tmp_path / "latin")
    with pytest.raises(SourceNotFoundError, match="nothing"):
        choose(text=tmp_path / "nothing")
    with pytest.raises(UnreadableError, match="directory"):
        choose(text=tmp_path)
    with pytest.raises(UsageError, match="one of"):
        choose(text=tmp_path / "latin", jsonl=tmp_path / "latin")
