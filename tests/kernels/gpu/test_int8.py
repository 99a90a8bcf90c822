"""The INT8 matrix product for GPUs, under Triton's interpreter: the bits that integers give, for every tile."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.interpreter import ON_GPU, Interpreted
from w8a8.kernels.gpu.tiles import FAMILIES, SAFE, Tile, architecture, family

pytestmark = pytest.mark.slow

MODULE = "w8a8.kernels.gpu.int8"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SMALL = Tile(16, 16, 32)
TABLES = [family(architecture("cuda"))] if ON_GPU else [*FAMILIES.values(), SAFE]
TABLED = sorted({tile for table in TABLES for _, *band in table.bands for tile in band}, key=str)
ARCHS = [architecture("cuda")] if ON_GPU else ["gfx1100", "gfx942", "sm_90"]


def codes(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randint(-128, 128, (rows, columns), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def operands(m: int, n: int, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Codes, scales and a bias."""
    g = torch.Generator().manual_seed(m * n + k)
    return codes(m, k, 1), codes(n, k, 2), torch.rand(m, 1, generator=g), torch.rand(n, generator=g), torch.randn(n)


def reference(
    x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Products in int64; each operation of the epilogue rounded to FP32, then to the result's dtype."""
    acc = torch.from_numpy(x.numpy().astype(np.int64) @ w.numpy().astype(np.int64).T)
    y = acc.float() * w_scale.reshape(1, -1) * x_scale.reshape(-1, 1)
    return (y if bias is None else y + bias.float()).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_it_equals_the_integer_reference_to_the_bit(interpreted: Interpreted, bias: bool, dtype: torch.dtype) -> None:
    x, w, x_scale, w_scale, b = operands(17, 70, 130)
    given_bias = b.to(dtype) if bias else None
    y = interpreted(MODULE, "scaled_int8_mm", x, w, x_scale, w_scale, given_bias, dtype)
    assert y.dtype == dtype
    assert torch.equal(y, reference(x, w, x_scale, w_scale, given_bias, dtype))


@pytest.mark.parametrize("tile", TABLED, ids=str)
def test_every_tile_of_the_tables_gives_the_same_bits(interpreted: Interpreted, tile: Tile) -> None:
    step = tile.block_k * tile.unroll
    x, w, x_scale, w_scale, bias = operands(tile.block_m + 3, tile.block_n + 5, step + 48)
    expected = reference(x, w, x_scale, w_scale, bias, torch.float32)
    for split in (1, 2):
        chosen = replace(tile, split_k=split)
        y = interpreted(MODULE, "scaled_int8_mm", x, w, x_scale, w_scale, bias, torch.float32, tile=chosen)
        assert torch.equal(y, expected)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 70),
    k=st.integers(1, 300),
    tile=st.builds(
        Tile,
        st.sampled_from([16, 32]),
        st.sampled_from([16, 32, 64]),
        st.sampled_from([32, 64]),
        unroll=st.integers(1, 3),
        group_m=st.integers(1, 3),
        split_k=st.integers(1, 5),
        swap=st.booleans(),
        masked=st.booleans(),
    ),
)
def test_any_shape_and_tile_gives_the_integer_reference(
    interpreted: Interpreted, m: int, n: int, k: int, tile: Tile
) -> None:
    x, w, x_scale, w_scale, bias = operands(m, n, k)
    y = interpreted(MODULE, "scaled_int8_mm", x, w, x_scale, w_scale, bias, torch.float32, tile=tile)
    assert torch.equal(y, reference(x, w, x_scale, w_scale, bias, torch.float32))


def test_the_largest_sums_are_exact(interpreted: Interpreted) -> None:
    k = (2**31 - 1) // 2**14
    x = torch.full((1, k), -128, dtype=torch.int8)
    w = torch.cat([x, -127 - x * 0, x * 0 + 127]).contiguous()
    one, ones = torch.ones(1), torch.ones(3)
    tile = Tile(16, 16, 512, unroll=8)
    y = interpreted(MODULE, "scaled_int8_mm", x, w, one, ones, None, torch.float32, tile=tile)
    assert y.tolist() == [[np.float32(k * 2**14), np.float32(k * 128 * 127), np.float32(-k * 128 * 127)]]
    longer = torch.zeros(1, k + 1, dtype=torch.int8)
    with pytest.raises(ValueError, match="K must be 1 to"):
        interpreted(MODULE, "scaled_int8_mm", longer, longer, one, one)


def test_extreme_scales_end_as_the_epilogue_says(interpreted: Interpreted) -> None:
    x, w, _, _, _ = operands(4, 33, 64)
    x_scale = torch.tensor([1e30, 1e-38, float("nan"), 0.0])
    w_scale = torch.full((33,), 1e10)
    y = interpreted(MODULE, "scaled_int8_mm", x, w, x_scale, w_scale, None, torch.float32)
    expected = reference(x, w, x_scale, w_scale, None, torch.float32)
    assert torch.equal(y.nan_to_num(7, 8, 9), expected.nan_to_num(7, 8, 9))
    assert y[0].isinf().any()
    assert y.isnan().all(dim=1).tolist() == [False, False, True, False]


def test_a_tokens_result_does_not_depend_on_its_batch(interpreted: Interpreted) -> None:
    x, w, x_scale, w_scale, bias = operands(80, 70, 512)
    whole = interpreted(MODULE, "scaled_int8_mm", x, w, x_scale, w_scale, bias, torch.bfloat16)
    for arch in ARCHS:
        for part in (slice(0, 1), slice(7, 20), slice(40, 80)):
            m = part.stop - part.start
            tile = interpreted("w8a8.kernels.gpu.tiles", "choose", arch, m, 70, 512)
            y = interpreted(
                MODULE, "scaled_int8_mm", x[part], w, x_scale[part], w_scale, bias, torch.bfloat16, tile=tile
            )
            assert torch.equal(y, whole[part])


def test_operands_may_be_views(interpreted: Interpreted) -> None:
    x, w, x_scale, w_scale, bias = operands(9, 40, 96)
    wide = torch.zeros(18, 203, dtype=torch.int8)
    wide[::2, 5:101] = x
    scales = torch.stack([x_scale, x_scale], dim=1)[:, 0]
    y = interpreted(MODULE, "scaled_int8_mm", wide[::2, 5:101], w, scales, w_scale, bias, torch.float32, tile=SMALL)
    assert torch.equal(y, reference(x, w, x_scale, w_scale, bias, torch.float32))


def test_no_tokens_make_an_empty_result(interpreted: Interpreted) -> None:
    x, w, x_scale, w_scale, _ = operands(1, 8, 32)
    assert interpreted(MODULE, "scaled_int8_mm", x[:0], w, x_scale[:0], w_scale).shape == (0, 8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({0: torch.zeros(3, 32)}, "x_q must be int8"),
        ({1: codes(8, 31)}, r"w_q must be int8 \[N, 32\]"),
        ({1: codes(32, 8).t()}, "contiguous along K"),
        ({2: torch.ones(2)}, "x_scale must be float32"),
        ({3: torch.ones(8, dtype=torch.float64)}, "w_scale must be float32"),
        ({4: torch.ones(7)}, r"bias must be floating \[8\]"),
        ({5: torch.int32}, "out_dtype"),
    ],
)
def test_operands_that_do_not_fit_are_refused(interpreted: Interpreted, changes: dict[int, object], words: str) -> None:
    args = [*operands(3, 8, 32)[:4], None, torch.bfloat16]
    for position, value in changes.items():
        args[position] = value
    with pytest.raises(ValueError, match=words):
        interpreted(MODULE, "scaled_int8_mm", *args)
