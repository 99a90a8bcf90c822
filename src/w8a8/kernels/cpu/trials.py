"""Small products for the tiles to multiply, and the sums that are right: exact, by NumPy's integers.

A trial is bytes and numbers, so that a tile may run anywhere: in this process (`chosen.py`), or in an emulator.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from w8a8.kernels.cpu.instructions import InstructionSet
from w8a8.kernels.cpu.ir import Tile
from w8a8.kernels.cpu.tiles import LINE, dot_tile, outer_tile, transpose_tile

Codes = NDArray[np.int8]

ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Trial:
    """A tile, what it is called with, and what it has to write.

    `memory`: bytes that the tile reads, and behind them those that it writes; `arguments`: an argument of the tile is a
    number or, in a list of one, an offset into `memory`; `expected`: int32, what `memory` has to end with.
    """

    tile: Tile
    memory: NDArray[np.uint8]
    arguments: Sequence[int | list[int]]
    expected: NDArray[np.int32]

    def at(self, base: int) -> list[int]:
        """Return the arguments for a tile that finds `memory` at the address `base`."""
        return [base + argument[0] if isinstance(argument, list) else argument for argument in self.arguments]

    def right(self, memory: NDArray[np.uint8]) -> bool:
        """Whether the tile left in `memory` what it should."""
        return bytes(memory[-self.expected.nbytes :]) == self.expected.tobytes()


def dot(cpu: InstructionSet, rows: int, weight: Codes, codes: Codes) -> Trial:
    """Make a trial of a dot tile of `rows` rows: `weight` [at most rows, inputs], `codes` [tokens, inputs]."""
    (tokens, inputs), there = codes.shape, len(weight)
    stored = np.zeros((tokens, -(-inputs // LINE) * LINE), _stored(cpu))
    stored[:, :inputs] = codes
    sums = np.take(_sums(weight, codes, flipped=cpu.flips), [min(r, there - 1) for r in range(rows)], axis=1)
    memory, (weight_at, codes_at, sums_at) = _laid_out(weight, stored, np.zeros_like(sums))
    arguments: list[int | list[int]] = [
        weight_at,
        inputs,
        there - 1,
        codes_at,
        stored.strides[0],
        sums_at,
        sums.strides[0],
        0,
    ]
    return Trial(dot_tile(cpu, rows, tokens), memory, arguments, sums)


def outer(cpu: InstructionSet, weight: Codes, codes: Codes, before: NDArray[np.int32]) -> Trial:
    """Make a trial of an outer tile: `weight` [rows, inputs], `codes` [vectors * lanes, inputs], added to `before`.

    `inputs`: a multiple of the tile's step. `before`: int32 [rows, vectors * lanes].
    """
    vectors = len(codes) // cpu.lanes
    stored = np.ascontiguousarray(weight, _stored(cpu))
    words = np.ascontiguousarray(np.ascontiguousarray(codes, _stored(cpu)).view(np.int32).T)
    sums = before + _sums(weight, codes, flipped=cpu.flips and not cpu.grid).T
    memory, (weight_at, codes_at, sums_at) = _laid_out(stored, words, before)
    arguments = (weight_at, stored.strides[0], codes_at, len(words), sums_at)
    return Trial(outer_tile(cpu, len(weight), vectors), memory, arguments, sums)


def transposed(cpu: InstructionSet, words: NDArray[np.int32]) -> Trial:
    """Make a trial of the tile that transposes: `words` int32 [lanes, lanes]."""
    memory, (source, target) = _laid_out(words, np.zeros_like(words))
    stride = words.strides[0]
    return Trial(transpose_tile(cpu), memory, (source, stride, target, stride), np.ascontiguousarray(words.T))


def _stored(cpu: InstructionSet) -> Any:
    return np.int8 if cpu.code == 1 else np.int16


def _sums(weight: Codes, codes: Codes, *, flipped: bool) -> NDArray[np.int32]:
    """Multiply [tokens, inputs] with [rows, inputs]: int32 [tokens, rows], of weights plus 128 where `flipped`."""
    return (codes.astype(np.int64) @ (weight.astype(np.int64) + 128 * flipped).T).astype(np.int32)


def _laid_out(*arrays: NDArray[Any]) -> tuple[NDArray[np.uint8], list[list[int]]]:
    """Lay arrays out in one block of memory, the last at its end; return it and where each begins."""
    parts: list[bytes] = []
    places: list[list[int]] = []
    for array in arrays:
        parts.append(bytes(-sum(map(len, parts)) % ALIGNMENT))
        places.append([sum(map(len, parts))])
        parts.append(array.tobytes())
    return np.frombuffer(b"".join(parts), np.uint8), places
