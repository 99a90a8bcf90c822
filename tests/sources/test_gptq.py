"""GPTQ and AWQ, against their layouts spelled out in torch: see the definitions that `sources/gptq.py` names."""

from pathlib import Path

import pytest
import torch

from tests.sources.decoding import LAYER, Tensors, found, same
from w8a8.errors import AlreadyQuantizedError, SourceError
from w8a8.sources.gptq import find

BF16, F16 = torch.bfloat16, torch.float16
IN, OUT, GROUP = 64, 32, 32
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def random(*shape: int, below: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(seed))


def words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows of codes as rows of 32-bit words: each code written bit by bit, the lowest bit first."""
    stream = (codes[..., None] >> torch.arange(bits)) & 1
    each = stream.reshape(codes.shape[0], -1, 32)
    return (each << torch.arange(32)).sum(-1).to(torch.uint32).view(torch.int32)


def gptq(
    bits: int, dtype: torch.dtype, version: int = 1, order: torch.Tensor | None = None
) -> tuple[Tensors, torch.Tensor]:
    """A layer's tensors, and the weights that they mean."""
    codes, zero = random(OUT, IN, below=1 << bits), random(IN // GROUP, OUT, below=1 << bits, seed=1)
    scale = (random(IN // GROUP, OUT, below=1000, seed=2) / 7000 + 0.01).to(dtype)
    group = torch.arange(IN) // GROUP if order is None else order
    numbers = (codes - zero[group].T).float() * scale[group].T.float()
    stored = (zero - 1) & ((1 << bits) - 1) if version == 1 else zero
    tensors = {
        "qweight": words(codes, bits).T.contiguous(),
        "qzeros": words(stored, bits),
        "scales": scale,
        "g_idx": group.int(),
    }
    return {f"{LAYER}.{leaf}": tensor for leaf, tensor in tensors.items()}, numbers.to(dtype)


def awq(dtype: torch.dtype) -> tuple[Tensors, torch.Tensor]:
    """A layer's tensors, and the weights that they mean."""
    codes, zero = random(IN, OUT, below=16), random(IN // GROUP, OUT, below=16, seed=1)
    scale = (random(IN // GROUP, OUT, below=1000, seed=2) / 7000 + 0.01).to(dtype)
    numbers = (codes - zero.repeat_interleave(GROUP, 0)).float() * scale.repeat_interleave(GROUP, 0).float()
    shuffled = [part.reshape(len(part), -1, 8)[..., AWQ_ORDER].reshape(part.shape) for part in (codes, zero)]
    tensors = {"qweight": words(shuffled[0], 4), "qzeros": words(shuffled[1], 4), "scales": scale}
    return {f"{LAYER}.{leaf}": tensor for leaf, tensor in tensors.items()}, numbers.T.contiguous().to(dtype)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(tmp_path: Path, bits: int, dtype: torch.dtype) -> None:
    tensors, reference = gptq(bits, dtype)
    declared = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "checkpoint_format": "gptq"}
    for config in ({}, declared):
        assert same(found(tmp_path, find, tensors, config)[f"{LAYER}.weight"], reference)


def test_gptq_version_2_stores_zero_points_as_they_are(tmp_path: Path) -> None:
    tensors, reference = gptq(4, F16, version=2)
    assert same(found(tmp_path, find, tensors, {"checkpoint_format": "gptq_v2"})[f"{LAYER}.weight"], reference)


def test_gptq_inputs_in_the_order_of_their_activations(tmp_path: Path) -> None:
    tensors, reference = gptq(4, F16, order=random(IN, below=IN // GROUP, seed=5))
    assert same(found(tmp_path, find, tensors)[f"{LAYER}.weight"], reference)


def test_gptq_with_a_last_group_that_is_smaller(tmp_path: Path) -> None:
    tensors, _ = gptq(4, F16)
    codes = (tensors[f"{LAYER}.qweight"].T[..., None] >> torch.arange(0, 32, 4)).reshape(OUT, IN) & 15
    group = torch.arange(IN) // 48
    tensors[f"{LAYER}.g_idx"] = group.int()
    zero = ((tensors[f"{LAYER}.qzeros"][..., None] >> torch.arange(0, 32, 4)).reshape(-1, OUT) + 1) & 15
    reference = ((codes - zero[group].T).float() * tensors[f"{LAYER}.scales"][group].T.float()).to(F16)
    assert same(found(tmp_path, find, tensors, {"group_size": 48})[f"{LAYER}.weight"], reference)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_awq(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors, reference = awq(dtype)
    for config in ({}, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}):
        assert same(found(tmp_path, find, tensors, config)[f"{LAYER}.weight"], reference)


BROKEN: dict[str, tuple[Tensors, dict[str, object], str]] = {
    "no scales": ({}, {}, r"up_proj\.qweight is I32, but the checkpoint lacks .*up_proj\.scales"),
    "no zeros": ({"scales": torch.ones(2, OUT)}, {}, r"lacks .*up_proj\.qzeros"),
    "outputs": ({"scales": torch.ones(2, 31)}, {}, "fits I32 .* neither as GPTQ nor as AWQ"),
    "zeros": ({"qzeros": torch.ones(3, 4).int()}, {}, r"qzeros has the shape \[3, 4\], where"),
    "groups": ({"scales": torch.ones(3, OUT), "qzeros": torch.ones(3, 4).int()}, {}, "3 groups, which do not"),
    "bits": ({"scales": torch.ones(2, OUT)}, {"bits": 8}, "4 bits a weight by its shape and 8 by the config"),
    "group size": ({"scales": torch.ones(2, OUT)}, {"group_size": 16}, "the config's groups of 16 do not give it"),
    "NaN": ({"scales": torch.full((2, OUT), torch.nan)}, {}, "holds 64 values that are NaN"),
    "order": ({"g_idx": torch.arange(63).int()}, {}, r"g_idx has the shape \[63\]"),
    "group": ({"g_idx": torch.full((IN,), 2).int()}, {}, "g_idx names groups from 2 to 2, where there are 2"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_what_does_not_fit_is_refused(tmp_path: Path, kind: str) -> None:
    change, config, said = BROKEN[kind]
    tensors = gptq(4, F16)[0] | {f"{LAYER}.{leaf}": tensor for leaf, tensor in change.items()}
    if kind.startswith("no "):
        del tensors[f"{LAYER}.{'scales' if kind == 'no scales' else 'qzeros'}"]
    with pytest.raises(SourceError, match=said):
        found(tmp_path, find, tensors, config)


def test_other_layouts_of_awq_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AlreadyQuantizedError, match="AWQ gemv is not read"):
        found(tmp_path, find, awq(F16)[0], {"version": "gemv"})
