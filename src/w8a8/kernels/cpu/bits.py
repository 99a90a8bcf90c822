"""How weights are handed to the CPU kernels: as the bit patterns that lie on disk."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.uint16] | NDArray[np.int16] | NDArray[np.uint32]

BITS: Mapping[str, np.dtype[Any]] = {
    "BF16": np.dtype(np.uint16),
    "F16": np.dtype(np.int16),
    "F32": np.dtype(np.uint32),
}
"""safetensors dtype -> the integer type of its bit patterns, by which the kernels tell the dtypes apart."""


def _e4m3_values() -> NDArray[np.float32]:
    codes = np.arange(256, dtype=np.uint16)
    half = ((codes & 0x80) << 8 | (codes & 0x7F) << 7).view(np.float16)
    return np.where((codes & 0x7F) == 0x7F, np.float32(np.nan), half.astype(np.float32) * np.float32(256))


E4M3 = _e4m3_values()
"""The float32 of each of the 256 E4M3 numbers."""
