"""The facts of a report: one value, `Report`, that the page and the figures draw."""

import math
from dataclasses import dataclass

from w8a8.evals.paired import SIGNIFICANCE, Comparison
from w8a8.publish.report.data import Ridge, Size, Stack
from w8a8.publish.results import Gsm8k, Kld, Tasks
from w8a8.terminal.wording import size
from w8a8.verification.result import TensorError, VerifyResult, sqnr

WORST = 12
"""Matrices listed as the ones with the largest error."""


@dataclass(frozen=True)
class Report:
    """All that is drawn. `scale_range` is in log10; `before` and `errors` are None without the source."""

    name: str
    model: str
    scheme: str
    before: int | None
    after: int
    sizes: tuple[Size, ...]
    errors: VerifyResult | None
    stacks: tuple[Stack, ...]
    ridges: tuple[Ridge, ...]
    scale_range: tuple[float, float]
    baseline: Gsm8k | None
    quant: Gsm8k | None
    paired: Comparison | None
    kld: Kld | None
    tasks: Tasks | None

    @property
    def sqnr_db(self) -> float | None:
        """Signal to quantization noise over all quantized tensors; None without the source."""
        if self.errors is None:
            return None
        return sqnr(sum(t.signal for t in self.errors.tensors), sum(t.noise for t in self.errors.tensors))

    @property
    def worst(self) -> tuple[TensorError, ...]:
        """The quantized tensors with the lowest SQNR."""
        return self.errors.tensors[:WORST] if self.errors else ()

    @property
    def headline(self) -> str:
        """Size, SQNR and GSM8K in one sentence."""
        parts = [size(self.after) + (f" instead of {size(self.before)}" if self.before else "")]
        if self.sqnr_db is not None and math.isfinite(self.sqnr_db):
            parts.append(f"{self.sqnr_db:.1f} dB SQNR")
        if self.quant and self.baseline and self.paired:
            scores = f"{self.quant.strict.value:.1%} against {self.baseline.strict.value:.1%}"
            parts.append(f"GSM8K {scores}: {_shown(self.paired)}")
        elif self.quant:
            parts.append(f"GSM8K {self.quant.strict.value:.1%}")
        return ", ".join(parts)


def _shown(paired: Comparison) -> str:
    """Say in few words whether the paired answers show a difference; `Comparison.verdict` has the numbers."""
    if paired.p_value >= SIGNIFICANCE:
        return "no difference shown"
    return "a loss shown" if paired.difference < 0 else "a gain shown"
