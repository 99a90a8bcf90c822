"""`quantize --recipe` on mixtures of experts: nearer to the source than plain rounding, verified, in bounded memory."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import w8a8
from tests.calibrate.checkpoints import make
from tests.calibrate.test_run import _one_thread as _one_thread
from tests.checkpoints import folder_bytes
from w8a8.calibrate import setup
from w8a8.checkpoint import Checkpoint
from w8a8.quantization import Options
from w8a8.runtime.unread import Unread
from w8a8.texts.samples import cut, load

pytestmark = pytest.mark.slow

SIZES: dict[str, Any] = {"samples": 24, "tokens": 64}
CONFIG: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}


@pytest.fixture(scope="module", params=["Qwen3Moe", "Mixtral"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp(request.param) / "model", request.param, **CONFIG)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("mixture") / "model", "Qwen3Moe", **CONFIG)


def options(recipe: str = "smooth+gptq", **more: Any) -> Options:
    return Options(recipe=recipe, **SIZES, **more)  # on the built-in text


def logits(folder: Path, samples: Any) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.tensor(samples), use_cache=False).logits.double()
    return found.log_softmax(-1)


def test_a_recipe_is_nearer_to_the_source_than_rounding(source: Path, tmp_path: Path) -> None:
    said: list[str] = []
    w8a8.quantize(source, tmp_path / "rtn")
    w8a8.quantize(source, tmp_path / "calibrated", options(), notice=said.append)
    assert w8a8.verify(tmp_path / "calibrated", source).ok
    samples = cut(load(None), AutoTokenizer.from_pretrained(source), samples=60, tokens=64)[-20:]
    before = logits(source, samples)
    rtn, best = (
        float((before.exp() * (before - logits(tmp_path / name, samples))).sum(-1).mean())
        for name in ("rtn", "calibrated")
    )
    assert best < 0.5 * rtn
    assert any(line.startswith("experts' gate/up: ") and "of 8 experts)" in line for line in said)
    assert any(line.startswith("experts' down: ") for line in said)


def test_a_router_that_does_not_undo_the_norm_is_named(mixture: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    w8a8.quantize(mixture, out, options("smooth"))
    name = "model.layers.1.mlp.gate.weight"
    before, after = Checkpoint.open(mixture).tensors[name], Checkpoint.open(out).tensors[name]
    unfolded = (mixture / before.shard).read_bytes()[before.offset :][: before.nbytes]
    with (out / after.shard).open("r+b") as file:
        file.seek(after.offset)
        assert file.read(after.nbytes) != unfolded
        file.seek(after.offset)
        file.write(unfolded)
    problems = w8a8.verify(out, mixture).problems
    assert any(name in problem and "not what was taken out" in problem for problem in problems)


def test_the_run_says_how_many_experts_saw_too_few_tokens(tmp_path: Path) -> None:
    source = make(tmp_path / "wide", "Qwen3Moe", **{**CONFIG, "num_experts": 32, "num_local_experts": 32})
    said: list[str] = []
    w8a8.quantize(source, tmp_path / "out", options(), notice=said.append)
    [line] = [line for line in said if "tokens to learn from" in line]
    assert 0 < int(line.split(" of 64 experts", 1)[0]) <= 64
    assert w8a8.verify(tmp_path / "out", source).ok


def test_where_a_layer_does_not_fit_one_experts_weights_are_in_memory_at_a_time(
    mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    w8a8.quantize(mixture, tmp_path / "whole", options())
    alive: set[int] = set()
    most: list[int] = []
    read = vars(Unread)["weight"].fget

    def counted(layer: Unread) -> Tensor:
        array = read(layer).numpy().copy()  # lives as long as any tensor made of it
        alive.add(id(array))
        weakref.finalize(array, alive.discard, id(array))
        most.append(len(alive))
        return torch.from_numpy(array)

    monkeypatch.setattr(setup, "_room", lambda: 0)
    monkeypatch.setattr(Unread, "weight", property(counted))
    w8a8.quantize(mixture, tmp_path / "out", options())
    assert len(most) > 2 * 4 * 3
    assert max(most) <= 3
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_experts_that_a_budget_keeps_stay_all_together(mixture: Path, tmp_path: Path) -> None:
    result = w8a8.quantize(mixture, tmp_path / "out", options("smooth", keep_bf16="40%"))
    kept = {
        d.tensor.name
        for d in result.plan.decisions
        if d.reason.startswith("--keep-bf16") and "experts" in d.tensor.name
    }
    by_layer = {layer: sum(f"layers.{layer}." in name for name in kept) for layer in range(2)}
    assert set(by_layer.values()) <= {0, 4 * 3}
    assert any(by_layer.values())
    assert w8a8.verify(tmp_path / "out", mixture).ok


def test_experts_left_out_stay_and_the_rest_is_calibrated(mixture: Path, tmp_path: Path) -> None:
    result = w8a8.quantize(mixture, tmp_path / "out", options("smooth", exclude=["*.experts.*"]))
    assert result.plan.calibration is not None
    assert any("q_proj" in name for name in result.plan.calibration.changed)
    assert not any("experts" in name for name in result.plan.calibration.changed)
    assert w8a8.verify(tmp_path / "out", mixture).ok
