"""The questions, read from a folder or from the Hub."""

from pathlib import Path

import pytest

from tests.evals.gsm8k.runs import QUESTIONS
from w8a8.errors import HubError, UsageError
from w8a8.evals.gsm8k.questions import load


@pytest.mark.parametrize(
    "row", ["nothing", "[1]", '{"question": "How many?"}', '{"question": "How many?", "answer": "3"}']
)
def test_a_line_that_is_no_question_is_named(row: str, data: Path) -> None:
    with (data / "test.jsonl").open("a") as file:
        file.write(f"{row}\n")
    with pytest.raises(UsageError, match=rf"test\.jsonl, line {QUESTIONS + 1}"):
        load(data, shots=8)


def test_folders_without_the_data_and_too_many_shots_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"train\.jsonl"):
        load(tmp_path, shots=8)
    with pytest.raises(UsageError, match="has 9 examples"):
        load(data, shots=10)


def test_without_a_folder_the_hub_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(HubError, match=r"openai/gsm8k: .* --data FOLDER"):
        load(None, shots=8)
