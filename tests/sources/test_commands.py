"""Every command takes every kind of source, as it takes the dense copy of it."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

import w8a8
from tests.calibrate.checkpoints import make, write_text
from tests.checkpoints import read_tensor
from tests.sources.ggufs import write_gguf
from tests.sources.makers import MAKERS, rewrite
from w8a8.checkpoint import Checkpoint
from w8a8.cli import app
from w8a8.machine import describe

pytestmark = pytest.mark.slow

LABELS = {kind: label for kind, (_, label) in MAKERS.items()} | {"gguf": "GGUF (Q8_0)"}
SIZES = ("--samples", "4", "--tokens", "32")


@dataclass(frozen=True)
class Case:
    """A source, its dense copy by `convert`, its result, and a text."""

    label: str
    source: Path
    dense: Path
    out: Path
    text: Path

    def run(self, *args: str | Path) -> str:
        """Run `w8a8 ARGS`; return what it prints."""
        found = CliRunner().invoke(app, [*map(str, args)], catch_exceptions=False)
        assert found.exit_code == 0, found.output
        return found.stdout

    def divergence(self, candidate: Path) -> dict[str, float]:
        """The figures of the KL divergence of a candidate from the source."""
        options = ("--text", self.text, "--tokens", "64", "--context", "32", "--json")
        found: dict[str, float] = json.loads(self.run("eval", "kld", self.source, candidate, *options))["kl"]
        return found


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("small") / "small", num_hidden_layers=2)


@pytest.fixture(scope="module", params=LABELS)
def case(request: pytest.FixtureRequest, small: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder, kind = tmp_path_factory.mktemp("case"), request.param
    if kind == "gguf":
        source = write_gguf(folder / "small.gguf", "llama", ("Q8_0",))
    else:
        source = rewrite(small, folder / "source", kind, shards=2)
    case = Case(LABELS[kind], source, folder / "dense", folder / "out", write_text(folder))
    case.run("convert", source, case.dense, "--format", "bf16")
    case.run("quantize", source, case.out)
    return case


def test_inspect_and_the_plan_say_what_it_is(case: Case) -> None:
    assert case.label in case.run("inspect", case.source)
    assert f"SRC is quantized already ({case.label})" in case.run("quantize", case.source, "--dry-run")


def test_the_result_is_that_of_the_dense_copy(case: Case, tmp_path: Path) -> None:
    w8a8.quantize(case.dense, tmp_path / "out")
    assert tensors(tmp_path / "out") == tensors(case.out)
    assert json.loads(case.run("verify", case.out, "--source", case.source, "--json"))["ok"]


def test_fit_counts_it_as_it_is_stored(case: Case) -> None:
    found, dense = (w8a8.fit(each, describe("24GiB")) for each in (case.source, case.dense))
    if case.label.startswith("GGUF"):  # counted dequantized
        assert found.weights == dense.weights
    else:
        assert found.weights < dense.weights
    assert f"quantized already ({case.label})" in case.run("fit", case.source, "--gpu", "24GiB")


def test_it_is_streamed_as_its_dense_copy(case: Case) -> None:
    assert case.divergence(case.dense)["max"] == 0


@pytest.mark.parametrize("case", ["fp8", "gguf"], indirect=True, scope="module")
def test_the_divergence_of_its_result_is_measured(case: Case) -> None:
    assert case.divergence(case.out)["mean"] > 0


@pytest.mark.parametrize("case", ["fp8", "nf4", "gguf"], indirect=True, scope="module")
def test_it_is_calibrated_as_its_dense_copy(case: Case, tmp_path: Path) -> None:
    options = ("--recipe", "smooth", "--calibration", case.text, *SIZES)
    for source, name in ((case.source, "out"), (case.dense, "copy")):
        case.run("quantize", source, tmp_path / name, *options)
    assert tensors(tmp_path / "out") == tensors(tmp_path / "copy")
    assert json.loads(case.run("verify", tmp_path / "out", "--source", case.source, "--json"))["ok"]


@pytest.mark.parametrize("case", ["fp8", "gguf"], indirect=True, scope="module")
def test_it_is_published(case: Case, tmp_path: Path) -> None:
    case.run("card", case.out)
    assert "is quantized itself" in (case.out / "README.md").read_text()
    made = json.loads(case.run("report", case.out, "--out", tmp_path / "report.html", "--json"))
    assert "dB SQNR" in made["headline"]  # so it has found the source, beside OUT
    case.run("push", case.out, "me/small", "--dry-run", "--source", case.source)


def tensors(folder: Path) -> dict[str, bytes]:
    checkpoint = Checkpoint.open(folder)
    return {name: read_tensor(checkpoint, tensor) for name, tensor in checkpoint.tensors.items()}
