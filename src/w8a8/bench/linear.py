"""`w8a8 bench linear`: one layer of Gemma 4 31B's MLP, W8A8 against BF16, from one token to a prompt.

Both run in this process, by turns, on torch's threads; medians are shown. A turn goes through several copies of the
weight, so that no cache serves it, which is how a model reads its layers. What the machine can read is measured by the
same turns: a sum over memory that was written first (pages never written are all one page, and read as fast as cache).

Zen 5, 2 cores that others used a little; milliseconds, medians of 9; memory read at 39 GB/s, 48 when all was quiet:

    tokens               1     2     4     8     16     64    256    512
    21504 x 5376      3.76  3.48  3.26  4.04   4.98   10.5   38.3   73.9
      BF16            9.20  9.00  7.87  8.71  10.73   22.6   74.8  143.3
    5376 x 21504      2.97  2.88  3.36  3.64   4.36    9.4   34.6   77.4
      BF16            8.45  8.34  8.92  8.85  10.31   21.7   71.9  170.8
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from w8a8.bench.quantize import HIDDEN, INTERMEDIATE
from w8a8.errors import MissingExtraError

if TYPE_CHECKING:
    import torch

SHAPES = ((INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))
"""[out, in] of gate_proj and up_proj, and of down_proj."""
TOKENS = (1, 2, 4, 8, 16, 64, 256, 512)
SPREAD = 3 << 27
"""Bytes that the copies of a weight take up at least: 384 MiB, more than caches hold."""


@dataclass(frozen=True, slots=True)
class LinearRow:
    """One shape [out, in] and number of tokens: milliseconds of each turn, and GB/s read by the third contender."""

    outputs: int
    inputs: int
    tokens: int
    w8a8_ms: tuple[float, ...]
    bf16_ms: tuple[float, ...]
    read_gb_s: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """The medians and what follows from them, as plain JSON values; `gb_s` counts the INT8 weight's bytes."""
        ours, theirs, read = (statistics.median(all_) for all_ in (self.w8a8_ms, self.bf16_ms, self.read_gb_s))
        gb_s = self.outputs * self.inputs / ours / 1e6
        return {
            **asdict(self),
            "w8a8_median_ms": ours,
            "bf16_median_ms": theirs,
            "speedup": theirs / ours,
            "gb_s": gb_s,
            "read_median_gb_s": read,
            "share_of_read": gb_s / read,
            "us_per_token": ours * 1e3 / self.tokens,
            "tera_ops": 2 * self.tokens * self.outputs * self.inputs / ours / 1e9,
        }


@dataclass(frozen=True, slots=True)
class LinearResult:
    """The table."""

    threads: int
    rows: tuple[LinearRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """The table as plain JSON values."""
        return {"threads": self.threads, "rows": [row.to_dict() for row in self.rows]}


def bench(
    *,
    runs: int,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    tokens: Sequence[int] = TOKENS,
    spread: int = SPREAD,
    notice: Callable[[str], None] = lambda _: None,
) -> LinearResult:
    """Time every shape [out, in] and number of tokens `runs` times. Raises MissingExtraError without torch."""
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError("bench linear needs torch: pip install 'w8a8[serve]'") from error
    rows = []
    with torch.inference_mode():
        written = torch.ones(spread // 8, dtype=torch.int64)
        for outputs, inputs in shapes:
            notice(f"{outputs} x {inputs}: making weights")
            w8a8, bf16 = _layers(outputs, inputs, spread)
            for count in tokens:
                x = torch.randn(count, inputs).to(torch.bfloat16)
                ours, theirs, read = _race((w8a8, bf16, [lambda _: written.sum()]), x, runs)
                gb_s = tuple(written.nbytes / ms / 1e6 for ms in read)
                rows.append(LinearRow(outputs, inputs, count, ours, theirs, gb_s))
                notice(f"{count} tokens: {statistics.median(ours):.2f} ms, BF16 {statistics.median(theirs):.2f} ms")
    return LinearResult(torch.get_num_threads(), tuple(rows))


def show(result: LinearResult, say: Callable[[Any], None]) -> None:
    """The table for a person; `say` prints what Rich can."""
    from w8a8.terminal.output import plain_table

    table = plain_table(
        "out x in", "tokens", "W8A8 ms", "BF16 ms", "speedup", "GB/s", "of read", "us/token", "TOPS", left=1
    )
    rows = [row.to_dict() for row in result.rows]
    for row in rows:
        table.add_row(
            f"{row['outputs']} x {row['inputs']}",
            f"{row['tokens']}",
            f"{row['w8a8_median_ms']:.2f}",
            f"{row['bf16_median_ms']:.2f}",
            f"{row['speedup']:.2f}",
            f"{row['gb_s']:.1f}",
            f"{row['share_of_read']:.0%}",
            f"{row['us_per_token']:.0f}",
            f"{row['tera_ops']:.2f}",
        )
    read = statistics.median(row["read_median_gb_s"] for row in rows)
    runs = len(result.rows[0].w8a8_ms)
    say(f"{result.threads} threads, medians of {runs}; memory reads at {read:.1f} GB/s")
    say(table)


Layer = Callable[["torch.Tensor"], Any]


def _layers(outputs: int, inputs: int, spread: int) -> tuple[list[Layer], list[Layer]]:
    """Layers with random weights, as many of each kind as fill `spread` bytes, but two at least."""
    import torch

    from w8a8.runtime.linear import W8A8Linear

    w8a8: list[Layer] = []
    for _ in range(max(2, -(-spread // (outputs * inputs)))):
        layer = W8A8Linear(inputs, outputs, bias=False)
        layer.weight.random_(-127, 128)
        layer.weight_scale.fill_(0.02 / 127)
        w8a8.append(layer)
    bf16: list[Layer] = []
    for _ in range(max(2, -(-spread // (2 * outputs * inputs)))):
        linear = torch.nn.Linear(inputs, outputs, bias=False, device="meta", dtype=torch.bfloat16).to_empty(
            device="cpu"
        )
        linear.weight.copy_(w8a8[len(bf16)].weight).mul_(0.02 / 127)  # type: ignore[attr-defined]
        bf16.append(linear)
    return w8a8, bf16


def _race(contenders: Sequence[Sequence[Layer]], x: "torch.Tensor", runs: int) -> list[tuple[float, ...]]:
    """Milliseconds per call of each contender, in each of `runs` turns after a first one that is not counted."""
    times: list[list[float]] = [[] for _ in contenders]
    for _ in range(runs + 1):
        for layers, ms in zip(contenders, times, strict=True):
            start = time.perf_counter()
            for layer in layers:
                layer(x)
            ms.append((time.perf_counter() - start) * 1e3 / len(layers))
    return [tuple(ms[1:]) for ms in times]
