"""What the spellings of quantized weights share: the small tensors beside a weight, found, checked, made numbers."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from w8a8.checkpoint import TensorSpec
from w8a8.errors import SourceError
from w8a8.formats.arithmetic import decode
from w8a8.formats.detect import section
from w8a8.formats.excludes import Excludes
from w8a8.kernels.cpu.bits import E4M3
from w8a8.sources.view import Beside, Decoder, LogicalTensor, Stretch

Tensors = Mapping[str, TensorSpec]
Float32s = NDArray[np.float32]

FLOATS = ("BF16", "F16", "F32")
REPAIR = "download the checkpoint again, or quantize the BF16 original"

_DROPPED = (
    "input_scale", "input_scale_inv", "input_scale_ub", "input_global_scale", "input_zero_point", "activation_scale",
    "activation_scale_inv", "output_scale", "output_zero_point", "q_scale", "k_scale", "v_scale", "kv_scale",
)  # fmt: skip
_KEYS = ("k_proj", "qkv_proj", "kv_b_proj")


class Rows(Decoder):
    """A decoder whose rows are stored one after the other, each in as many bytes."""

    __slots__ = ()

    def stretch(self, tensor: LogicalTensor, begin: int, end: int) -> Stretch:
        """The bytes of the rows themselves."""
        width = row_bytes(tensor.stored)
        return Stretch(begin * width, (end - begin) * width)


def row_bytes(spec: TensorSpec) -> int:
    """Count the bytes of a row of a matrix."""
    return spec.nbytes // spec.shape[0]


def wrong(spec: TensorSpec, what: str, do: str = REPAIR) -> SourceError:
    """The error that `spec` is `what`."""
    return SourceError(f"{spec.shard}: {spec.name} {what}; {do}")


def shown(spec: TensorSpec) -> str:
    """A tensor's dtype and shape."""
    return f"{spec.dtype} {list(spec.shape)}"


def companion(tensors: Tensors, spec: TensorSpec, *names: str) -> TensorSpec:
    """The first of the tensors `names` that is there. Raises `SourceError`."""
    if found := next((tensors[name] for name in names if name in tensors), None):
        return found
    raise wrong(spec, f"is {spec.dtype}, but the checkpoint lacks {' or '.join(names)}, without which it is no weight")


def expect(spec: TensorSpec, of: TensorSpec, dtypes: Sequence[str], *shapes: Sequence[int]) -> None:
    """Raise `SourceError` unless `spec`, which belongs to `of`, has one of the `dtypes` and one of the `shapes`."""
    if spec.dtype not in dtypes:
        raise wrong(spec, f"is {spec.dtype}, not {' or '.join(dtypes)}")
    if shapes and spec.shape not in {tuple(shape) for shape in shapes}:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise wrong(spec, f"has the shape {list(spec.shape)}, where {of.name}, {shown(of)}, needs {wanted}")


def matrix_shape(spec: TensorSpec, of: TensorSpec) -> tuple[int, ...]:
    """The shape of `spec` for one matrix of the stack `of`, which may share it; its own where `of` is a matrix."""
    if len(of.shape) == 2:
        return spec.shape
    return () if spec.numel == 1 else spec.shape[1:] if spec.shape[:1] == of.shape[:1] else spec.shape


def dropped(tensors: Tensors, name: str) -> tuple[TensorSpec, ...]:
    """The tensors of an engine's activations and KV cache that belong to the weight `name`; a decoder needs none."""
    module, leaf = name.rpartition(".")[::2]
    places = [f"{module}."] if leaf == "weight" else [f"{name}_", f"{name}."]
    parent, own = module.rpartition(".")[::2]
    if leaf == "weight" and own in _KEYS:
        places += [f"{parent}.", f"{parent}.attn."]
    return tuple(tensors[f"{place}{end}"] for place in places for end in _DROPPED if f"{place}{end}" in tensors)


def model_dtype(tensors: Iterable[TensorSpec]) -> str:
    """The dtype that most elements of tensors which are not quantized have; BF16 where there are none."""
    count = {dtype: sum(t.numel for t in tensors if t.dtype == dtype and _is_weight(t.name)) for dtype in FLOATS}
    return max(FLOATS, key=count.__getitem__)


def _is_weight(name: str) -> bool:
    return name.endswith((".weight", ".bias", "_proj"))


def dense_dtype(scale: TensorSpec, model: str) -> str:
    """The dtype of the numbers: that of their `scale`, if it has 16 bits; else the model's."""
    return scale.dtype if scale.dtype in {"BF16", "F16"} else model


def numbers(spec: TensorSpec, array: NDArray[Any]) -> Float32s:
    """The float32 values of a tensor of floats; U8 is read as F8_E8M0."""
    array = np.atleast_1d(array)
    if spec.dtype in FLOATS:
        return decode(array, spec.dtype).reshape(array.shape)
    values: Float32s
    if spec.dtype == "F8_E4M3":
        values = E4M3[array]
        return values
    values = np.ldexp(np.float32(1), np.minimum(array, 254).astype(np.int32) - 127).astype(np.float32)
    values[array == 255] = np.nan
    return values


def finite(spec: TensorSpec, values: Float32s) -> Float32s:
    """The `values` of `spec`, if all are finite. Raises `SourceError`."""
    if not np.isfinite(values).all():
        raise wrong(spec, f"holds {np.count_nonzero(~np.isfinite(values)):,} values that are NaN or infinite")
    return values


def positive(spec: TensorSpec, array: NDArray[Any]) -> Float32s:
    """The values of a tensor of scales. Raises `SourceError` unless all are finite and greater than 0."""
    values = finite(spec, numbers(spec, array))
    if not (values > 0).all():
        kind, count = (
            ("zero", np.count_nonzero(values == 0)) if (values >= 0).all() else ("negative", (values < 0).sum())
        )
        raise wrong(spec, f"holds {count:,} scales that are {kind}")
    return values


def named(tensor: LogicalTensor, beside: Beside) -> Mapping[str, tuple[TensorSpec, NDArray[Any]]]:
    """The tensors beside one, by the last part of their names."""
    return {spec.name.rpartition(".")[2]: (spec, array) for spec, array in zip(tensor.beside, beside, strict=True)}


def groups(spec: TensorSpec, array: NDArray[Any], count: int, size: int) -> NDArray[np.int32] | None:
    """The group of each column, if they are not `count` groups of `size` in order, or all -1, which means the same.

    Raises `SourceError` for a group that does not exist.
    """
    order: NDArray[np.int32] = array.astype(np.int32)
    if (order == -1).all() or (order == np.arange(order.size) // size).all():
        return None
    if order.min() < 0 or order.max() >= count:
        raise wrong(spec, f"names groups from {order.min()} to {order.max()}, where there are {count}")
    return order


Block = tuple[int, int]
"""Rows and columns that share a scale; 0 means all of them."""


def whole(block: Block, rows: int, columns: int) -> Block:
    """The block of a matrix with no 0 in it."""
    return block[0] or rows, block[1] or columns


def said(block: Block) -> str:
    """How users call a way of sharing scales."""
    named = {(0, 0): "per tensor", (1, 0): "per row", (0, 1): "per column"}
    groups = f"in groups of {block[1]}" if block[0] == 1 else f"in blocks of {block[0]} x {block[1]}"
    return named.get(block, groups)


def blocks(size: int, block: int) -> int:
    """Count the blocks of `block` that cover `size`."""
    return math.ceil(size / block)


def module_of(name: str) -> str:
    """The module that a weight belongs to."""
    return name.rpartition(".")[0]


def declared_weights(declared: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """What a compressed-tensors config says of the weights of `module`: bits, type, strategy, sizes; or nothing.

    A group's targets are modules, patterns of them ("re:") or classes, as in compressed-tensors
    (`quantization/quant_config.py`); a class is taken to hold every module that no other group names.
    """
    groups = [g for g in section(declared, "config_groups").values() if isinstance(g, dict)]
    if len(groups) > 1:
        named = [g for g in groups if Excludes(_targets(g)).mean(module)]
        groups = named or [g for g in groups if any(t.isalnum() for t in _targets(g))]
    return section({"group": groups[0]}, "group", "weights") if groups else {}


def _targets(group: Mapping[str, Any]) -> list[str]:
    targets = group.get("targets")
    return [t for t in targets if isinstance(t, str)] if isinstance(targets, list) else []
