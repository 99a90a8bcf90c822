"""Small mixtures of experts, made once per test session; tests must not write to them."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.runtime.moe import make, quantize

Mixtures = Callable[[str], tuple[Path, Path]]
"""Family -> the source and its result in compressed-tensors."""


@pytest.fixture(scope="session")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> Mixtures:
    """Make what is asked for, the first time."""

    @cache
    def made(family: str) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp("mixtures")
        source = make(folder / family, family)
        return source, quantize(source, folder / f"{family}-W8A8")

    return made
