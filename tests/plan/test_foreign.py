"""What is no checkpoint to quantize is named as what it is, with what to do and the right error."""

import json
from pathlib import Path

import numpy as np
import pytest

import w8a8
from tests.checkpoints import LLAMA, llama_tensors, write_checkpoint
from tests.named import headers, plan_of
from w8a8.checkpoint import resolve
from w8a8.checkpoint.source import refuse_pickles
from w8a8.errors import (
    AlreadyQuantizedError,
    HeaderError,
    NoConfigError,
    NothingToQuantizeError,
    NoWeightsError,
    PickleOnlyError,
    SourceNotFoundError,
    W8A8Error,
)
from w8a8.plan.viewing import view_of

LAYER = "model.layers.0.self_attn.q_proj"
Tensors = dict[str, tuple[str, tuple[int, ...]]]

READ: dict[str, Tensors] = {
    "GPTQ INT4": {"qweight": ("I32", (2, 16)), "scales": ("F16", (1, 16)), "qzeros": ("I32", (1, 2))},
    "AWQ INT4": {"qweight": ("I32", (16, 2)), "qzeros": ("I32", (1, 2)), "scales": ("F16", (1, 16))},
    "INT4 per row": {"weight_packed": ("I32", (16, 2)), "weight_scale": ("BF16", (16, 1))},
    "INT8 per row": {"weight": ("I8", (16, 16)), "SCB": ("F32", (16,))},
    "FP8 in blocks": {"weight": ("F8_E4M3", (16, 16)), "weight_scale_inv": ("F32", (1, 1))},
    "FP8 per tensor": {"weight": ("F8_E5M2", (16, 16)), "weight_scale": ("F32", ())},
    "NVFP4": {"weight": ("U8", (16, 8)), "weight_scale": ("F8_E4M3", (16, 1)), "weight_scale_2": ("F32", ())},
    "MXFP4": {"gate_up_proj_blocks": ("U8", (4, 16, 1, 16)), "gate_up_proj_scales": ("U8", (4, 16, 1))},
}  # fmt: skip
QUANTIZED: dict[str, Tensors] = {
    "GPTQ": {"g_idx": ("I32", (16,))},
    "AWQ or GPTQ": {"qweight": ("I16", (16, 2)), "qzeros": ("I32", (1, 2)), "scales": ("F16", (1, 16))},
    "packed INT4": {"weight_packed": ("I64", (16, 2)), "weight_shape": ("I64", (2,))},
    "4-bit weights": {"weight": ("U8", (128, 1)), "weight.absmax": ("F32", (4,)), "weight.quant_map": ("F32", (16,))},
    "bitsandbytes: 8-bit": {"SCB": ("F32", (16,))},
    "FP8 in blocks": {"weight": ("BF16", (16, 16)), "weight_scale_inv": ("F32", (1, 1))},
    "FP4, FP6 or FP8": {"weight": ("F8_E4M3FNUZ", (16, 16))},
    "FP4, FP6 or FP8.*is F6_E2M3": {"weight": ("F6_E2M3", (16, 16))},
    "NVFP4": {"weight_scale_2": ("F32", ())},
    "MXFP4": {"gate_up_proj_blocks": ("U8", (4, 16))},
    "EXL2": {"q_weight": ("I32", (16, 2)), "q_invperm": ("I32", (16,)), "q_scale": ("I32", (1, 2))},
    "EXL3": {"trellis": ("I16", (1, 1, 64)), "suh": ("F16", (16,)), "svh": ("F16", (16,))},
    "HQQ": {"W_q": ("U8", (8, 16)), "meta": ("F16", (1,))},
    "AQLM": {"codes": ("I16", (16, 2, 1)), "codebooks": ("F16", (1, 256, 1, 8)), "scales": ("F16", (16, 1, 1, 1))},
    "quanto": {"weight._data": ("I8", (16, 16)), "weight._scale": ("F32", (16, 1))},
    "MLX": {"weight": ("U32", (16, 2)), "scales": ("BF16", (16, 1)), "biases": ("BF16", (16, 1))},
    "8-bit integers": {"weight": ("I8", (16, 16))},
}  # fmt: skip


@pytest.mark.parametrize("kind", READ)
def test_what_can_be_read_is_named_and_seen_as_dense(kind: str) -> None:
    seen = view_of(headers({f"{LAYER}.{leaf}": value for leaf, value in READ[kind].items()}, LLAMA))
    assert seen.quantized.startswith(kind)
    assert {(tensor.dtype, tensor.shape[-1]) for tensor in seen.tensors.values()} <= {("BF16", 16), ("F16", 16)}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_weights_are_named_although_no_config_declares_them(kind: str) -> None:
    tensors = {f"{LAYER}.{leaf}": value for leaf, value in QUANTIZED[kind].items()}
    # some layers stay unquantized in such files: they must not make the rest pass for one that is not
    tensors |= {"model.layers.1.mlp.down_proj.weight": ("BF16", (16, 16)), "lm_head.weight": ("BF16", (32, 16))}
    with pytest.raises(AlreadyQuantizedError, match=rf"{kind}.*; quantize the BF16 original") as caught:
        plan_of(headers(tensors, LLAMA))
    assert LAYER in str(caught.value)


def test_inspect_names_them_too(tmp_path: Path) -> None:
    packed = {f"{LAYER}.qweight": ("I32", np.ones((16, 2), np.int32)), f"{LAYER}.g_idx": ("I32", np.ones(16, np.int32))}
    assert w8a8.inspect(write_checkpoint(tmp_path, packed)).scheme.startswith("GPTQ")


def test_a_declared_scheme_is_named_with_what_the_tensors_show() -> None:
    config = {**LLAMA, "quantization_config": {"group_size": 64, "bits": 4}}
    with pytest.raises(AlreadyQuantizedError, match="quant_method unknown, MLX"):
        plan_of(headers({f"{LAYER}.{leaf}": value for leaf, value in QUANTIZED["MLX"].items()}, config))


def test_float64_weights_are_said_to_be_the_reason() -> None:
    tensors: Tensors = {f"model.layers.0.self_attn.{p}_proj.weight": ("F64", (16, 16)) for p in "qkvo"}
    with pytest.raises(NothingToQuantizeError, match=r"linear layers are F64.*only BF16, F16 and F32.*dtype="):
        plan_of(headers(tensors, LLAMA))


def test_float64_beside_bf16_is_a_warning() -> None:
    tensors: Tensors = {f"model.layers.{i}.mlp.down_proj.weight": (("F64", "BF16")[i], (16, 16)) for i in range(2)}
    assert plan_of(headers(tensors, LLAMA)).warnings == (
        "linear layers are left alone because of their dtype, F64: model.layers.*.mlp.down_proj.weight",
    )


def test_an_adapter_with_a_models_file_names_is_named() -> None:
    tensors: Tensors = {f"base_model.model.{LAYER}.lora_{side}.weight": ("F32", (8, 16)) for side in "AB"}
    with pytest.raises(NothingToQuantizeError, match=r"LoRA adapter; merge it"):
        plan_of(headers(tensors, LLAMA))


FOLDERS: dict[str, tuple[list[str], type[W8A8Error], str]] = {
    "adapter": (["adapter_config.json", "adapter_model.safetensors"], NoConfigError, "LoRA adapter; merge it"),
    "gguf": (["model-Q4_K_M.gguf"], HeaderError, "model-Q4_K_M.gguf: no GGUF"),
    "ggml": (["model.ggml"], NoConfigError, "model.ggml is an older or a wrapped form of GGUF"),
    "onnx": (["config.json", "model.onnx", "model.onnx_data"], NoWeightsError, "ONNX"),
    "diffusers": (["model_index.json"], NoConfigError, "diffusers pipeline"),
    "mistral": (["params.json", "consolidated.safetensors"], NoConfigError, "transformers files"),
    "tensorflow": (["config.json", "tf_model.h5"], NoWeightsError, "from_tf=True"),
    "mlx": (["config.json", "weights.npz"], NoWeightsError, "MLX"),
    "sentence-transformers": (["modules.json"], NoConfigError, "sentence-transformers"),
    "nothing": (["config.json"], NoWeightsError, "no safetensors weights here"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_of_another_format_is_named(kind: str, tmp_path: Path) -> None:
    files, error, said = FOLDERS[kind]
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(error, match=said):
        w8a8.quantize(tmp_path, tmp_path.with_name("out"))
    assert not tmp_path.with_name("out").exists()


def test_a_file_in_place_of_a_folder_is_named(tmp_path: Path) -> None:
    for name, said in (("model.onnx", "is a file; model.onnx is an ONNX"), ("model.bin", "give the folder it lies in")):
        (tmp_path / name).write_bytes(b"GGUF")
        with pytest.raises(SourceNotFoundError, match=said):
            resolve(tmp_path / name)


def test_a_repository_of_another_format_is_named_before_anything_is_fetched() -> None:
    with pytest.raises(NoWeightsError, match=r"org/x: the repository has no safetensors; x\.gguf is GGUF: download it"):
        refuse_pickles("org/x", ["README.md", "x.gguf"])
    with pytest.raises(PickleOnlyError, match=r"only pytorch_model\.bin"):
        refuse_pickles("org/x", ["pytorch_model.bin", "tf_model.h5"])


def test_an_encoder_for_sentences_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"encoder.layer.0.attention.self.query.weight": llama_tensors()["lm_head.weight"]})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "modules.json").write_text("[]")
    with pytest.raises(NothingToQuantizeError, match="this bert sentence-transformers model"):
        w8a8.quantize(tmp_path, tmp_path.with_name("out"))
