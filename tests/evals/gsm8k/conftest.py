"""The data set of these tests, and a place for the result."""

from pathlib import Path

import pytest

from tests.evals.api import write_data
from tests.evals.gsm8k.runs import QUESTIONS


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data", QUESTIONS)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "results" / "adder.json"
