"""MXFP4 and NVFP4, against transformers and compressed-tensors, bit for bit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.checkpoints import write_checkpoint
from tests.sources.decoding import LAYER, Tensors, decoded, found, same, written
from w8a8.checkpoint import Checkpoint
from w8a8.errors import SourceError
from w8a8.sources.fp4 import find

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
WEIGHT, PACKED, SCALE = f"{LAYER}.weight", f"{LAYER}.weight_packed", f"{LAYER}.weight_scale"
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"
FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def random(*shape: int, low: int = 0, high: int = 256, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, dtype=torch.uint8, generator=generator)


def values(packed: torch.Tensor) -> torch.Tensor:
    """FP4 by its table."""
    return torch.tensor(FP4)[torch.stack([packed & 15, packed >> 4], -1).long()].flatten(-2)


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_gpt_oss_blocks_equal_transformers(tmp_path: Path, dtype: torch.dtype) -> None:
    low, high = (110, 140) if dtype == F16 else (0, 255)  # every exponent there is, but NaN
    blocks, scales = random(3, 40, 5, 16), random(3, 40, 5, low=low, high=high, seed=1)
    reference = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    tensors = {f"{EXPERTS}_blocks": blocks, f"{EXPERTS}_scales": scales, "norm.weight": torch.ones(1, dtype=dtype)}
    assert same(found(tmp_path, find, tensors)[EXPERTS], reference)


def test_gpt_oss_experts_can_be_taken_as_rows(tmp_path: Path) -> None:
    blocks, scales = random(3, 40, 5, 16), random(3, 40, 5, low=100, high=150)
    checkpoint = written(tmp_path, {f"{EXPERTS}_blocks": blocks, f"{EXPERTS}_scales": scales})
    (stack,) = find(checkpoint.tensors, {})
    assert stack.shape == (3, 160, 40)
    rows = replace(stack, shape=(3, 40, 160), decoder=stack.decoder.transposed())
    reference = convert_moe_packed_tensors(blocks, scales, dtype=BF16)
    assert same(decoded(checkpoint, rows), reference.transpose(1, 2).contiguous())


def test_mxfp4_equals_compressed_tensors(tmp_path: Path) -> None:
    args = QuantizationArgs(num_bits=4, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8)
    parts = {"weight_packed": random(24, 48), "weight_scale": random(24, 3, low=100, high=150)}
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    reference = BaseCompressor.get_value_from_registry("mxfp4-pack-quantized").decompress(parts, scheme)["weight"]
    assert same(found(tmp_path, find, {f"{LAYER}.{k}": v for k, v in parts.items()})[WEIGHT], reference)


@pytest.mark.parametrize("leaf", ["weight_scale_inv", "scale"])
def test_deepseeks_fp4_equals_transformers(tmp_path: Path, leaf: str) -> None:
    packed, scale = random(24, 48).view(torch.int8), random(24, 3, low=100, high=150).view(E8M0)
    reference = Fp8Dequantize(None)._dequantize_one(packed, scale, output_dtype=BF16)
    assert same(found(tmp_path, find, {WEIGHT: packed, f"{LAYER}.{leaf}": scale})[WEIGHT], reference)


def nvfp4(inputs: int = 96) -> Tensors:
    scale = random(24, inputs // 16, low=1, high=127, seed=1).view(E4M3)
    return {"weight_packed": random(24, inputs // 2), "weight_scale": scale}


@pytest.mark.parametrize("inputs", [16, 80, 96])
def test_nvfp4_equals_compressed_tensors(tmp_path: Path, inputs: int) -> None:
    args = QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16)
    parts = nvfp4(inputs) | {"weight_global_scale": torch.tensor([1234.5])}
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    reference = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized").decompress(dict(parts), scheme)["weight"]
    tensors = {f"{LAYER}.{k}": v for k, v in parts.items()} | {f"{LAYER}.input_global_scale": torch.ones(1)}
    assert same(found(tmp_path, find, tensors)[WEIGHT], reference)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_nvfp4_of_modelopt(tmp_path: Path, dtype: torch.dtype) -> None:
    packed, scale = nvfp4().values()
    second = torch.tensor(0.00123)
    reference = (values(packed) * (scale.float() * second).repeat_interleave(16, 1)).to(dtype)
    tensors = {WEIGHT: packed, SCALE: scale, f"{WEIGHT}_scale_2": second, "norm.weight": torch.ones(1, dtype=dtype)}
    assert same(found(tmp_path, find, tensors)[WEIGHT], reference)


def test_f4_of_safetensors_is_read(tmp_path: Path) -> None:
    packed, scale = random(24, 48), random(24, 3, low=100, high=150)
    arrays = {WEIGHT: ("F4", packed.numpy()), SCALE: ("F8_E8M0", scale.numpy())}
    file = write_checkpoint(tmp_path, arrays) / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b"[24,48]", b"[24,96]"))  # F4's shape counts numbers, not bytes
    checkpoint = Checkpoint.open(tmp_path)
    (tensor,) = find(checkpoint.tensors, {})
    reference = values(packed) * (scale.float() - 127).exp2().repeat_interleave(32, 1)
    assert same(decoded(checkpoint, tensor), reference.to(BF16))


BLOCKS, SCALES = {f"{EXPERTS}_blocks": random(2, 8, 2, 16)}, f"{EXPERTS}_scales"
HALF = {PACKED: random(8, 16)}
BROKEN: dict[str, tuple[Tensors, str]] = {
    "missing": (HALF, r"weight_packed is U8, but the checkpoint lacks .*weight_scale"),
    "no scales": (BLOCKS, r"gate_up_proj_blocks is U8, but .*\.gate_up_proj_scales"),
    "rows": (BLOCKS | {SCALES: random(2, 7, 2)}, r"shape \[2, 7, 2\], where .* needs \[2, 8, 2\]"),
    "block": ({f"{EXPERTS}_blocks": random(2, 8, 2, 8), SCALES: random(2, 8, 2)}, "a block of MXFP4 has 16 bytes"),
    "NaN": (BLOCKS | {SCALES: random(2, 8, 2, low=255)}, "16 values that are NaN"),
    "inputs": ({PACKED: random(8, 12), SCALE: random(8, 1)}, "whose 24 inputs are no blocks of 32"),
    "groups": (HALF | {SCALE: random(8, 2)}, r"shape \[8, 2\], where .* needs \[8, 1\]"),
    "global": (HALF | {SCALE: random(8, 2).view(E4M3)}, "lacks .*weight_global_scale or .*weight_scale_2"),
    "zero": (
        HALF | {SCALE: random(8, 2, low=1, high=2).view(E4M3), f"{WEIGHT}_global_scale": torch.zeros(1)},
        "weight_global_scale holds 1 scales that are zero",
    ),
    "dtype": ({WEIGHT: random(8, 16), SCALE: torch.ones(8, 1)}, "weight_scale is F32, not U8"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_does_not_fit_is_refused(tmp_path: Path, kind: str) -> None:
    tensors, said = BROKEN[kind]
    with pytest.raises(SourceError, match=said):
        found(tmp_path, find, tensors)
