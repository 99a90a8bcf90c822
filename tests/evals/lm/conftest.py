"""A small W8A8 model, served by the embedded engine in this process, and tasks to ask it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import w8a8
from tests.evals.lm.local import make_model, write_tasks
from w8a8.checkpoint import Checkpoint
from w8a8.evals.asking import Server
from w8a8.serve.embedded.server import running


@pytest.fixture(scope="package")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm")
    w8a8.quantize(make_model(folder / "model"), folder / "model-W8A8")
    return folder / "model-W8A8"


@pytest.fixture(scope="package")
def server(checkpoint: Path) -> Iterator[Server]:
    with running(str(checkpoint), checkpoint, headers=Checkpoint.open(checkpoint), api_key="sesame") as url:
        yield Server(url, "sesame")


@pytest.fixture(scope="package")
def include(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks") / "tasks")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets"))
