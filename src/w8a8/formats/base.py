"""`Format` and `Arithmetic`: the parts of a spelling of W8A8."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from w8a8.checkpoint import Shaped

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Quotient = Literal["divide", "reciprocal", "divide-rounded"]


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """How scales and codes are computed.

    `scales(amax, dtype)` maps each row's largest magnitude (float32 [rows]) and the weights' safetensors dtype to the
    float32 [rows] scale that is stored. Codes are the rounded quotient of weight and scale, clipped to `[low, 127]`:
    `divide` in float32; `reciprocal` as a product with the float32 reciprocal; `divide-rounded` in float32 and then
    rounded to the weights' dtype.
    """

    scales: "Callable[[NDArray[np.float32], str], NDArray[np.float32]]"
    quotient: Quotient = "divide"
    low: int = -127


@dataclass(frozen=True, slots=True)
class Selection:
    """Module names of the layers `quantized`, of the linear layers `left_alone`, and every tensor that is `copied`.

    `patterns` mean modules left alone as a whole, where engines may have other names for the layers in them.
    """

    quantized: Sequence[str]
    left_alone: Sequence[str]
    copied: Sequence[Shaped]
    patterns: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Format:
    """One spelling: stored scale, arithmetic, and quantization_config. `label` names it in plans and provenance."""

    label: str
    arithmetic: Arithmetic
    scale_dtype: Callable[[str], str]
    scale_shape: Callable[[int], tuple[int, ...]]
    quantization_config: Callable[[Selection], Mapping[str, Any]]
