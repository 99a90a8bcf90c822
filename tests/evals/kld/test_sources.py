"""The divergence from a source that has to be decoded: it is streamed, and equals its dense copy."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import w8a8
from tests.checkpoints import write_checkpoint
from tests.evals.kld.llamas import measure
from tests.named import headers
from tests.runtime.moe import make, tensors_of
from tests.sources.decoding import Tensors, bits, dtype_name
from tests.sources.makers import DECLARED, rewrite
from w8a8.errors import UnsupportedModelError
from w8a8.evals.kld.run import prepare, streamed_ram
from w8a8.memory.ram import PROCESS_BYTES
from w8a8.sources.opening import as_run
from w8a8.texts.files import Text

pytestmark = pytest.mark.slow

COUNTING = Text("counting", ("".join(f" w{number * 7 % 50 + 3}" for number in range(40)),))


def stacked(source: Path, out: Path) -> Path:
    """Write the checkpoint `source` with its stacks of experts in FP8."""
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"))
    stored: Tensors = {}
    for name, tensor in tensors_of(source).items():
        stored[name] = tensor
        if tensor.ndim == 3:
            scale = torch.full((len(tensor), 1, 1), tensor.abs().max() / 448)
            stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scale.expand(-1, *(-(-size // 128) for size in tensor.shape[1:])).clone()
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": DECLARED["fp8"]}
    return write_checkpoint(out, {n: (dtype_name(t), bits(t)) for n, t in stored.items()}, config=config, shards=2)


@pytest.mark.parametrize("family", ["qwen3_moe", "gemma4", "llama4"])
def test_a_mixture_in_fp8_is_its_dense_copy(tmp_path: Path, family: str) -> None:
    source, fp8, dense = make(tmp_path / family, family), tmp_path / "fp8", tmp_path / "dense"
    _ = rewrite(source, fp8, "fp8") if family == "qwen3_moe" else stacked(source, fp8)
    w8a8.convert(fp8, dense, "bf16")
    assert prepare(dense, fp8, COUNTING, context=16).streamed
    assert measure(dense, fp8, COUNTING, context=16).max == 0
    assert not prepare(source, dense, COUNTING, context=16).streamed
    assert measure(source, dense, COUNTING, context=16).max > 0


def test_what_cannot_be_streamed_has_a_way_out(tmp_path: Path) -> None:
    fp8 = stacked(make(tmp_path / "gemma4", "gemma4"), tmp_path / "fp8")
    config = json.loads((fp8 / "config.json").read_text())
    config.get("text_config", config).update(num_hidden_layers=3, layer_types=3 * ["full_attention"])
    (fp8 / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=r"is not in the checkpoint.*`w8a8 convert .* --format bf16`"):
        measure(fp8, fp8, COUNTING, context=16)


def test_what_streaming_needs_is_counted_decoded_and_by_the_head() -> None:
    tokens, hidden, stack = 100, 64, (8, 256, 64)
    view = as_run(
        headers(
            {
                "model.embed_tokens.weight": ("BF16", (tokens, hidden)),
                "lm_head.weight": ("BF16", (tokens, hidden)),
                "model.layers.0.mlp.experts.gate_up_proj": ("F8_E4M3", stack),
                "model.layers.0.mlp.experts.gate_up_proj_scale_inv": ("F32", (8, 2, 1)),
            },
            {"model_type": "qwen3_vl_moe"},
        )
    )
    table, layer, states = 2 * tokens * hidden, 2 * 8 * 256 * 64, 10 * hidden * 4
    needed = streamed_ram([view, view], (None, None), tokens, 1, 10)
    assert needed == PROCESS_BYTES + 2 * table + 2 * (layer + table) + 2 * states
    wide = streamed_ram([view, view], ("float32", None), tokens, 1, 10)
    assert wide == PROCESS_BYTES + 3 * table + 4 * (layer + table) + 2 * states
