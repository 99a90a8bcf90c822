"""The real Gemma 3 270M: what its W8A8 checkpoint holds, and what a transformers model computes with it."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import w8a8
from tests.models import MAKE_GEMMA

LAYERS, LINEARS_PER_LAYER = 18, 7
QUANTIZED = LAYERS * LINEARS_PER_LAYER
PARAMETERS = 268_098_176
PROSE = """\
The lighthouse stood at the end of the peninsula, where the road gave way to rock and the rock gave way to the sea. \
For more than a hundred years it had warned ships away from the reef, and in all that time it had been dark for only \
three nights. The keeper, who had grown old in its service, liked to say that the light did not belong to him, or to \
the government, or even to the ships; it belonged to the people who would never know that they had needed it."""


def tensors(folder: Path) -> dict[str, Any]:
    """Every tensor of a checkpoint, as the safetensors library reads it."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def dequantized(made: Mapping[str, Any]) -> dict[str, Any]:
    """`name.weight` -> float32 codes * scale, of the quantized tensors alone."""
    codes = {name: tensor for name, tensor in made.items() if tensor.dtype == torch.int8}
    return {name: tensor.float() * made[f"{name}_scale"].float().reshape(-1, 1) for name, tensor in codes.items()}


def per_token_int8(_module: Any, inputs: tuple[Any]) -> tuple[Any]:
    """What an engine does to a linear layer's input `[..., tokens, in]`: INT8 with one scale per token, amax/127."""
    (x,) = inputs
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-12)
    return ((x / scale).round().clamp(-128, 127) * scale,)


@dataclass(frozen=True)
class Distance:
    """How far a model's predictions of the prose are from the original's."""

    nll_change: float
    mean_kl: float
    top1_agreement: float


class Reader:
    """The original model in float32 arithmetic, which reads the prose with whatever weights it is lent."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.ids = AutoTokenizer.from_pretrained(folder)(PROSE, return_tensors="pt").input_ids
        self.reference = self._logits({})

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood of the prose, nats per token."""
        return self._nll(self.reference)

    def distance(self, weights: Mapping[str, Any], *, int8_inputs: bool = False) -> Distance:
        """Read with these weights in place of the original ones."""
        with self._int8_inputs(weights if int8_inputs else ()):
            logits = self._logits(weights)
        p, q = self.reference.log_softmax(-1), logits.log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1).mean().item()
        agreement = (p.argmax(-1) == q.argmax(-1)).float().mean().item()
        return Distance(self._nll(logits) - self.nll, kl, agreement)

    def _logits(self, weights: Mapping[str, Any]) -> Any:
        with torch.no_grad():
            return functional_call(self.model, dict(weights), (self.ids,)).logits[0]

    def _nll(self, logits: Any) -> float:
        return float(cross_entropy(logits[:-1], self.ids[0, 1:]))

    @contextmanager
    def _int8_inputs(self, names: Mapping[str, Any] | tuple[()]) -> Iterator[None]:
        modules = [self.model.get_submodule(name.removesuffix(".weight")) for name in names]
        hooks = [module.register_forward_pre_hook(per_token_int8) for module in modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@pytest.fixture(scope="module")
def reader(gemma3: Path) -> Reader:
    return Reader(gemma3)


def test_the_script_makes_four_shards_and_leaves_them_alone_when_run_again(gemma3: Path) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in gemma3.iterdir()}
    subprocess.run([sys.executable, str(MAKE_GEMMA), str(gemma3)], check=True)
    assert {file.name: file.stat().st_mtime_ns for file in gemma3.iterdir()} == before
    assert sum(name.endswith(".safetensors") for name in before) == 4
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} <= before.keys()
    assert [entry.name for entry in gemma3.parent.iterdir() if entry.name.startswith(".")] == []


def test_the_script_does_not_touch_a_folder_that_holds_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("three years of work")
    done = subprocess.run([sys.executable, str(MAKE_GEMMA), str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "is not a checkpoint" in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_verify_finds_nothing_wrong_and_every_tensor_where_rounding_leaves_it(gemma3: Path, gemma3_w8a8: Path) -> None:
    result = w8a8.verify(gemma3_w8a8, gemma3)
    assert (result.problems, result.warnings) == ((), ())
    assert len(result.tensors) == QUANTIZED
    assert result.copied == 236 - QUANTIZED
    assert result.checksums == 4
    assert {row.component: row.tensors for row in result.components} == {"attention": 18 * 4, "mlp": 18 * 3}
    assert all(tensor.max_error <= 0.501 and tensor.zeroed_rows == 0 for tensor in result.tensors)
    assert min(tensor.sqnr_db for tensor in result.tensors) > 30


def test_inspect_counts_the_same_parameters_before_and_after(gemma3: Path, gemma3_w8a8: Path) -> None:
    before, after = w8a8.inspect(gemma3), w8a8.inspect(gemma3_w8a8)
    assert before.parameters == after.parameters == PARAMETERS
    assert (before.shards, after.shards) == (4, 4)
    assert (before.w8a8, after.w8a8) == (False, True)
    assert after.tensors == before.tensors + QUANTIZED
    assert {(row.component, row.dtype): row.tensors for row in after.components} == {
        ("embeddings", "BF16"): 1,
        ("attention", "I8"): 18 * 4,
        ("mlp", "I8"): 18 * 3,
        ("norms", "BF16"): 236 - QUANTIZED - 1,
        ("scales", "F32"): QUANTIZED,
    }


def test_the_tied_lm_head_is_excluded_by_name_though_no_file_holds_it(gemma3: Path, gemma3_w8a8: Path) -> None:
    assert "lm_head.weight" not in tensors(gemma3)
    assert "lm_head" in w8a8.inspect(gemma3_w8a8).excludes


def test_embeddings_norms_and_tokenizer_are_identical(gemma3: Path, gemma3_w8a8: Path) -> None:
    source, made = tensors(gemma3), tensors(gemma3_w8a8)
    kept = [name for name in source if made[name].dtype != torch.int8]
    assert len(kept) == 236 - QUANTIZED
    assert "model.embed_tokens.weight" in kept
    assert all(torch.equal(source[name].view(torch.int16), made[name].view(torch.int16)) for name in kept)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (gemma3_w8a8 / name).read_bytes() == (gemma3 / name).read_bytes()


def test_codes_and_scales_are_amax_over_127_rounded_half_to_even(gemma3: Path, gemma3_w8a8: Path) -> None:
    source, made = tensors(gemma3), tensors(gemma3_w8a8)
    for name in (name for name, tensor in made.items() if tensor.dtype == torch.int8):
        weight = source[name].float()
        scale = made[f"{name}_scale"].float().reshape(-1, 1)
        torch.testing.assert_close(scale, weight.abs().amax(1, keepdim=True) / 127, rtol=2**-8, atol=0)
        assert torch.equal(made[name], (weight / scale).round().clamp(-127, 127).to(torch.int8)), name


def test_the_original_reads_english(reader: Reader) -> None:
    assert 2 < reader.nll < 3.5


def test_int8_weights_alone_hardly_change_what_the_model_predicts(
    reader: Reader, gemma3_formats: Mapping[str, Path]
) -> None:
    weights = dequantized(tensors(gemma3_formats["quark"]))
    assert len(weights) == QUANTIZED
    distance = reader.distance(weights)
    # Measured: NLL 2.748 - 0.002, KL 0.0027 nats, 99.0 % (BF16 instead of FP32 arithmetic: KL 0.0007, 95.2 %).
    assert abs(distance.nll_change) < 0.02
    assert distance.mean_kl < 0.006
    assert distance.top1_agreement > 0.95


def test_int8_weights_and_activations_keep_the_model_close(reader: Reader, gemma3_formats: Mapping[str, Path]) -> None:
    distance = reader.distance(dequantized(tensors(gemma3_formats["quark"])), int8_inputs=True)
    # Measured: NLL 2.748 + 0.028, KL 0.025 nats, 92.4 %.
    assert abs(distance.nll_change) < 0.08
    assert distance.mean_kl < 0.05
    assert distance.top1_agreement > 0.85


def test_one_layer_with_its_rows_displaced_or_one_scale_for_all_rows_would_be_noticed(
    reader: Reader, gemma3: Path, gemma3_formats: Mapping[str, Path]
) -> None:
    name = "model.layers.5.mlp.down_proj.weight"
    # Measured: KL 1.0 and 17.6 nats.
    displaced = {name: tensors(gemma3)[name].float().roll(1, 0)}
    assert reader.distance(displaced).mean_kl > 0.2
    made = tensors(gemma3_formats["quark"])
    one_scale = {name: made[name].float() * made[f"{name}_scale"].mean() for name in dequantized(made)}
    assert reader.distance(one_scale).mean_kl > 0.2


def test_both_formats_hold_the_same_codes_and_scales_and_name_their_scheme(gemma3_formats: Mapping[str, Path]) -> None:
    ours, theirs = (tensors(gemma3_formats[name]) for name in ("quark", "compressed-tensors"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name].reshape(ours[name].shape)) for name in ours)
    for name, out in gemma3_formats.items():
        assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == name
