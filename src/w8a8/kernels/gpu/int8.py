"""INT8 matrix products on a GPU, in Triton: INT8 x INT8 -> INT32 on the matrix units, scales and bias in the epilogue.

This is the second half of the W8A8 layer (`runtime/linear.py` describes all of it):

    acc = sum over k of x_q[m, k] * w_q[n, k]          INT32, exact
    y   = (acc * w_scale[n]) * x_scale[m] + bias[n]    FP32, in this order, each operation rounded; then to y's dtype

Weights are K-major, as in the checkpoint, and so are activations: both are read 16 bytes at a time along K, and nothing
is transposed. Rows past the end read the last row again, which is never stored. That costs nothing where a cache
answers all lanes at once; on Hopper, with one token, it took a quarter of the time, so there such rows are masked
(`Tile.masked`). No other load has a mask.
Where K is no multiple of a step, the last step reaches back, with zeros for the inputs that were added before. A tile's
first row is addressed with 64 bits, its elements from there with 32. Rows that do not begin at multiples of 16 bytes,
or are shorter than a step, are copied first; no known model has such rows.

With few tokens, reading weights takes the time, and too few tiles would leave compute units idle. Then `Tile.split_k`
programs share the dot products of a tile: each writes its INT32 sums to its own workspace, and a second, small kernel
adds them up. Atomic adds of integers would be as exact, but their target must be zeroed first, and scales and bias
would still need the second kernel. With few tokens the weights also take the rows of the matrix instruction and the
tokens its columns (`Tile.swap`): NVIDIA's instructions have 64 or 16 rows and as few as 8 columns.

Integers add up exactly in any order, and every kernel has the same epilogue, without fused multiply-adds. So every
tile, split and batch gives the same bits: results are deterministic, and a token's result does not depend on the tokens
beside it. This always holds; there is no flag and no slower path for it.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from w8a8.kernels.gpu.tiles import Tile, architecture, choose

MAX_K = (2**31 - 1) // (128 * 128)
"""Longer dot products could overflow INT32."""
OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_ALIGNED = 16
"""Bytes that a lane loads at once."""
_FINISHED_AT_ONCE = 1024
"""Results per program of split-K's second kernel."""


def scaled_int8_mm(
    x_q: Tensor,
    w_q: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """Multiply `x_q` int8 [M, K] by `w_q` int8 [N, K] transposed, scale, and add the bias: [M, N] of `out_dtype`.

    `x_scale` float32 [M] or [M, 1]; `w_scale` float32 [N] or [N, 1]; `bias` [N] of any floating dtype; `out_dtype`
    BF16, FP16 or FP32. `tile` defaults to the one that `tiles.choose` returns. Raises ValueError for other operands.
    """
    # 1) Check the operands, and choose a tile.
    m, n, k = _checked(x_q, w_q, x_scale, w_scale, bias, out_dtype)
    y = torch.empty(m, n, dtype=out_dtype, device=x_q.device)
    if m == 0:
        return y
    tile = tile or choose(architecture(x_q.device), m, n, k)
    # 2) Align K, and divide it among programs.
    step = tile.block_k * tile.unroll
    k = max(step, triton.cdiv(k, _ALIGNED) * _ALIGNED)
    x_q, w_q = _fitting(x_q, k), _fitting(w_q, k)
    share = triton.cdiv(triton.cdiv(k, tile.split_k), step)
    splits = triton.cdiv(k, share * step)
    # 3) Multiply; where programs share dot products, a second kernel finishes.
    scales = (x_scale.contiguous(), w_scale.contiguous(), None if bias is None else bias.contiguous())
    target = y if splits == 1 else torch.empty(splits, m, n, dtype=torch.int32, device=x_q.device)
    _product_kernel[(triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n), splits)](
        x_q,
        w_q,
        *scales,
        target,
        m,
        n,
        k,
        share,
        x_q.stride(0),
        w_q.stride(0),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        UNROLL=tile.unroll,
        GROUP_M=tile.group_m,
        SWAP=tile.swap,
        MASKED=tile.masked,
        SPLIT=splits > 1,
        TAIL=k % step != 0,
        enable_fp_fusion=False,
        **tile.compiler_options(),
    )
    if splits > 1:
        _finish_kernel[(m, triton.cdiv(n, _FINISHED_AT_ONCE))](
            target, *scales, y, m, n, splits, BLOCK=_FINISHED_AT_ONCE, num_warps=4, enable_fp_fusion=False
        )
    return y


def _checked(
    x_q: Tensor, w_q: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> tuple[int, int, int]:
    """Return M, N and K of operands that fit together; raise ValueError for others."""
    m, k = x_q.shape if x_q.dim() == 2 else (-1, -1)
    n = w_q.shape[0] if w_q.dim() == 2 else -1
    sound = {
        "x_q must be int8 [M, K], contiguous along K": m >= 0 and x_q.dtype == torch.int8 and x_q.stride(1) == 1,
        f"w_q must be int8 [N, {k}], contiguous along K": n > 0
        and w_q.shape[1] == k
        and w_q.dtype == torch.int8
        and w_q.stride(1) == 1,
        f"K must be 1 to {MAX_K}": 0 < k <= MAX_K,
        f"x_scale must be float32 [{m}] or [{m}, 1]": x_scale.dtype == torch.float32 and _is_column(x_scale, m),
        f"w_scale must be float32 [{n}] or [{n}, 1]": w_scale.dtype == torch.float32 and _is_column(w_scale, n),
        f"bias must be floating [{n}]": bias is None or (bias.is_floating_point() and bias.shape == (n,)),
        f"out_dtype must be one of {[*OUT_DTYPES]}": out_dtype in OUT_DTYPES,
    }
    for demand, met in sound.items():
        if not met:
            raise ValueError(demand)
    return m, n, k


def _fitting(codes: Tensor, k: int) -> Tensor:
    """Return `codes` if its rows are `k` long and aligned, else a copy with such rows, padded with zeros."""
    if codes.shape[1] == k and codes.stride(0) % _ALIGNED == 0 and codes.data_ptr() % _ALIGNED == 0:
        return codes
    fitting = codes.new_zeros(codes.shape[0], k)
    fitting[:, : codes.shape[1]] = codes
    return fitting


def _is_column(scale: Tensor, rows: int) -> bool:
    return scale.shape in ((rows,), (rows, 1))


@triton.jit(do_not_specialize=["m", "share"])
def _product_kernel(
    x_ptr,
    w_ptr,
    x_scale_ptr,
    w_scale_ptr,
    bias_ptr,
    y_ptr,
    m,
    n,
    k,
    share,
    x_stride,
    w_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNROLL: tl.constexpr,
    GROUP_M: tl.constexpr,
    SWAP: tl.constexpr,
    MASKED: tl.constexpr,
    SPLIT: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Compute one tile: finished, into `y` [M, N]; or with SPLIT its share of K, into INT32 `y` [splits, M, N]."""
    first_m, first_n = _place(m, n, BLOCK_M, BLOCK_N, GROUP_M)
    tokens = first_m + tl.arange(0, BLOCK_M)
    channels = first_n + tl.arange(0, BLOCK_N)
    inputs = tl.arange(0, BLOCK_K)
    x_ptr += first_m.to(tl.int64) * x_stride
    w_ptr += first_n.to(tl.int64) * w_stride
    length = k
    if SPLIT:
        start = tl.program_id(1) * share * (BLOCK_K * UNROLL)  # as a product, or loads would not be known to be aligned
        x_ptr += start
        w_ptr += start
        length = tl.minimum(k - start, share * (BLOCK_K * UNROLL))
    x_rows = (tl.minimum(tokens, m - 1) - first_m) * x_stride
    w_rows = (tl.minimum(channels, n - 1) - first_n) * w_stride

    if SWAP:
        a, b = w_ptr + w_rows[:, None] + inputs[None, :], x_ptr + x_rows[None, :] + inputs[:, None]
        there = (tokens < m)[None, :] if MASKED else None
        acc = _accumulate(a, b, None, there, length, inputs, BLOCK_N, BLOCK_M, BLOCK_K, UNROLL, TAIL)
        tokens, channels = tokens[None, :], channels[:, None]
    else:
        a, b = x_ptr + x_rows[:, None] + inputs[None, :], w_ptr + w_rows[None, :] + inputs[:, None]
        there = (tokens < m)[:, None] if MASKED else None
        acc = _accumulate(a, b, there, None, length, inputs, BLOCK_M, BLOCK_N, BLOCK_K, UNROLL, TAIL)
        tokens, channels = tokens[:, None], channels[None, :]

    offsets = tokens.to(tl.int64) * n + channels
    inside = (tokens < m) & (channels < n)
    if SPLIT:
        tl.store(y_ptr + tl.program_id(1).to(tl.int64) * m * n + offsets, acc, mask=inside)
    else:
        y = _scaled(acc, x_scale_ptr, w_scale_ptr, bias_ptr, tokens, channels, m, n)
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _place(m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Return the first token and channel of this program's tile. GROUP_M rows of tiles share caches on their way."""
    program = tl.program_id(0)
    rows, columns = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    group = program // (GROUP_M * columns)
    height = tl.minimum(rows - group * GROUP_M, GROUP_M)
    place = program % (GROUP_M * columns)
    return (group * GROUP_M + place % height) * BLOCK_M, place // height * BLOCK_N


@triton.jit
def _accumulate(
    a,
    b,
    a_there,
    b_there,
    length,
    inputs,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNROLL: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Multiply the values at the pointers `a` [ROWS, BLOCK_K] and `b` [BLOCK_K, COLUMNS], to INT32 [ROWS, COLUMNS]."""
    acc = tl.zeros((ROWS, COLUMNS), tl.int32)
    step: tl.constexpr = BLOCK_K * UNROLL
    whole = length - length % step if TAIL else length
    for _ in range(0, whole, step):
        for part in tl.static_range(UNROLL):
            acc = tl.dot(
                _rows(a + part * BLOCK_K, a_there), _rows(b + part * BLOCK_K, b_there), acc, out_dtype=tl.int32
            )
        a += step
        b += step
    if TAIL:
        # Inputs of the last step that were added already; written this way, the compiler sees their alignment.
        known = (length // step + 1) * step - length
        a -= known
        b -= known
        for part in tl.static_range(UNROLL):
            fresh = inputs + part * BLOCK_K >= known
            last = tl.where(fresh[None, :], _rows(a + part * BLOCK_K, a_there), 0)
            acc = tl.dot(last, _rows(b + part * BLOCK_K, b_there), acc, out_dtype=tl.int32)
    return acc


@triton.jit
def _rows(pointers, there):
    """Load rows of codes: all, or those that are `there`, and zeros for the others."""
    return tl.load(pointers) if there is None else tl.load(pointers, mask=there, other=0)


@triton.jit
def _scaled(acc, x_scale_ptr, w_scale_ptr, bias_ptr, tokens, channels, m, n):
    """Apply the epilogue, in FP32: `(acc * w_scale) * x_scale + bias`; `bias_ptr` is None for layers without a bias."""
    y = acc.to(tl.float32) * tl.load(w_scale_ptr + channels, mask=channels < n, other=0)
    y = y * tl.load(x_scale_ptr + tokens, mask=tokens < m, other=0)
    if bias_ptr is not None:
        y = y + tl.load(bias_ptr + channels, mask=channels < n, other=0).to(tl.float32)
    return y


@triton.jit(do_not_specialize=["m", "splits"])
def _finish_kernel(partial_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, y_ptr, m, n, splits, BLOCK: tl.constexpr):
    """Add up `splits` INT32 products [M, N] and finish them, BLOCK channels of one token per program."""
    token = tl.program_id(0)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channels < n
    offsets = token.to(tl.int64) * n + channels
    size = m.to(tl.int64) * n
    acc = tl.zeros((BLOCK,), tl.int32)
    for split in range(splits):
        acc += tl.load(partial_ptr + split * size + offsets, mask=inside, other=0)
    y = _scaled(acc, x_scale_ptr, w_scale_ptr, bias_ptr, token, channels, m, n)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)
