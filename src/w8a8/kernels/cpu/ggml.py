"""Decodes ggml's blocks, in which GGUF files hold weights: an integer of 2 to 8 bits an element, scales a block.

Each dtype's layout is a `block_*` struct of ggml's `ggml-common.h`; the arithmetic, in float32 and in this order, is
that of `dequantize_row_*` in `ggml-quants.c` and of the package gguf (`gguf.quants`), whose result is the same bit for
bit. Loops take `blocks` [blocks, bytes of one] and write bit patterns of BF16, F16 or F32 (`bits.BITS`) into `out`
[blocks, elements of one]. Dtypes that few files have are decoded by the package itself.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from w8a8.kernels.cpu.bits import Bits
from w8a8.kernels.cpu.ir import as_float32, rounded_bits
from w8a8.kernels.cpu.jit import jit

Blocks = NDArray[np.uint8]

_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)
"""Twice the numbers of FP4."""


@jit()
def _half(block, at):  # type: ignore[no-untyped-def]
    """The F16 at byte `at`, as float32."""
    return as_float32(np.int16(np.uint16(block[at]) | (np.uint16(block[at + 1]) << np.uint16(8))))


@jit()
def _scale_min(scales, j):  # type: ignore[no-untyped-def]
    """Group j's 6-bit scale and minimum, of the 12 bytes that hold those of 8 groups (`get_scale_min_k4`)."""
    if j < 4:
        return np.float32(scales[j] & 63), np.float32(scales[j + 4] & 63)
    scale = (scales[j + 4] & 15) | ((scales[j - 4] >> 6) << 4)
    minimum = (scales[j + 4] >> 4) | ((scales[j] >> 6) << 4)
    return np.float32(scale), np.float32(minimum)


@jit()
def _q4_0(blocks, out):  # type: ignore[no-untyped-def]
    for i in range(blocks.shape[0]):
        block, to = blocks[i], out[i]
        d = _half(block, 0)
        for j in range(16):
            to[j] = rounded_bits(to[j], d * np.float32(np.int32(block[2 + j] & 15) - 8))
            to[j + 16] = rounded_bits(to[j], d * np.float32(np.int32(block[2 + j] >> 4) - 8))


@jit()
def _q4_1(blocks, out):  # type: ignore[no-untyped-def]
    for i in range(blocks.shape[0]):
        block, to = blocks[i], out[i]
        d, m = _half(block, 0), _half(block, 2)
        for j in range(16):
            to[j] = rounded_bits(to[j], d * np.float32(block[4 + j] & 15) + m)
            to[j + 16] = rounded_bits(to[j], d * np.float32(block[4 + j] >> 4) + m)


@jit()
def _q5_0(blocks, out):  # type: ignore[no-untyped-def]
    for i in range(blocks.shape[0]):
        block, to = blocks[i], out[i]
        d = _half(block, 0)
        for j in range(16):
            low = (np.int32(block[2 + (j >> 3)]) >> (j & 7)) & 1
            high = (np.int32(block[4 + (j >> 3)]) >> (j & 7)) & 1
            to[j] = rounded_bits(to[j], d * np.float32((np.int32(block[6 + j] & 15) | (low << 4)) - 16))
            to[j + 16] = rounded_bits(to[j], d * np.float32((np.int32(block[6 + j] >> 4) | (high << 4)) - 16))


@jit()
def _q5_1(blocks, out):  # type: ignore[no-untyped-def]
    for i in range(blocks.shape[0]):
        block, to = blocks[i], out[i]
        d, m = _half(block, 0), _half(block, 2)
        for j in range(16):
            low = (np.int32(block[4 + (j >> 3)]) >> (j & 7)) & 1
            high = (np.int32(block[6 + (j >> 3)]) >> (j & 7)) & 1
            to[j] = rounded_bits(to[j], d * np.float32(np.int32(block[8 + j] & 15) | (low << 4)) + m)
            to[j + 16] = rounded_bits(to[j], d * np.float32(np.int32(block[8 + j] >> 4) | (high << 4)) + m)


@jit()
def _q8_0(blocks, out):  # type: ignore[no-untyped-def]
    for i in range(blocks.shape[0]):
        block, to = blocks[i], out[i]
        d = _half(block, 0)
        for j in range(32):
            to[j] = rounded_bits(to[j], np.float32(np.int8(block[2 + j])) * d)


@jit()
def _q2_k(blocks, out):  # type: ignore[no-untyped-def]
    for i in range(blocks.shape[0]):
        block, to = blocks[i], out[i]
        d, dmin = _half(block, 80), _half(block, 82)
        for group in range(16):
            dl = d * np.float32(block[group] & 15)
            ml = dmin * np.float32(block[group] >> 4)
            at = 16 + 32 * (group >> 3) + 16 * (group & 1)
            shift = np.uint8(group & 6)
            for j in range(16):
                q = np.float32((block[at + j] >> shift) & np.uint8(3))
                to[16 * group + j] = rounded_bits(to[0], dl * q - ml)


@jit()
def _q3_k(blocks, out):  # type: ignore[no-untyped-def]
    for i in range(blocks.shape[0]):
        block, to = blocks[i], out[i]
        d = _half(block, 108)
        for group in range(16):
            low = (np.int32(block[96 + (group & 7)]) >> (4 * (group >> 3))) & 15
            high = (np.int32(block[104 + (group & 3)]) >> (2 * (group >> 2))) & 3
            dl = d * np.float32((low | (high << 4)) - 32)
            at = 32 + 32 * (group >> 3) + 16 * (group & 1)
            shift, bit = group & 6, group >> 1
            for j in range(16):
                q = (np.int32(block[at + j]) >> shift) & 3
                mask = (np.int32(block[16 * (group & 1) + j]) >> bit) & 1  # where it is 0, 4 is taken off
                to[16 * group + j] = rounded_bits(to[0], dl * np.float32(q - ((mask ^ 1) << 2)))


@jit()
def _q4_k(blocks, out):  # type: ignore[no-untyped-def]
    for i in range(blocks.shape[0]):
        block, to = blocks[i], out[i]
        d, dmin = _half(block, 0), _half(block, 2)
        for group in range(8):
            scale, minimum = _scale_min(block[4:16], group)
            dl, ml = d * scale, dmin * minimum
            at, shift = 16 + 32 * (group >> 1), np.uint8(4 * (group & 1))
            for j in range(32):
                q = np.float32((block[at + j] >> shift) & np.uint8(15))
                to[32 * group + j] = rounded_bits(to[0], dl * q - ml)


@jit()
def _q5_k(blocks, out):  # type: ignore[no-untyped-def]
    for i in range(blocks.shape[0]):
        block, to = blocks[i], out[i]
        d, dmin = _half(block, 0), _half(block, 2)
        for group in range(8):
            scale, minimum = _scale_min(block[4:16], group)
            dl, ml = d * scale, dmin * minimum
            at, shift, bit = 48 + 32 * (group >> 1), np.uint8(4 * (group & 1)), np.uint8(group)
            for j in range(32):
                low = (block[at + j] >> shift) & np.uint8(15)
                high = ((block[16 + j] >> bit) & np.uint8(1)) << np.uint8(4)
                to[32 * group + j] = rounded_bits(to[0], dl * np.float32(low | high) - ml)


@jit()
def _q6_k(blocks, out):  # type: ignore[no-untyped-def]
    for i in range(blocks.shape[0]):
        block, to = blocks[i], out[i]
        d = _half(block, 208)
        for group in range(16):
            dl = d * np.float32(np.int8(block[192 + group]))
            half, quarter = group >> 3, (group >> 1) & 3  # 128 elements; 32 of them
            at = 64 * half + 32 * (quarter & 1) + 16 * (group & 1)
            bits = 128 + 32 * half + 16 * (group & 1)
            shift, pair = np.uint8(4 * (quarter >> 1)), np.uint8(2 * quarter)
            for j in range(16):
                low = (block[at + j] >> shift) & np.uint8(15)
                high = ((block[bits + j] >> pair) & np.uint8(3)) << np.uint8(4)
                to[16 * group + j] = rounded_bits(to[0], dl * np.float32(np.int32(low | high) - 32))


@jit()
def _iq4_nl(blocks, out):  # type: ignore[no-untyped-def]
    for i in range(blocks.shape[0]):
        block, to = blocks[i], out[i]
        d = _half(block, 0)
        for j in range(16):
            to[j] = rounded_bits(to[j], d * _IQ4[block[2 + j] & 15])
            to[j + 16] = rounded_bits(to[j], d * _IQ4[block[2 + j] >> 4])


@jit()
def _iq4_xs(blocks, out):  # type: ignore[no-untyped-def]
    for i in range(blocks.shape[0]):
        block, to = blocks[i], out[i]
        d = _half(block, 0)
        for group in range(8):
            low = (np.int32(block[4 + (group >> 1)]) >> (4 * (group & 1))) & 15
            high = (np.int32(block[2 + (group >> 2)]) >> (2 * (group & 3))) & 3
            dl = d * np.float32((low | (high << 4)) - 32)
            for j in range(16):
                q = block[8 + 16 * group + j]
                to[32 * group + j] = rounded_bits(to[0], dl * _IQ4[q & 15])
                to[32 * group + 16 + j] = rounded_bits(to[0], dl * _IQ4[q >> 4])


@jit()
def _mxfp4(blocks, out):  # type: ignore[no-untyped-def]
    for i in range(blocks.shape[0]):
        block, to = blocks[i], out[i]
        e = np.int64(block[0])  # half the scale 2**(e - 127): the table holds doubles
        d = as_float32(np.uint32(0x00200000 << e if e < 2 else (e - 1) << 23))
        for j in range(16):
            to[j] = rounded_bits(to[j], d * _E2M1[block[1 + j] & 15])
            to[j + 16] = rounded_bits(to[j], d * _E2M1[block[1 + j] >> 4])


_LOOPS: Mapping[str, Callable[..., Any]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "Q2_K": _q2_k, "Q3_K": _q3_k,
    "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k, "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs, "MXFP4": _mxfp4,
}  # fmt: skip

BY_PACKAGE = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "TQ1_0", "TQ2_0", "NVFP4"})
"""Dtypes that the package gguf decodes, at some 20 MB/s of a core."""

DECODED = BY_PACKAGE | _LOOPS.keys()
"""Every dtype in blocks that `decode_blocks` takes."""

_AT_ONCE = 1024
"""Blocks that the package is given: it makes several arrays of their elements."""


@jit()
def _round(values, out):  # type: ignore[no-untyped-def]
    for i in range(values.shape[0]):
        out[i] = rounded_bits(out[i], values[i])


def round_values(values: NDArray[np.float32], out: Bits) -> None:
    """Write float32 `values`, rounded half to even, as bit patterns into `out`, an array of the same shape."""
    _round(np.ascontiguousarray(values).reshape(-1), out.reshape(-1))


def decode_blocks(name: str, blocks: Blocks, out: Bits) -> None:
    """Decode `blocks` [blocks, bytes of one] of the ggml dtype `name` into `out` [blocks, elements of one].

    `out` must be contiguous; its integer type says whether numbers are rounded to BF16, F16 or F32 (exact).
    """
    if name in _LOOPS:
        _LOOPS[name](blocks, out)
        return
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    for first in range(0, len(blocks), _AT_ONCE):
        with np.errstate(all="ignore"):  # whoever reads the numbers looks for NaN and infinities
            values = dequantize(blocks[first : first + _AT_ONCE], GGMLQuantizationType[name])
        round_values(values, out[first : first + _AT_ONCE])
