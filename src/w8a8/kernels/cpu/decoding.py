"""The inner loops that turn quantized weights back into numbers: code times scale, rounded once to the dtype of `out`.

Every loop writes bit patterns into `out` [rows, columns], whose integer type says BF16, FP16 or FP32 (`bits.BITS`).
Products are taken in float32. Scales come as a grid of float32: one for each block of `block` [rows, columns], the
last ones of which may stick out of the matrix. Loops over a run of codes with one scale vectorize.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from w8a8.kernels.cpu.bits import Bits
from w8a8.kernels.cpu.ir import rounded_bits
from w8a8.kernels.cpu.jit import jit
from w8a8.kernels.cpu.small_floats import e2m1, e4m3, e5m2

Float32s = NDArray[np.float32]
Bytes = NDArray[np.uint8]


@jit()
def _e4m3(codes, scale, first, rows, columns, out):  # type: ignore[no-untyped-def]
    for i in range(out.shape[0]):
        for block in range(scale.shape[1]):
            s = scale[(first + i) // rows, block]
            run = codes[i, block * columns : (block + 1) * columns]
            to = out[i, block * columns : (block + 1) * columns]
            for j in range(run.size):
                to[j] = rounded_bits(to[j], e4m3(run[j]) * s)


@jit()
def _e5m2(codes, scale, first, rows, columns, out):  # type: ignore[no-untyped-def]
    for i in range(out.shape[0]):
        for block in range(scale.shape[1]):
            s = scale[(first + i) // rows, block]
            run = codes[i, block * columns : (block + 1) * columns]
            to = out[i, block * columns : (block + 1) * columns]
            for j in range(run.size):
                to[j] = rounded_bits(to[j], e5m2(run[j]) * s)


@jit(fastmath={"nnan"})  # codes and scales are finite
def _integers(codes, scale, zero, factor, first, rows, columns, out):  # type: ignore[no-untyped-def]
    for i in range(out.shape[0]):
        for block in range(scale.shape[1]):
            s = scale[(first + i) // rows, block]
            z = np.float32(zero[(first + i) // rows, block])  # the difference of two codes is exact
            run = codes[i, block * columns : (block + 1) * columns]
            to = out[i, block * columns : (block + 1) * columns]
            for j in range(run.size):
                to[j] = rounded_bits(to[j], (np.float32(run[j]) - z) * s * factor)


@jit(fastmath={"nnan"})
def _mxfp4(codes, scale, out):  # type: ignore[no-untyped-def]
    for i in range(out.shape[0]):
        for block in range(scale.shape[1]):
            s = scale[i, block]
            run = codes[i, 16 * block : 16 * block + 16]
            to = out[i, 32 * block : 32 * block + 32]
            for j in range(16):
                to[2 * j] = rounded_bits(to[0], e2m1(run[j]) * s)
                to[2 * j + 1] = rounded_bits(to[0], e2m1(run[j] >> np.uint8(4)) * s)


@jit(fastmath={"nnan"})
def _nvfp4(codes, scale, out):  # type: ignore[no-untyped-def]
    for i in range(out.shape[0]):
        for pair in range(scale.shape[1] // 2):
            s0, s1 = scale[i, 2 * pair], scale[i, 2 * pair + 1]
            run = codes[i, 16 * pair : 16 * pair + 16]
            to = out[i, 32 * pair : 32 * pair + 32]
            for j in range(16):
                s = s0 if j < 8 else s1
                to[2 * j] = rounded_bits(to[0], e2m1(run[j]) * s)
                to[2 * j + 1] = rounded_bits(to[0], e2m1(run[j] >> np.uint8(4)) * s)
        if scale.shape[1] % 2:
            s = scale[i, -1]
            for j in range(codes.shape[1] - 8, codes.shape[1]):
                out[i, 2 * j] = rounded_bits(out[i, 0], e2m1(codes[i, j]) * s)
                out[i, 2 * j + 1] = rounded_bits(out[i, 0], e2m1(codes[i, j] >> np.uint8(4)) * s)


@jit(fastmath={"nnan"})
def _fp4_down(codes, scale, group, first, out):  # type: ignore[no-untyped-def]
    for i in range(codes.shape[0]):
        s = scale[(first + 2 * i) // group]
        run = codes[i]
        to = out[2 * i]
        for j in range(run.size):
            to[j] = rounded_bits(to[j], e2m1(run[j]) * s[j])
        to = out[2 * i + 1]
        for j in range(run.size):
            to[j] = rounded_bits(to[j], e2m1(run[j] >> np.uint8(4)) * s[j])


@jit(fastmath={"nnan"})
def _ordered(codes, scale, zero, group, first, out):  # type: ignore[no-untyped-def]
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            g = group[j]
            code = np.float32(np.int32(codes[i, j]) - zero[first + i, g])
            out[i, j] = rounded_bits(out[i, j], code * scale[first + i, g])


@jit()
def _looked_up(codes, table, scale, block, first, out):  # type: ignore[no-untyped-def]
    for i in range(out.shape[0]):
        for j in range(codes.shape[1]):
            s = scale[((first + i) * out.shape[1] + 2 * j) // block]
            out[i, 2 * j] = rounded_bits(out[i, 0], table[codes[i, j] >> np.uint8(4)] * s)
            out[i, 2 * j + 1] = rounded_bits(out[i, 0], table[codes[i, j] & np.uint8(15)] * s)


@jit()
def _nibbles(data, out):  # type: ignore[no-untyped-def]
    for i in range(out.shape[0]):
        for j in range(out.shape[1] // 2):
            out[i, 2 * j] = data[i, j] & np.uint8(15)
            out[i, 2 * j + 1] = data[i, j] >> np.uint8(4)


@jit()
def _unpack(words, bits, out):  # type: ignore[no-untyped-def]
    mask = np.uint64((1 << bits) - 1)
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            word, bit = bits * j // 32, bits * j % 32
            value = np.uint64(words[i, word]) >> np.uint64(bit)
            if bit + bits > 32:
                value |= np.uint64(words[i, word + 1]) << np.uint64(32 - bit)
            out[i, j] = value & mask


@jit()
def _unpack_down(words, places, out):  # type: ignore[no-untyped-def]
    for i in range(words.shape[0]):
        for k in range(8):
            to = out[8 * i + places[k]]
            for j in range(words.shape[1]):
                to[j] = (words[i, j] >> np.uint32(4 * k)) & np.uint32(15)


@jit()
def _turn(matrix, out):  # type: ignore[no-untyped-def]
    rows, columns = matrix.shape
    for i in range(0, rows, 32):
        for j in range(0, columns, 32):
            for b in range(j, min(j + 32, columns)):
                for a in range(i, min(i + 32, rows)):
                    out[b, a] = matrix[a, b]


@jit()
def _turn_words(matrix, out):  # type: ignore[no-untyped-def]
    # Four by four elements of 16 bits: a word of each of four rows in, a word of each of four columns out.
    odd, high = np.uint64(0xFFFF0000FFFF0000), np.uint64(0xFFFFFFFF00000000)
    half, word = np.uint64(16), np.uint64(32)
    rows, columns = matrix.shape
    for i in range(0, rows, 16):
        for j in range(columns):
            for k in range(i, min(i + 16, rows), 4):
                a, b, c, d = matrix[k, j], matrix[k + 1, j], matrix[k + 2, j], matrix[k + 3, j]
                even_ab, odd_ab = (a & ~odd) | ((b & ~odd) << half), ((a & odd) >> half) | (b & odd)
                even_cd, odd_cd = (c & ~odd) | ((d & ~odd) << half), ((c & odd) >> half) | (d & odd)
                out[4 * j, k // 4] = (even_ab & ~high) | (even_cd << word)
                out[4 * j + 1, k // 4] = (odd_ab & ~high) | (odd_cd << word)
                out[4 * j + 2, k // 4] = (even_ab >> word) | (even_cd & high)
                out[4 * j + 3, k // 4] = (odd_ab >> word) | (odd_cd & high)


def fp8(codes: Bytes, scale: Float32s, block: tuple[int, int], first: int, out: Bits, *, wide: bool = False) -> None:
    """Decode FP8 `codes` [rows, columns], which begin at row `first` of the matrix; E5M2 if `wide`, else E4M3."""
    (_e5m2 if wide else _e4m3)(codes, scale, first, *block, out)


def integers(
    codes: NDArray[np.int8] | Bytes,
    scale: Float32s,
    zero: NDArray[np.int32],
    block: tuple[int, int],
    first: int,
    out: Bits,
    *,
    factor: float = 1.0,
) -> None:
    """Decode integers `codes` [rows, columns] from row `first` on: (code - zero) * scale * factor, in this order."""
    _integers(codes, scale, zero, np.float32(factor), first, *block, out)


def fp4(codes: Bytes, scale: Float32s, out: Bits) -> None:
    """Decode FP4 E2M1, two codes a byte [rows, columns / 2], the lower four bits first.

    `scale` is [rows, blocks], of 32 weights each (MXFP4) or of 16 (NVFP4).
    """
    (_mxfp4 if out.shape[1] == 32 * scale.shape[1] else _nvfp4)(codes, scale, out)


def fp4_down(codes: Bytes, scale: Float32s, group: int, first: int, out: Bits) -> None:
    """Decode FP4 E2M1, two rows in each row of `codes` [rows / 2, columns]; `group` rows share a row of `scale`."""
    _fp4_down(codes, scale, group, first, out)


def ordered(
    codes: Bytes, scale: Float32s, zero: NDArray[np.int32], group: NDArray[np.int32], first: int, out: Bits
) -> None:
    """Decode integers as `integers` does, column j by the scale and zero point `group[j]` of its row."""
    _ordered(codes, scale, zero, group, first, out)


def looked_up(codes: Bytes, table: Float32s, scale: Float32s, block: int, first: int, out: Bits) -> None:
    """Decode indexes into `table` [16], two a byte [rows, columns / 2], the upper four bits first.

    Weights of the whole matrix, row after row, share a number of `scale` by `block`, an even number.
    """
    _looked_up(codes, table, scale, block, first, out)


def unpacked(words: NDArray[np.uint32], bits: int, columns: int) -> Bytes:
    """Unpack integers of `bits`, 2 to 8, from [rows, words]: code j of a row begins at bit j * `bits` of the row."""
    out = np.empty((words.shape[0], columns), np.uint8)
    if bits == 4 and columns % 2 == 0:
        _nibbles(words.view(np.uint8), out)
    else:
        _unpack(words, bits, out)
    return out


def unpacked_down(words: NDArray[np.uint32], places: Sequence[int]) -> Bytes:
    """Unpack eight rows from each row of words: its four bits k, from the lowest, are row `places[k]` of the eight."""
    out = np.empty((8 * words.shape[0], words.shape[1]), np.uint8)
    _unpack_down(words, np.array(places), out)
    return out


def turned(matrix: NDArray[Any], out: NDArray[Any] | None = None) -> NDArray[Any]:
    """Copy a matrix [a, b] to its transpose [b, a], rows one after the other; into `out` where it is given."""
    out = np.empty(matrix.shape[::-1], matrix.dtype) if out is None else out
    if matrix.itemsize == 2 and not any(size % 4 for size in matrix.shape):  # four times as fast
        _turn_words(matrix.view(np.uint64), out.view(np.uint64))
    else:
        _turn(matrix, out)
    return out
