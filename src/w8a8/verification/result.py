"""The findings of verification: errors per tensor and component, problems, warnings, and a verdict."""

import math
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

from w8a8.cluster import NodeWork
from w8a8.terminal.wording import plural


@dataclass(frozen=True, slots=True)
class TensorError:
    """One quantized tensor against its source.

    `sqnr_db` is 10 log10(sum w^2 / sum (w - code*scale)^2); `max_error` the largest difference in units of its row's
    scale; `saturated` counts codes at the ends of the range; `zeroed_rows` rows that were not zero and now are.
    """

    name: str
    component: str
    sqnr_db: float
    max_error: float
    saturated: int
    zeroed_rows: int
    signal: float
    noise: float


@dataclass(frozen=True, slots=True)
class ComponentError:
    """All quantized tensors of a component together."""

    component: str
    tensors: int
    sqnr_db: float
    max_error: float
    saturated: int
    zeroed_rows: int


@dataclass(frozen=True)
class VerifyResult:
    """All findings. `problems` make the checkpoint unfit; `warnings` do not. `tensors` are worst first.

    `nodes` says what each node of a cluster did.
    """

    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    tensors: tuple[TensorError, ...]
    copied: int
    checksums: int
    folded: int = 0
    nodes: tuple[NodeWork, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    @property
    def components(self) -> tuple[ComponentError, ...]:
        """The error per component, worst first."""
        groups: dict[str, list[TensorError]] = defaultdict(list)
        for tensor in self.tensors:
            groups[tensor.component].append(tensor)
        rows = [
            ComponentError(
                component,
                len(members),
                sqnr(sum(t.signal for t in members), sum(t.noise for t in members)),
                max(t.max_error for t in members),
                sum(t.saturated for t in members),
                sum(t.zeroed_rows for t in members),
            )
            for component, members in groups.items()
        ]
        return tuple(sorted(rows, key=lambda row: row.sqnr_db))

    @property
    def verdict(self) -> str:
        """The outcome in one line."""
        if self.problems:
            return f"FAILED: {len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}; do not use it"
        total = sqnr(sum(t.signal for t in self.tensors), sum(t.noise for t in self.tensors))
        holding = f"{plural(self.checksums, 'checksum')} hold{'s' if self.checksums == 1 else ''}"
        checked = holding if self.checksums else "no w8a8.json, so no checksums to check"
        quantized = f"{len(self.tensors)} tensors quantized at {total:.2f} dB SQNR"
        copied = f"{self.copied} copied bit for bit" + (f", {self.folded} folded" if self.folded else "")
        return f"OK: {quantized}, {copied}; {checked}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; an infinite SQNR (no error at all) is null."""
        rows = [{**asdict(t), "sqnr_db": _finite(t.sqnr_db), "max_error": _finite(t.max_error)} for t in self.tensors]
        components = [
            {**asdict(c), "sqnr_db": _finite(c.sqnr_db), "max_error": _finite(c.max_error)} for c in self.components
        ]
        return {
            "ok": self.ok,
            "verdict": self.verdict,
            "problems": list(self.problems),
            "warnings": list(self.warnings),
            "copied": self.copied,
            "folded": self.folded,
            "checksums": self.checksums,
            "components": components,
            "tensors": rows,
            "nodes": [work.to_dict() for work in self.nodes],
        }


def sqnr(signal: float, noise: float) -> float:
    """Compute signal to quantization noise in dB: infinite without noise, minus infinite without signal."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 and math.isfinite(noise) else -math.inf


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
