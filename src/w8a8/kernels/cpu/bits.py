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
