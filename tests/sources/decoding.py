"""Quantized tensors for tests, written as a checkpoint, and what a decoder makes of them, as torch numbers."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.checkpoints import write_checkpoint
from w8a8.checkpoint import Checkpoint, TensorSpec
from w8a8.checkpoint.stream import tensor_bytes
from w8a8.kernels.cpu.bits import BITS
from w8a8.sources.view import LogicalTensor

Find = Callable[[Mapping[str, TensorSpec], Mapping[str, Any]], Iterator[LogicalTensor]]
Tensors = dict[str, torch.Tensor]

_DTYPES = {
    torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0", torch.int8: "I8", torch.uint8: "U8",
    torch.int32: "I32", torch.int64: "I64",
}  # fmt: skip
_NUMPY = {"F16": np.float16, "F32": np.float32, "I8": np.int8, "I32": np.int32, "I64": np.int64, "BF16": np.uint16}
_TORCH = {name: dtype for dtype, name in _DTYPES.items()}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

LAYER = "model.layers.0.mlp.up_proj"


def written(folder: Path, tensors: Tensors, shards: int = 1) -> Checkpoint:
    """A checkpoint of `tensors`."""
    arrays = {name: (_DTYPES[t.dtype], bits(t)) for name, t in tensors.items()}
    return Checkpoint.open(write_checkpoint(folder, arrays, shards=shards))


def dtype_name(tensor: torch.Tensor) -> str:
    """The dtype of a tensor as safetensors calls it."""
    return _DTYPES[tensor.dtype]


def bits(tensor: torch.Tensor) -> NDArray[Any]:
    """The bit patterns of a tensor, as integers."""
    numbers: NDArray[Any] = tensor.contiguous().view(_BITS[tensor.itemsize]).numpy()
    return numbers


def decoded(checkpoint: Checkpoint, tensor: LogicalTensor, rows: int = 7) -> torch.Tensor:
    """What the decoder makes of a tensor, asked for at most about `rows` rows at a time."""
    if len(tensor.shape) == 3:
        return torch.stack([decoded(checkpoint, tensor.matrix(i), rows) for i in range(tensor.shape[0])])
    beside = [_array(checkpoint, spec) for spec in tensor.beside]
    prepared = tensor.decoder.prepare(tensor, beside)
    whole = tensor_bytes(checkpoint.path, tensor.stored)
    out = np.full(tensor.shape, 0x5A5A, BITS[tensor.dtype])
    step = tensor.decoder.step
    rows = -(-rows // step) * step
    for begin in range(0, tensor.shape[0], rows):
        part = out[begin : begin + rows]
        where = tensor.decoder.stretch(tensor, begin, begin + len(part))
        runs = (where.offset + where.stride * i for i in range(where.runs))
        data = bytearray().join(whole[at : at + where.nbytes] for at in runs)
        assert len(data) == where.runs * where.nbytes
        tensor.decoder.decode(tensor, begin, memoryview(data), prepared, part)
    return torch.from_numpy(out.view(np.int32 if out.itemsize == 4 else np.int16)).view(_TORCH[tensor.dtype])


def _array(checkpoint: Checkpoint, spec: TensorSpec) -> NDArray[Any]:
    return np.frombuffer(tensor_bytes(checkpoint.path, spec), _NUMPY.get(spec.dtype, np.uint8)).reshape(spec.shape)


def found(folder: Path, find: Find, tensors: Tensors, declared: Mapping[str, Any] | None = None) -> Tensors:
    """Everything that `find` finds in a checkpoint of `tensors`, decoded."""
    checkpoint = written(folder, tensors)
    return {each.name: decoded(checkpoint, each) for each in find(checkpoint.tensors, declared or {})}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have one dtype, one shape and the same bits; one NaN is as good as another."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and bool(((a == b) & (a.signbit() == b.signbit()) | a.isnan() & b.isnan()).all())
    )
