"""FP8 and INT8 with scales, against transformers and compressed-tensors, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from tests.sources.decoding import LAYER, Tensors, decoded, found, same, written
from w8a8.errors import SourceError
from w8a8.sources.scaled import find

E4M3, E5M2, E8M0 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
WEIGHT, SCALE_INV, SCALE = f"{LAYER}.weight", f"{LAYER}.weight_scale_inv", f"{LAYER}.weight_scale"


def codes(*shape: int, dtype: torch.dtype = E4M3) -> torch.Tensor:
    """Every code there is, and NaN only where the test is about it."""
    numbers = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    if dtype == torch.int8:
        return numbers.view(dtype)
    numbers[numbers & 0x7F >= 0x7C] = 0
    return numbers.view(dtype)


def scales(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    """Scales of many magnitudes."""
    exponents = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 4 - 8
    return exponents.exp2().to(dtype)


def blockwise(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Code times scale, spelled out."""
    wide = scale.float().repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return (weight.float() * wide[..., : weight.shape[-2], : weight.shape[-1]]).to(dtype)


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("kind", [E4M3, E5M2])
def test_every_code_becomes_the_number_that_torch_gives(tmp_path: Path, kind: torch.dtype, dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(kind).reshape(2, 128)
    norm = torch.ones(500, 1, dtype=dtype)  # says which dtype the model has
    tensors = {WEIGHT: every, SCALE: torch.ones(()), "norm.weight": norm}
    assert same(found(tmp_path, find, tensors)[WEIGHT], every.to(dtype))


@pytest.mark.parametrize("scale_dtype", [F32, BF16, E8M0])
@pytest.mark.parametrize("shape", [(256, 384), (3, 256, 128)])
def test_blocks_equal_transformers(tmp_path: Path, shape: tuple[int, ...], scale_dtype: torch.dtype) -> None:
    weight = codes(*shape)
    scale = scales(*shape[:-2], 2, shape[-1] // 128, dtype=scale_dtype)
    reference = Fp8Dequantize(None)._dequantize_one(weight, scale, output_dtype=BF16)
    declared = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    for config in (declared, {}):
        assert same(found(tmp_path, find, {WEIGHT: weight, SCALE_INV: scale}, config)[WEIGHT], reference)


def test_small_blocks_without_a_config_equal_transformers(tmp_path: Path) -> None:
    weight, scale = codes(64, 96), scales(64, 3).view(torch.int32) >> 23
    mx = scale.to(torch.uint8)  # MXFP8: exponents as U8, each for 32 weights
    reference = Fp8Dequantize(None)._dequantize_one(weight, mx, output_dtype=BF16)
    assert same(found(tmp_path, find, {WEIGHT: weight, SCALE_INV: mx})[WEIGHT], reference)


@pytest.mark.parametrize("shape", [(130, 257), (5, 7), (2, 129, 200)])
def test_the_last_blocks_may_stick_out(tmp_path: Path, shape: tuple[int, ...]) -> None:
    weight, scale = codes(*shape), scales(*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    assert same(
        found(tmp_path, find, {WEIGHT: weight, SCALE_INV: scale})[WEIGHT], blockwise(weight, scale, (128, 128), BF16)
    )


def test_transposed_rows_are_columns(tmp_path: Path) -> None:
    weight, scale = codes(130, 257), scales(2, 3)
    checkpoint = written(tmp_path, {WEIGHT: weight, SCALE_INV: scale})
    (tensor,) = find(checkpoint.tensors, {})
    turned = type(tensor)(
        tensor.name, tensor.dtype, (257, 130), tensor.stored, tensor.decoder.transposed(), tensor.beside
    )
    assert same(decoded(checkpoint, turned), blockwise(weight, scale, (128, 128), BF16).T.contiguous())
    assert tensor.decoder.transposed().transposed() == tensor.decoder


def test_the_scale_may_lie_in_another_shard(tmp_path: Path) -> None:
    weight, scale = codes(8, 8), scales(1, 1)
    checkpoint = written(tmp_path, {WEIGHT: weight, SCALE_INV: scale}, shards=2)
    (tensor,) = find(checkpoint.tensors, {})
    assert tensor.beside[0].shard != tensor.shard
    assert same(decoded(checkpoint, tensor), blockwise(weight, scale, (8, 8), BF16))


ARGS: dict[str, dict[str, Any]] = {
    "tensor": {"num_bits": 8, "type": "float", "strategy": "tensor"},
    "channel": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "block": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 32]},
    "int channel": {"num_bits": 8, "type": "int", "strategy": "channel"},
    "int tensor": {"num_bits": 8, "type": "int", "strategy": "tensor"},
    "int group": {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 32},
    "int asymmetric": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False},
}  # fmt: skip
SHAPES = {"tensor": (1,), "channel": (80, 1), "block": (5, 3), "group": (80, 3), "asymmetric": (80, 1)}


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("kind", ARGS)
def test_equal_to_compressed_tensors(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    args = QuantizationArgs(**ARGS[kind])
    weight = codes(80, 96, dtype=torch.int8 if args.type == "int" else E4M3)
    parts = {"weight": weight, "weight_scale": scales(*SHAPES[kind.split()[-1]], dtype=dtype)}
    if not args.symmetric:
        parts["weight_zero_point"] = codes(80, 1, dtype=torch.int8)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    reference = BaseCompressor.get_value_from_registry("naive-quantized").decompress(parts, scheme)["weight"]
    tensors = {f"{LAYER}.{leaf}": tensor for leaf, tensor in parts.items()} | {
        "norm.weight": torch.ones(5, dtype=dtype)
    }
    declared = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": ARGS[kind]}}}
    assert same(found(tmp_path, find, tensors, declared)[WEIGHT], reference)


def test_mxfp8_equals_compressed_tensors(tmp_path: Path) -> None:
    args = QuantizationArgs(num_bits=8, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8)
    parts = {"weight": codes(16, 96), "weight_scale": torch.arange(16 * 3, dtype=torch.uint8).reshape(16, 3) + 100}
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    reference = BaseCompressor.get_value_from_registry("mxfp8-quantized").decompress(parts, scheme)["weight"]
    assert same(found(tmp_path, find, {f"{LAYER}.{k}": v for k, v in parts.items()})[WEIGHT], reference)


def test_bitsandbytes_int8(tmp_path: Path) -> None:
    weight, scb = codes(16, 24, dtype=torch.int8), scales(16)
    tensors = {WEIGHT: weight, f"{LAYER}.SCB": scb, f"{LAYER}.weight_format": torch.zeros((), dtype=torch.uint8)}
    reference = (weight * scb.view(-1, 1) * 7.874015718698502e-3).to(BF16)  # transformers, integrations/bitsandbytes.py
    assert same(found(tmp_path, find, tensors)[WEIGHT], reference)


def test_this_tools_own_results_in_both_spellings(tmp_path: Path) -> None:
    weight, scale = codes(16, 24, dtype=torch.int8), scales(16)
    for shape in ((16,), (16, 1)):
        tensors = {WEIGHT: weight, SCALE: scale.reshape(shape)}
        assert same(found(tmp_path, find, tensors)[WEIGHT], (weight * scale.view(-1, 1)).to(BF16))


def test_scales_of_experts_one_for_each_or_one_for_all(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    weight = codes(3, 16, 24)
    for scale in (
        scales(3),
        scales(3, 1, 1),
        scales(1),
        scales(3, 16, 1),
        scales(3, 1, 24),
        scales(3, 1, 1).squeeze(-1),
    ):
        wide = scale if scale.dim() == 3 else scale.reshape(-1, 1, 1)
        assert same(
            found(tmp_path, find, {name: weight, f"{name}_scale": scale})[name], (weight.float() * wide).to(BF16)
        )


def test_what_belongs_to_activations_is_claimed_too(tmp_path: Path) -> None:
    key = "model.layers.0.self_attn.k_proj"
    extra = {f"{key}.input_scale", f"{key}.k_scale", "model.layers.0.self_attn.v_scale"}
    tensors = {f"{key}.weight": codes(8, 8), f"{key}.weight_scale": scales(1)} | dict.fromkeys(extra, torch.ones(()))
    (tensor,) = find(written(tmp_path, tensors).tensors, {})
    assert {spec.name for spec in tensor.beside[1:]} == extra


CODES = codes(8, 8, dtype=torch.int8)
BROKEN: dict[str, tuple[Tensors, dict[str, Any], str]] = {
    "missing": ({WEIGHT: codes(8, 8)}, {}, r"up_proj\.weight is F8_E4M3, but the checkpoint lacks .*weight_scale_inv"),
    "dtype": ({WEIGHT: codes(8, 8), SCALE_INV: torch.ones(1, 1).int()}, {}, "scale_inv is I32, not BF16"),
    "no blocks": ({WEIGHT: codes(130, 128), SCALE_INV: scales(3, 1)}, {}, r"shape \[3, 1\], which .*no blocks"),
    "length": ({WEIGHT: codes(8, 8), SCALE: scales(7)}, {}, r"weight_scale has the shape \[7\]"),
    "config": (
        {WEIGHT: codes(128, 128), SCALE_INV: scales(2, 2)},
        {"weight_block_size": [128, 128]},
        r"shape \[2, 2\]; the config's blocks of 128 x 128 of F8_E4M3 \[128, 128\] do not give it",
    ),
    "zero point": (
        {WEIGHT: CODES, SCALE: scales(8, 1), f"{WEIGHT}_zero_point": CODES},
        {},
        r"zero_point has the shape \[8, 8\], where",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_what_does_not_fit_is_refused_from_the_headers(tmp_path: Path, kind: str) -> None:
    tensors, declared, said = BROKEN[kind]
    checkpoint = written(tmp_path, tensors)
    with pytest.raises(SourceError, match=said) as caught:
        list(find(checkpoint.tensors, declared))
    assert "BF16 original" in str(caught.value)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.0, "1 scales that are zero"),
        (-1.0, "1 scales that are negative"),
        (float("nan"), "1 values that are NaN or infinite"),
        (float("inf"), "1 values that are NaN or infinite"),
    ],
)
def test_scales_that_are_none_are_refused(tmp_path: Path, value: float, said: str) -> None:
    scale = scales(8, 1)
    scale[3] = value
    for weight in (codes(8, 8), codes(8, 8, dtype=torch.int8)):
        with pytest.raises(SourceError, match=rf"model\.safetensors: .*up_proj\.weight_scale holds {said}"):
            found(tmp_path, find, {WEIGHT: weight, SCALE: scale})
