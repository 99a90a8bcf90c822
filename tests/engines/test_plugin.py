"""The plugin in the real vLLM: found in every process, chosen where it should be, and computing what vLLM computes."""

import json
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import w8a8
import w8a8.runtime
from tests.checkpoints import llama_tensors, write_checkpoint
from w8a8.formats import FORMATS
from w8a8.quantization import Options
from w8a8.serve.installed import find
from w8a8.vllm_plugin.rule import known

OURS = "W8A8Int8ScaledMMLinearKernel"
CUTLASS = "CutlassInt8ScaledMMLinearKernel"
TRITON = "TritonInt8ScaledMMLinearKernel"
CPU = "CPUInt8ScaledMMLinearKernel"

RDNA3 = {"platform": "rocm", "capability": 110}
INSTINCT = {"platform": "rocm", "capability": 94}
AMPERE = {"platform": "cuda", "capability": 80}
HOPPER = {"platform": "cuda", "capability": 90}
BLACKWELL = [{"platform": "cuda", "capability": capability} for capability in (100, 103, 120, 121)]

CHOICES: list[tuple[dict[str, Any], str]] = [
    (RDNA3, OURS),
    (RDNA3 | {"backend": "triton"}, OURS),
    (INSTINCT, OURS),
    *((blackwell, OURS) for blackwell in BLACKWELL),
    (BLACKWELL[2] | {"backend": "triton"}, OURS),
    (BLACKWELL[2] | {"backend": "cutlass"}, CUTLASS),
    (HOPPER, CUTLASS),
    (HOPPER | {"backend": "triton"}, OURS),
    (HOPPER | {"measured_faster": True}, OURS),
    (HOPPER | {"measured_faster": True, "backend": "cutlass"}, CUTLASS),
    (AMPERE, CUTLASS),
    ({"platform": "cuda", "capability": 75, "backend": "triton"}, TRITON),
    ({"platform": "rocm"}, OURS),  # a process that sees no GPU
    ({"platform": "cuda"}, CUTLASS),
    ({"platform": "cpu", "variables": {"TRITON_INTERPRET": "0"}}, CPU),
    (RDNA3 | {"variables": {"VLLM_DISABLED_KERNELS": OURS}}, TRITON),
    *((RDNA3 | {"variables": {"W8A8_VLLM_PLUGIN": value}}, kernel) for value, kernel in (("0", TRITON), ("1", OURS))),
    (RDNA3 | {"static": True}, TRITON),
    (RDNA3 | {"symmetric": False}, TRITON),
    (RDNA3 | {"static": True, "symmetric": False}, TRITON),
    (HOPPER | {"static": True, "backend": "triton"}, TRITON),
]
"""Where and what for, and the kernel that a layer gets there once the plugin is loaded."""

KERNELS = {
    f"{scheme}, {', '.join(f'{k} {v}' for k, v in where.items())}": ({"scheme": scheme, **where}, kernel)
    for scheme, (where, kernel) in product(FORMATS, CHOICES)
}
OBSTACLES = {
    "newer vLLM": "knows vLLM 0.32, and this is vLLM 0.33.0",
    "development vLLM": "0.32.1.dev7+gabc",
    "no Triton": "Triton is not installed",
    "other lists": "vLLM keeps its kernels in other lists",
    "no lists": "vLLM's own INT8 kernels run",
}
ROUNDING = 0.02
"""The relative error that codes may make which round the other way, where SiLU's result differs in its last bit."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PROMPT = [1, 5, 9, 33, 2, 7]
TOKENS = 4
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "hidden_act": "silu",
}


@dataclass(frozen=True)
class Answers:
    """What vLLM's environment answered: facts as JSON, and tensors by `format/layer/dtype/name`."""

    facts: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def of(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix + "/"): t for name, t in self.tensors.items() if name.startswith(prefix + "/")}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small Llama, quantized, by format. Its logits lie far apart, so that engines agree on the likeliest."""
    folder = tmp_path_factory.mktemp("llama")
    tensors = llama_tensors(hidden=128, intermediate=192)
    tensors["model.norm.weight"] = ("BF16", np.ones(128, np.float32))
    dtype, values = tensors["lm_head.weight"]
    tensors["lm_head.weight"] = (dtype, values * np.float32(20))
    source = write_checkpoint(folder / "source", tensors, config=CONFIG)
    for name in FORMATS:
        w8a8.quantize(source, folder / name, Options(format=name))
    return {name: folder / name for name in FORMATS}


@pytest.fixture(scope="module")
def answers(checkpoints: dict[str, Path], vllm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    folder = tmp_path_factory.mktemp("answers")
    questions = {
        "kernels": {name: question for name, (question, _) in KERNELS.items()},
        "obstacles": ["none", "switched off", *OBSTACLES],
        "checkpoints": {name: str(path) for name, path in checkpoints.items()},
    }
    (folder / "questions.json").write_text(json.dumps(questions))
    files = [folder / name for name in ("questions.json", "answers.json", "tensors.safetensors")]
    subprocess.run([vllm_python, Path(__file__).with_name("vllm_plugin.py"), *files], check=True)
    return Answers(json.loads(files[1].read_text()), load_file(files[2]))


def test_serve_finds_the_plugin_beside_vllm(vllm_python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(vllm_python.parent))
    found = find()
    assert found is not None
    assert found.plugin
    assert known(found.version)


@pytest.mark.parametrize("name", KERNELS)
def test_the_kernel_is_chosen_where_it_should_be(name: str, answers: Answers) -> None:
    assert answers.facts["kernels"][name] == KERNELS[name][1]


def test_it_says_what_runs_and_registers_once(answers: Answers) -> None:
    found = answers.facts["obstacles"]["none"]
    assert found["said"] == ["INFO", "w8a8 plugin: active; INT8 layers run w8a8's Triton kernel"]
    assert found["changed"]
    assert not found["again"]


def test_one_variable_switches_it_off(answers: Answers) -> None:
    found = answers.facts["obstacles"]["switched off"]
    assert found["said"] == ["INFO", "w8a8 plugin: switched off by W8A8_VLLM_PLUGIN=0"]
    assert not found["changed"]


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_it_steps_aside_with_a_warning(obstacle: str, answers: Answers) -> None:
    found = answers.facts["obstacles"][obstacle]
    level, message = found["said"]
    assert level == "WARNING"
    assert OBSTACLES[obstacle] in message
    assert not found["changed"]


@pytest.mark.parametrize("format_", FORMATS)
def test_a_rank_s_share_of_fused_layers_is_what_lies_in_the_checkpoint(
    format_: str, checkpoints: dict[str, Path], answers: Answers
) -> None:
    stored = load_file(checkpoints[format_] / "model.safetensors")
    for layer, (leaves, dimension) in {
        "self_attn.qkv_proj": (["q_proj", "k_proj", "v_proj"], 0),
        "self_attn.o_proj": (["o_proj"], 1),
        "mlp.gate_up_proj": (["gate_proj", "up_proj"], 0),
        "mlp.down_proj": (["down_proj"], 1),
    }.items():
        loaded = answers.of(f"{format_}/model.layers.0.{layer}/bfloat16")
        block = f"model.layers.0.{layer.partition('.')[0]}"
        weights = [stored[f"{block}.{leaf}.weight"].chunk(2, dimension)[1] for leaf in leaves]
        scales = [stored[f"{block}.{leaf}.weight_scale"].reshape(-1, 1) for leaf in leaves]
        if dimension == 0:
            scales = [scale.chunk(2)[1] for scale in scales]
        assert torch.equal(loaded["weight"], torch.cat(weights)), layer
        assert torch.equal(loaded["weight_scale"], torch.cat(scales)), layer


def test_one_scale_per_fused_tensor_becomes_one_per_channel(answers: Answers) -> None:
    scales = answers.of("per-tensor")["weight_scale"]
    assert torch.equal(scales, torch.tensor([0.5] * 8 + [0.25] * 16 + [2.0] * 24).reshape(-1, 1))


def test_it_computes_vllm_s_formula(answers: Answers) -> None:
    """On the codes and scales that vLLM's own operator gives: INT32 sums, scaled in FP32 and rounded once.

    To the bit; but to BF16 Triton's interpreter does not round as GPUs do, it cuts.
    """
    results = {name.rpartition("/")[0] for name in answers.tensors}
    assert len(results) == len(FORMATS) * 4 * len(DTYPES) + 1
    for result in results:
        of = answers.of(result)
        sums = of["codes"].int() @ of["weight"].int().T
        y = sums.float() * of["weight_scale"].T * of["scale"]
        if "bias" in of:
            y += of["bias"].float()
        assert of["y"].dtype == of["x"].dtype
        if of["y"].dtype == torch.bfloat16:
            torch.testing.assert_close(of["y"].float(), y, rtol=2**-7, atol=0, msg=result)
        else:
            assert torch.equal(of["y"], y.to(of["x"].dtype)), result


def test_any_number_of_tokens_comes_out_in_its_shape(answers: Answers) -> None:
    assert answers.facts["shapes"] == [[0, 128], [1, 128], [2, 3, 128]]


def test_torch_compile_sees_one_node_with_a_true_fake(answers: Answers) -> None:
    found = answers.facts["compiled"]
    assert found["nodes"] == ["w8a8.int8_linear"]
    assert found["equal"]
    assert found["opcheck"] == ["SUCCESS"]


@pytest.mark.parametrize("format_", FORMATS)
def test_silu_and_quantization_are_one_operator_in_mlps_of_llama_s_kind(format_: str, answers: Answers) -> None:
    found = answers.facts["fused"][format_]
    assert found["nodes"] == ["w8a8.int8_linear", "w8a8.silu_and_mul_quantize", "w8a8.int8_linear"]
    assert found["equal"]
    assert found["error"] < ROUNDING


def test_compiled_models_with_it_and_without_it_are_kept_apart(answers: Answers) -> None:
    without, with_it, again = answers.facts["cache_keys"]
    assert without != with_it == again


def test_a_token_s_result_does_not_depend_on_its_batch(answers: Answers) -> None:
    assert answers.facts["batch_invariant"]


def test_every_process_finds_it_and_a_model_split_over_two_says_the_same(
    checkpoints: dict[str, Path], vllm_python: Path, tmp_path: Path
) -> None:
    checkpoint = checkpoints["compressed-tensors"]
    variables = {
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(tmp_path),
    }
    script, arguments = Path(__file__).with_name("vllm_generate.py"), map(str, [2, TOKENS, *PROMPT])
    done = subprocess.run(
        [vllm_python, script, checkpoint, *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-4000:]
    assert set(re.findall(r"\((\S+) pid=\d+\).*w8a8 plugin: active", log)) == {
        *("EngineCore", "VllmWorker-0", "VllmWorker-1")
    }
    assert f"Selected {OURS}" in log
    (tokens,) = re.findall(r"^(\[[\d, ]+\])$", done.stdout, re.MULTILINE)
    assert json.loads(tokens) == greedy(checkpoint)


def greedy(checkpoint: Path) -> list[int]:
    """The tokens that transformers chooses, with this project's layer for the CPU."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    prompt = torch.tensor([PROMPT])
    tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=TOKENS, do_sample=False)
    return tokens[0, len(PROMPT) :].tolist()  # type: ignore[no-any-return]
