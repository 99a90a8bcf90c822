import os
from pathlib import Path

import pytest
from hypothesis import settings

from tests.checkpoints import llama_tensors, write_checkpoint

pytest_plugins = ["tests.interpreter", "tests.models"]

settings.register_profile("w8a8", deadline=None)  # the first call of a kernel compiles it
settings.load_profile("w8a8")


@pytest.fixture
def golden() -> Path:
    """The small checkpoint with hard rows, and what other tools wrote for it."""
    return Path(__file__).parent / "golden"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A small random Llama in two BF16 shards."""
    return write_checkpoint(tmp_path / "llama", llama_tensors(), shards=2)


MARKS = {
    "vllm_python": "engine",
    **dict.fromkeys(("gemma3", "gemma3_formats", "gemma3_w8a8", "gemma4", "gemma4_w8a8"), "model"),
}
"""Fixture -> the marker of every test that uses it."""


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark a test by what it stands on, so that `make check` can leave out engines and real models."""
    for fixture in getattr(item, "fixturenames", ()):
        if fixture in MARKS:
            item.add_marker(MARKS[fixture])


LONGEST = (
    "tests/engines/test_calibrated.py",
    "tests/execute/test_staging.py",
    "tests/engines/test_engines.py",
    "tests/cluster/test_spread.py",
    "tests/execute/test_resume.py",
    "tests/engines/test_plugin.py",
    "tests/engines/test_architectures.py",
    "tests/bench/test_quantize.py",
    "tests/evals/kld/test_run.py",
    "tests/publish/card/test_contents.py",
    "tests/calibrate/test_run.py",
    "tests/engines/test_arithmetic.py",
    "tests/engines/test_lm_eval.py",
    "tests/real/test_gemma3.py",
    "tests/kernels/cpu/test_instructions.py",
    "tests/test_example.py",
    "tests/test_kills.py",
    "tests/bench/test_quality.py",
    "tests/bench/test_stream.py",
    "tests/runtime/test_loading.py",
    "tests/serve/embedded/test_server.py",
    "tests/serve/embedded/test_batching.py",
    "tests/recipes/test_other_architectures.py",
)
"""The files that take a minute or more. They begin first, so that at the end no process works on one alone."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Bring the longest files to the front, in this order."""
    places = {config.rootpath / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Where skipping is not allowed (in CI), a skipped test fails the run."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("W8A8_NO_SKIPS") and reporter is not None and reporter.stats.get("skipped") and exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
