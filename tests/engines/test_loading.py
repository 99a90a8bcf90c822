"""Stock vLLM loads architectures whose layers it knows by other names than the file's, in both formats."""

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import w8a8
from w8a8.formats import FORMATS
from w8a8.quantization import Options

SCRIPT = Path(__file__).parent / "vllm_loads.py"
SIZES: Mapping[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
KINDS: Mapping[str, tuple[Mapping[str, Any], int]] = {
    # model_type: what else its config says, and the INT8 layers that vLLM builds: fused q/k/v and o of two layers, and
    # the shared experts' two. Routed experts stay in BF16: vLLM has no INT8 kernel for them on every CPU.
    "granitemoe": ({"num_local_experts": 4, "num_experts_per_tok": 2}, 4),
    "granitemoeshared": ({"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 128}, 8),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_found(kind: str, vllm_python: Path, tmp_path: Path) -> None:
    settings, expected = KINDS[kind]
    config = transformers.AutoConfig.for_model(kind, **SIZES, **settings, dtype="bfloat16")
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    for name in FORMATS:
        w8a8.quantize(tmp_path / "source", tmp_path / name, Options(format=name, exclude=["*.experts.*"]))
    folders = [str(tmp_path / name) for name in FORMATS]
    run = subprocess.run([vllm_python, SCRIPT, *folders], stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(run.stdout.splitlines()[-1])
    assert found == {folder: {"missing": [], "int8": expected, "error": None} for folder in folders}
