"""Calibration text: what is a record, and how it is cut into samples."""

import hashlib
import json
import os
from codecs import BOM_UTF8
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.calibrate.checkpoints import make
from w8a8.errors import SourceNotFoundError, UnreadableError, UsageError
from w8a8.texts.samples import BUILT_IN, CalibrationText, cut, load

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(make(tmp_path_factory.mktemp("tokenizer") / "llama"))


def test_a_plain_file_is_one_record(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("In the valley\nthe harvest")
    text = load(str(path))
    assert text.records == ("In the valley\nthe harvest",)
    assert (text.name, text.sha256) == ("book.txt", hashlib.sha256(path.read_bytes()).hexdigest())


def test_jsonl_has_texts_questions_and_chats(tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"question": "1 + 1?", "answer": "2"}, {"messages": CHAT}]
    (tmp_path / "mix.jsonl").write_text("\n".join(map(json.dumps, rows)))
    question = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    assert load(str(tmp_path / "mix.jsonl")).records == ("a", question, CHAT)


@pytest.mark.parametrize(
    "line",
    ["{", '["text"]', '{"text": 3}', '{"messages": []}', '{"messages": [{"role": "user"}]}', '{"question": "?"}'],
)
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n' + line)
    with pytest.raises(UsageError, match="line 2: n"):
        load(str(tmp_path / "t.jsonl"))


def test_what_is_neither_file_nor_data_set_is_not_found(tmp_path: Path) -> None:
    for name in ("nothing", "nothing.txt", "some/nothing.jsonl", str(tmp_path / "no")):
        with pytest.raises(SourceNotFoundError):
            load(name)


def test_the_built_in_text_is_varied_and_names_itself(tokenizer: Any) -> None:
    text = load(None)
    assert text.name == BUILT_IN
    assert {type(record) for record in text.records} == {str, list}
    assert len(cut(text, tokenizer, samples=64, tokens=256)) == 64


@given(samples=st.integers(2, 12), tokens=st.integers(4, 40), length=st.integers(0, 400))
def test_samples_have_one_length_and_come_from_all_over_the_text(
    tokenizer: Any, samples: int, tokens: int, length: int
) -> None:
    text = CalibrationText("t", ("".join(chr(97 + i % 26) for i in range(length)),), "")
    whole = tuple(tokenizer(text.records[0])["input_ids"])
    if len(whole) < 2 * tokens:
        with pytest.raises(UsageError, match="too few"):
            cut(text, tokenizer, samples=samples, tokens=tokens)
        return
    found = cut(text, tokenizer, samples=samples, tokens=tokens)
    assert len(found) == min(samples, len(whole) // tokens)
    assert all(len(sample) == tokens and sample[0] == 0 and 0 not in sample[1:] for sample in found)
    assert found[0] == whole[:tokens]
    assert found[-1][1:] == whole[-tokens:-1]


def test_a_chat_takes_the_form_of_the_models_template(tokenizer: Any) -> None:
    text = CalibrationText("chat", (CHAT,) * 9, "")
    assert spoken(text, tokenizer) == "<s>Hi\nHoHi\nHoHi\nHo"
    tokenizer.chat_template = "<s>{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
    try:
        assert spoken(text, tokenizer) == "<s>u:Hi;a:Ho;<s>u:Hi"
        tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(UsageError, match="chat of user, assistant: roles must alternate"):
            spoken(text, tokenizer)
    finally:
        tokenizer.chat_template = None


def spoken(text: CalibrationText, tokenizer: Any) -> str:
    """The beginning of the first sample, as text."""
    decoded: str = tokenizer.decode(cut(text, tokenizer, samples=2, tokens=16)[0])
    return decoded


@pytest.mark.parametrize("name", ["text.txt", "text.jsonl"])
def test_what_is_no_file_of_text_is_refused_at_once(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    os.mkfifo(path)
    with pytest.raises(UnreadableError, match="not a regular file"):
        load(str(path))
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(UnreadableError, match="not a regular file"):
        load(str(path))
    path.unlink()
    path.symlink_to(name)
    with pytest.raises(UnreadableError, match="symbolic links"):
        load(str(path))


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(BOM_UTF8 + b'{"text": "one"}\n')
    (tmp_path / "a.txt").write_bytes(BOM_UTF8 + b"one")

    assert load(str(tmp_path / "a.jsonl")).records == load(str(tmp_path / "a.txt")).records == ("one",)


def test_a_name_too_long_for_a_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises((UnreadableError, SourceNotFoundError)):
        load("x" * 5000)
    with pytest.raises((UnreadableError, SourceNotFoundError)):
        load(str(tmp_path / ("x" * 5000 + ".txt")))
