"""`w8a8 bench linear`: time one layer of Gemma 4 31B's MLP, W8A8 against BF16, from one token to a prompt.

Both run in this process, by turns, on torch's threads; medians are shown. A turn goes through several copies of the
weight, so that no cache serves it: a model reads its layers in the same way. The speed of memory is measured in the
same turns, by a sum over memory that was written before (pages never written are all one page, read from cache).

Zen 5, 2 cores that others used a little; milliseconds, medians of 9; memory read at 39 GB/s, 48 when all was quiet:

    tokens               1     2     4     8     16     64    256    512
    21504 x 5376      3.76  3.48  3.26  4.04   4.98   10.5   38.3   73.9
      BF16            9.20  9.00  7.87  8.71  10.73   22.6   74.8  143.3
    5376 x 21504      2.97  2.88  3.36  3.64   4.36    9.4   34.6   77.4
      BF16            8.45  8.34  8.92  8.85  10.31   21.7   71.9  170.8
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from w8a8.bench.contest import HostClock, Work, race
from w8a8.bench.model import MLP_SHAPES
from w8a8.errors import MissingExtraError
from w8a8.terminal.output import plain_table

if TYPE_CHECKING:
    import torch

TOKENS = (1, 2, 4, 8, 16, 64, 256, 512)
SPREAD = 3 << 27
"""Least number of bytes in all copies of a weight: 384 MiB, more than caches hold."""


@dataclass(frozen=True, slots=True)
class LinearRow:
    """One shape [out, in] and number of tokens: milliseconds of each turn, and GB/s of reading memory in each."""

    outputs: int
    inputs: int
    tokens: int
    w8a8_ms: tuple[float, ...]
    bf16_ms: tuple[float, ...]
    read_gb_s: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return medians and figures that follow from them, as JSON values; `gb_s` counts the INT8 weight's bytes."""
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
    """The table, and the number of torch's threads."""

    threads: int
    rows: tuple[LinearRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the table as plain JSON values."""
        return {"threads": self.threads, "rows": [row.to_dict() for row in self.rows]}


def bench(
    *,
    runs: int,
    shapes: Sequence[tuple[int, int]] = MLP_SHAPES,
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
                ours, theirs, read = _times((w8a8, bf16, [lambda _: written.sum()]), x, runs)
                gb_s = tuple(written.nbytes / ms / 1e6 for ms in read)
                rows.append(LinearRow(outputs, inputs, count, ours, theirs, gb_s))
                notice(f"{count} tokens: {statistics.median(ours):.2f} ms, BF16 {statistics.median(theirs):.2f} ms")
    return LinearResult(torch.get_num_threads(), tuple(rows))


def show(result: LinearResult, say: Callable[[Any], None]) -> None:
    """Print the table for a person; `say` prints text and Rich tables."""
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
    """Make layers with random weights: enough of each kind to fill `spread` bytes, and at least two."""
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


def _times(contenders: Sequence[Sequence[Layer]], x: "torch.Tensor", runs: int) -> list[tuple[float, ...]]:
    """Return each contender's milliseconds per layer, in each of `runs` turns."""
    works = {str(number): _through(layers, x) for number, layers in enumerate(contenders)}
    times = race(works, HostClock(), runs).values()
    return [tuple(ms / len(layers) for ms in all_) for layers, all_ in zip(contenders, times, strict=True)]


def _through(layers: Sequence[Layer], x: "torch.Tensor") -> Work:
    def work() -> None:
        for layer in layers:
            layer(x)

    return work
