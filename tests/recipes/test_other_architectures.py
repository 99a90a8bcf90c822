"""Recipes on models of other architectures than Gemma's, trained here and given outliers by scripts/train_small.py.

They are smaller than the script's own, and trained for seconds on the few examples of GSM8K that lie beside it.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest
from train_small import KINDS, Size, provoke_outliers, read, train, train_tokenizer

import w8a8
from w8a8.evals.kld import run as kld
from w8a8.evals.kld.windows import choose
from w8a8.quantization import Options

pytestmark = pytest.mark.slow

GSM8K = Path(__file__).parents[2] / "scripts" / "gsm8k"
SIZE = Size(hidden=128, layers=3, vocabulary=512)
STEPS = 40
TOKENS = 1024


@dataclass(frozen=True)
class Trained:
    """A model as training left it, and with outlier channels."""

    plain: Path
    loud: Path


@pytest.fixture(scope="module", params=KINDS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder, texts = tmp_path_factory.mktemp(request.param), read(GSM8K)
    made = Trained(folder / "plain", folder / "loud")
    tokenizer = train_tokenizer(texts, SIZE.vocabulary)
    model = train(request.param, SIZE, tokenizer, texts, STEPS)
    model.save_pretrained(made.plain)
    provoke_outliers(model)
    model.save_pretrained(made.loud)
    for checkpoint in (made.plain, made.loud):
        tokenizer.save_pretrained(checkpoint)
    return made


def divergence(reference: Path, candidate: Path) -> kld.KldResult:
    """On GSM8K's test questions, which nothing is trained or calibrated on."""
    return kld.run(kld.prepare(reference, candidate, choose(data=GSM8K), tokens=TOKENS))


def test_the_trained_model_knows_something_and_its_outliers_change_nothing(trained: Trained) -> None:
    found = divergence(trained.plain, trained.loud)
    assert found.reference_perplexity < SIZE.vocabulary / 2
    assert abs(found.max) < 1e-9


def test_a_recipe_undoes_what_outliers_cost(trained: Trained) -> None:
    folder, text = trained.loud.parent, str(GSM8K / "train.jsonl")
    w8a8.quantize(trained.plain, folder / "without")
    w8a8.quantize(trained.loud, folder / "rtn")
    w8a8.quantize(
        trained.loud, folder / "calibrated", Options(recipe="smooth+gptq", calibration=text, samples=8, tokens=128)
    )
    without = divergence(trained.plain, folder / "without").mean
    rtn, calibrated = (divergence(trained.loud, folder / name).mean for name in ("rtn", "calibrated"))
    assert rtn > 10 * without
    assert calibrated < 0.5 * rtn
    assert calibrated < 1.5 * without
