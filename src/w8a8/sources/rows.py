"""The one place where stored bytes become numbers, one function per spelling.

A source tensor is dense so far: BF16, F16 or F32, row by row. Whoever reads weights (the quantizer, verification, the
streamed model, the report) gets them here, so a further spelling is one more function here and nothing elsewhere.
"""

import numpy as np
from numpy.typing import NDArray

from w8a8.checkpoint import Checkpoint, TensorSpec
from w8a8.checkpoint.stream import tensor_bytes
from w8a8.formats.arithmetic import Buffer, decode
from w8a8.kernels.cpu.bits import BITS, Bits


def rows(tensor: TensorSpec, data: Buffer) -> Bits:
    """Give whole rows of a tensor as bit patterns, without a copy.

    Args:
        tensor: a tensor in BF16, F16 or F32.
        data: bytes of any number of its rows; a vector or a scalar counts as one row an element.

    Returns:
        `[rows, columns]` in the integer type of the dtype (`BITS`); `torch` and `numpy` can view it as numbers.
    """
    columns = tensor.shape[1] if len(tensor.shape) == 2 else 1
    bits: Bits = np.frombuffer(data, BITS[tensor.dtype]).reshape(-1, columns)
    return bits


def values(tensor: TensorSpec, data: Buffer) -> NDArray[np.float32]:
    """Give whole rows of a tensor as float32 `[rows, columns]`, exactly."""
    bits = rows(tensor, data)
    return decode(bits, tensor.dtype).reshape(bits.shape)


def read_values(checkpoint: Checkpoint, tensor: TensorSpec) -> NDArray[np.float32]:
    """Read a whole tensor as float32, flat. Raises what `tensor_bytes` raises."""
    return values(tensor, tensor_bytes(checkpoint.path, tensor)).reshape(-1)
