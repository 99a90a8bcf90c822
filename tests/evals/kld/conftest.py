"""Two small models to compare."""

from pathlib import Path

import pytest

from tests.evals.kld.llamas import make_llama
from w8a8.evals.kld.models import Predictor


@pytest.fixture(scope="package")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two Llamas that think differently."""
    folder = tmp_path_factory.mktemp("llamas")
    return make_llama(folder / "one", seed=1), make_llama(folder / "two", seed=2)


@pytest.fixture(scope="package")
def predictors(pair: tuple[Path, Path]) -> tuple[Predictor, Predictor]:
    return Predictor("one", pair[0]), Predictor("two", pair[1])
