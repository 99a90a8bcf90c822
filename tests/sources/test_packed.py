"""compressed-tensors' packed integers, against compressed-tensors, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from tests.sources.decoding import LAYER, Tensors, found, same
from w8a8.errors import SourceError
from w8a8.sources.packed import find

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
WEIGHT = f"{LAYER}.weight"
COMPRESSOR = BaseCompressor.get_value_from_registry("pack-quantized")


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def packed(rows: int, columns: int, args: dict[str, Any], dtype: torch.dtype) -> tuple[Tensors, torch.Tensor]:
    """A weight as compressed-tensors packs it, and what it makes of that."""
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    bits, groups = args["num_bits"], columns // args.get("group_size", columns)
    parts = {
        "weight": torch.randn(rows, columns, generator=random(0)).to(dtype),
        "weight_scale": (torch.rand(rows, groups, generator=random(1)) * 0.2 + 0.01).to(dtype),
    }
    if not args.get("symmetric", True):
        limit = 1 << bits - 1
        parts["weight_zero_point"] = torch.randint(-limit, limit, (rows, groups), dtype=torch.int8, generator=random(2))
    parts = COMPRESSOR.compress(parts, scheme)
    tensors = {f"{LAYER}.{leaf}": tensor for leaf, tensor in parts.items()}
    return tensors | {"norm.weight": torch.ones(9, dtype=dtype)}, COMPRESSOR.decompress(parts, scheme)["weight"]


CASES: dict[str, dict[str, Any]] = {
    "4 bits": {"num_bits": 4, "strategy": "group", "group_size": 32},
    "4 bits, asymmetric": {"num_bits": 4, "strategy": "group", "group_size": 16, "symmetric": False},
    "4 bits, channel": {"num_bits": 4, "strategy": "channel"},
    "8 bits": {"num_bits": 8, "strategy": "group", "group_size": 32},
    "8 bits, channel, asymmetric": {"num_bits": 8, "strategy": "channel", "symmetric": False},
    "3 bits": {"num_bits": 3, "strategy": "group", "group_size": 32, "symmetric": False},
}


def declared(args: dict[str, Any]) -> dict[str, Any]:
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": args}}}


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("kind", CASES)
def test_equal_to_compressed_tensors(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    tensors, reference = packed(24, 96, CASES[kind], dtype)
    assert same(found(tmp_path, find, tensors, declared(CASES[kind]))[WEIGHT], reference)


def test_four_bits_need_no_config(tmp_path: Path) -> None:
    tensors, reference = packed(24, 96, CASES["4 bits"], BF16)
    assert same(found(tmp_path, find, tensors)[WEIGHT], reference)


def test_a_group_of_the_config_is_for_the_layers_that_it_names(tmp_path: Path) -> None:
    tensors, reference = packed(24, 96, CASES["8 bits"], BF16)
    config = declared(CASES["4 bits"])
    config["config_groups"]["group_1"] = {"targets": ["re:.*up_proj"], "weights": CASES["8 bits"]}
    assert same(found(tmp_path, find, tensors, config)[WEIGHT], reference)


def test_inputs_in_the_order_of_their_activations(tmp_path: Path) -> None:
    tensors, plain = packed(8, 64, CASES["4 bits"], BF16)
    order = torch.tensor([1, 0]).repeat(32).to(torch.int32)
    scale = tensors[f"{WEIGHT}_scale"].float()
    codes = (plain.float() / scale.repeat_interleave(32, 1)).round()
    reference = (codes * scale[:, order.long()]).to(BF16)
    assert same(found(tmp_path, find, tensors | {f"{WEIGHT}_g_idx": order})[WEIGHT], reference)
    for same_order in (torch.arange(64).int() // 32, torch.full((64,), -1).int()):
        assert same(found(tmp_path, find, tensors | {f"{WEIGHT}_g_idx": same_order})[WEIGHT], plain)


def broken(kind: str) -> tuple[Tensors, dict[str, Any], str]:
    tensors, _ = packed(24, 96, CASES["4 bits, asymmetric"], BF16)
    config = declared(CASES["4 bits, asymmetric"])
    scale, zero = tensors[f"{WEIGHT}_scale"], tensors[f"{WEIGHT}_zero_point"]
    changes: dict[str, tuple[Tensors, str]] = {
        "missing": ({}, "lacks .*up_proj.weight_scale"),
        "groups": ({f"{WEIGHT}_scale": scale[:, :5]}, r"\[24, 5\], which divides 96 inputs into no groups"),
        "config": ({f"{WEIGHT}_scale": scale[:, :3]}, r"\[24, 3\]; the config's groups of 16 do not give it"),
        "zero point": ({f"{WEIGHT}_zero_point": zero[:2]}, r"shape \[2, 6\], where .* needs \[3, 6\]"),
        "shape": ({f"{WEIGHT}_shape": torch.tensor([24, 48])}, r"says \[24, 48\], where 4 bits .* \[24, 96\]"),
        "zero": ({f"{WEIGHT}_scale": torch.zeros_like(scale)}, "holds 144 scales that are zero"),
        "order": ({f"{WEIGHT}_g_idx": torch.arange(96).int()}, "g_idx names groups from 0 to 95, where there are 6"),
    }  # fmt: skip
    change, said = changes[kind]
    tensors |= change
    if kind == "missing":
        del tensors[f"{WEIGHT}_scale"]
    return tensors, config, said


@pytest.mark.parametrize("kind", ["missing", "groups", "config", "zero point", "shape", "zero", "order"])
def test_what_does_not_fit_is_refused(tmp_path: Path, kind: str) -> None:
    tensors, config, said = broken(kind)
    with pytest.raises(SourceError, match=said):
        found(tmp_path, find, tensors, config)
