"""The INT8 sums of vLLM's kernel for CPUs: exact where the CPU has VNNI, saturating elsewhere.

oneDNN multiplies unsigned bytes with signed ones: activation codes become unsigned, a + 128, and 128 * sum(w) is taken
off at the end. With VNNI one instruction (`vpdpbusd`) sums the products exactly. Without it `vpmaddubsw` first adds the
products of each two neighbours as INT16, and what leaves INT16 is cut to its ends: 255 * 127 + 255 * 127 becomes 32,767
(https://uxlfoundation.github.io/oneDNN/dev_guide_int8_computations.html).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numba
import numpy as np
import torch
from torch import Tensor

from w8a8.runtime.linear import W8A8Linear, quantize_tokens

EXACT = 1e-6
"""The relative error that scaling exact sums in FP32 may make."""

Sums = Callable[[Tensor, Tensor], Tensor]
"""From codes int8 [tokens, in] and a weight int8 [out, in] to int32 [tokens, out]."""


@dataclass(frozen=True)
class Int8Kernel:
    """What vLLM's kernel computes on this CPU, as it was measured."""

    on_real_codes: float
    """Its relative error on layers of a real model."""
    on_largest_codes: float
    """Its relative error where every code is 127."""

    def __str__(self) -> str:
        """One line for the log of a test run."""
        verdict = "exact" if self.exact else "inexact: its sums saturate; docs/serve.md says on which CPUs"
        errors = f"{self.on_real_codes:.2g} on real layers, {self.on_largest_codes:.2g} on the largest codes"
        return f"vLLM's INT8 kernel on this CPU: relative error {errors} ({verdict})"

    @property
    def exact(self) -> bool:
        """Whether its sums are what the format promises."""
        return max(self.on_real_codes, self.on_largest_codes) <= EXACT

    @property
    def sums(self) -> Sums:
        """Its sums."""
        return exact_sums if self.exact else saturated_sums

    @contextmanager
    def in_our_layers(self) -> Iterator[None]:
        """Let our layers make its sums: where they are exact, nothing changes."""
        if self.exact:
            yield
            return
        forward = lambda layer, x: computed(self.sums, layer, x)  # noqa: E731
        with patch.object(W8A8Linear, "forward", forward):
            yield


def cpu_has_vnni() -> bool:
    """Whether this CPU's flags, which lscpu shows, name VNNI: for AVX-512 or for AVX2."""
    flags = Path("/proc/cpuinfo").read_text().split()
    return "avx512_vnni" in flags or "avx_vnni" in flags


def computed(sums: Sums, layer: W8A8Linear, x: Tensor) -> Tensor:
    """What a layer without bias gives for `x` [..., in] by its definition, with these sums."""
    codes, scale = quantize_tokens(x.reshape(-1, layer.in_features))
    y = sums(codes, layer.weight).float() * layer.weight_scale * scale
    return y.to(x.dtype).reshape(*x.shape[:-1], layer.out_features)


def exact_sums(codes: Tensor, weight: Tensor) -> Tensor:
    """What the format promises."""
    return codes.int() @ weight.int().T


def saturated_sums(codes: Tensor, weight: Tensor) -> Tensor:
    """What `vpmaddubsw` makes of them."""
    unsigned, signed = codes.numpy().astype(np.int16) + np.int16(128), weight.numpy().astype(np.int16)
    sums = np.empty((len(codes), len(weight)), np.int32)
    _add_pairs(*_halves(unsigned), *_halves(signed), sums)
    return torch.from_numpy(sums - 128 * signed.sum(1, dtype=np.int32))


def _halves(codes: Any) -> tuple[Any, Any]:
    """The even columns and the odd ones, each in one piece."""
    return np.ascontiguousarray(codes[:, ::2]), np.ascontiguousarray(codes[:, 1::2])


@numba.njit(parallel=True)  # type: ignore[untyped-decorator]
def _add_pairs(even: Any, odd: Any, weight_even: Any, weight_odd: Any, sums: Any) -> None:
    for row in numba.prange(sums.shape[1]):
        for token in range(sums.shape[0]):
            total = np.int32(0)
            for i in range(even.shape[1]):
                first = np.int32(even[token, i]) * np.int32(weight_even[row, i])
                pair = first + np.int32(odd[token, i]) * np.int32(weight_odd[row, i])
                total += min(max(pair, np.int32(-32768)), np.int32(32767))
            sums[token, row] = total
