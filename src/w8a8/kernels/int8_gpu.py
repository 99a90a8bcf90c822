"""INT8 matrix products on a GPU, in Triton: `y = (x_q @ w_q.T) * w_scale * x_scale + bias`, accumulated in INT32.

The epilogue is FP32, in this order, `(acc * w_scale) * x_scale + bias`, every operation rounded (no fused
multiply-add), and rounded once more to the result's dtype.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from w8a8.kernels.tiles import Tile, architecture, choose


def scaled_int8_mm(
    x_q: Tensor,
    w_q: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype = torch.bfloat16,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """`x_q` int8 [M, K] times `w_q` int8 [N, K], scaled by `x_scale` f32 [M] and `w_scale` f32 [N], to [M, N]."""
    (m, k), (n, _) = x_q.shape, w_q.shape
    y = torch.empty(m, n, dtype=out_dtype, device=x_q.device)
    if m == 0:
        return y
    tile = tile or choose(architecture(x_q.device), m, n, k)
    grid = (triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n),)
    _tile_kernel[grid](
        x_q,
        w_q,
        x_scale,
        w_scale,
        w_scale if bias is None else bias,
        y,
        m,
        n,
        k,
        x_q.stride(0),
        w_q.stride(0),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=tile.group_m,
        EVEN_K=k % tile.block_k == 0,
        HAS_BIAS=bias is not None,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=False,
    )
    return y


@triton.jit
def _tile_kernel(
    x_ptr,
    w_ptr,
    x_scale_ptr,
    w_scale_ptr,
    bias_ptr,
    y_ptr,
    m,
    n,
    k,
    x_stride,
    w_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    program = tl.program_id(0)
    blocks_m = tl.cdiv(m, BLOCK_M)
    blocks_n = tl.cdiv(n, BLOCK_N)
    group = program // (GROUP_M * blocks_n)
    rows_of_group = min(blocks_m - group * GROUP_M, GROUP_M)
    in_group = program % (GROUP_M * blocks_n)
    first_m = (group * GROUP_M + in_group % rows_of_group) * BLOCK_M
    first_n = in_group // rows_of_group * BLOCK_N

    tokens = tl.arange(0, BLOCK_M)
    channels = tl.arange(0, BLOCK_N)
    inputs = tl.arange(0, BLOCK_K)
    x_rows = tl.minimum(tokens, m - 1 - first_m)
    w_rows = tl.minimum(channels, n - 1 - first_n)
    x_ptr += first_m.to(tl.int64) * x_stride
    w_ptr += first_n.to(tl.int64) * w_stride
    x_offsets = x_rows[:, None] * x_stride + inputs[None, :]
    w_offsets = w_rows[None, :] * w_stride + inputs[:, None]

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, k, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptr + x_offsets)
            w = tl.load(w_ptr + w_offsets)
        else:
            x = tl.load(x_ptr + x_offsets, mask=inputs[None, :] < k - start, other=0)
            w = tl.load(w_ptr + w_offsets, mask=inputs[:, None] < k - start, other=0)
        acc = tl.dot(x, w, acc, out_dtype=tl.int32)
        x_ptr += BLOCK_K
        w_ptr += BLOCK_K

    w_scale = tl.load(w_scale_ptr + first_n + channels, mask=first_n + channels < n, other=0)
    x_scale = tl.load(x_scale_ptr + first_m + tokens, mask=first_m + tokens < m, other=0)
    y = acc.to(tl.float32) * w_scale[None, :] * x_scale[:, None]
    if HAS_BIAS:
        y += tl.load(bias_ptr + first_n + channels, mask=first_n + channels < n, other=0).to(tl.float32)[None, :]
    offsets = (first_m + tokens).to(tl.int64)[:, None] * n + (first_n + channels)[None, :]
    tl.store(
        y_ptr + offsets,
        y.to(y_ptr.dtype.element_ty),
        mask=(first_m + tokens < m)[:, None] & (first_n + channels < n)[None, :],
    )
