"""`quantize --recipe` for architectures without a table, and for layers that pass more than states to each other."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import w8a8
from tests.calibrate.checkpoints import make_elastic_gemma, write_text, write_tokenizer
from tests.calibrate.test_run import SIZES, states_after
from tests.support.tiny import make_model
from w8a8.calibrate.activations import Activations
from w8a8.checkpoint import Checkpoint
from w8a8.quantization import Options, calibrated, prepare, run
from w8a8.recipes.costs import backwards
from w8a8.runtime.calls import Call, States
from w8a8.runtime.streamed import StreamedModel, forward_block
from w8a8.sources.opening import as_run
from w8a8.texts.samples import cut, load

pytestmark = pytest.mark.slow


def tiny(model_type: str) -> Callable[[Path], Path]:
    """What makes a tiny model of an architecture in a folder."""

    def make(folder: Path) -> Path:
        make_model(model_type).save_pretrained(folder)
        write_tokenizer(folder)
        return folder

    return make


@pytest.mark.parametrize(
    ("make", "folded"),
    [
        (tiny("phi3"), {"input_layernorm", "post_attention_layernorm"}),
        (tiny("granite"), {"input_layernorm", "post_attention_layernorm"}),
        (tiny("qwen3_5_text"), {"input_layernorm", "post_attention_layernorm", "in_proj_a", "in_proj_b"}),
        (tiny("starcoder2"), {"input_layernorm", "post_attention_layernorm"}),
        (make_elastic_gemma, {"input_layernorm", "pre_feedforward_layernorm"}),
    ],
    ids=["phi3", "granite", "qwen3_5", "starcoder2", "gemma4-e2b"],
)
def test_the_result_runs_as_it_was_simulated(make: Callable[[Path], Path], folded: set[str], tmp_path: Path) -> None:
    torch.set_num_threads(1)
    source, out, text = make(tmp_path / "model"), tmp_path / "out", str(write_text(tmp_path))
    job, said = prepare(source, Options(recipe="smooth+gptq", calibration=text, **SIZES)), list[str]()
    with calibrated(job, out, notice=said.append) as ready:
        *_, last = sorted((tmp_path / ".out.w8a8-calibration").rglob("states-*.bin"))
        simulated = [each.hidden[0].numpy() for each in Activations(last).states(torch.device("cpu"))]
        run(ready, out)
    assert not (tmp_path / ".out.w8a8-calibration").exists()
    sample = cut(load(text), AutoTokenizer.from_pretrained(source), **SIZES)[4]
    found = states_after(out, sample)[0]
    assert np.allclose(found, simulated[4], rtol=1e-3, atol=1e-3 * np.abs(found).max())
    assert w8a8.verify(out, source).ok
    record = json.loads((out / "w8a8.json").read_text())["calibration"]
    assert {name.split(".")[-2] for name in record["folded"] if name.endswith(".weight")} == folded


def test_gradients_go_back_through_the_keys_and_values_that_later_layers_share(tmp_path: Path) -> None:
    """Layer by layer they are what autograd finds through all layers at once."""
    torch.manual_seed(0)
    folder = make_elastic_gemma(tmp_path, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(requires_grad=False)
    first, called = StreamedModel("gemma4", as_run(Checkpoint.open(folder)), torch.float32).embed([*range(3, 23)])
    gradient = torch.randn(first.shape)
    # 1) All layers at once
    entering = first.clone().requires_grad_()
    leaving, layers = entering, model.model.layers
    for layer, kwargs in zip(layers, called, strict=True):
        leaving = layer(leaving, **kwargs)
    (wanted,) = torch.autograd.grad(leaving, entering, gradient)
    # 2) One after the other
    states = [States(first)]
    with torch.no_grad():
        for layer, kwargs in zip(layers, called, strict=True):
            states += forward_block(layer, [Call(states[-1], kwargs)])
    assert sorted({len(each.left) for each in states}) == [0, 2, 4]
    found = States(gradient)
    for layer, kwargs, each in zip(reversed(layers), reversed(called), reversed(states[:-1]), strict=True):
        by_states, _, by_left = backwards(layer, [], each.hidden, kwargs, found.hidden, each.left, found.left)
        found = States(by_states, by_left)
    assert torch.allclose(found.hidden, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    assert not found.left
    without = gradient
    for layer, kwargs, each in zip(reversed(layers), reversed(called), reversed(states[:-1]), strict=True):
        without, _, _ = backwards(layer, [], each.hidden, kwargs, without, each.left)
    assert not torch.allclose(without, wanted, rtol=1e-2, atol=1e-2 * float(wanted.abs().max()))
