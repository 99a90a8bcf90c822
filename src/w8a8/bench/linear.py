"""`w8a8 bench linear`: time a layer of Gemma 4 31B's MLP in W8A8, and a BF16 head, against torch's BF16 and float32.

All run in this process, by turns, on torch's threads; medians are shown. A turn goes through several copies of the
weight, so that no cache serves it: a model reads its layers in the same way. The speed of memory is measured in the
same turns, by a sum over memory that was written before (pages never written are all one page, read from cache).

A CPU without BF16 arithmetic is faster in float32 from some number of tokens on, so the better of the two is what W8A8
has to beat; each row says which that is.
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
HEADS = ((262_144, 640),)
"""[out, in] of Gemma 3 270M's head, which stays in BF16."""
HEAD_TOKENS = (1, 16)


@dataclass(frozen=True, slots=True)
class LinearRow:
    """One shape [out, in] and number of tokens: milliseconds of each turn, and GB/s of reading memory in each.

    `kind` is what our layer's weight is, W8A8 or BF16.
    """

    outputs: int
    inputs: int
    tokens: int
    ours_ms: tuple[float, ...]
    bf16_ms: tuple[float, ...]
    f32_ms: tuple[float, ...]
    read_gb_s: tuple[float, ...]
    kind: str = "W8A8"

    def to_dict(self) -> dict[str, Any]:
        """Return medians and figures that follow from them, as JSON values.

        `gb_s` counts the bytes of our weight; `speedup` is that over the `better` of torch's BF16 and float32.
        """
        times = (self.ours_ms, self.bf16_ms, self.f32_ms, self.read_gb_s)
        ours, bf16, f32, read = (statistics.median(all_) for all_ in times)
        gb_s = (1 if self.kind == "W8A8" else 2) * self.outputs * self.inputs / ours / 1e6
        return {
            **asdict(self),
            "ours_median_ms": ours,
            "bf16_median_ms": bf16,
            "f32_median_ms": f32,
            "better": "BF16" if bf16 < f32 else "F32",
            "speedup": min(bf16, f32) / ours,
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
    heads: Sequence[tuple[int, int]] = HEADS,
    head_tokens: Sequence[int] = HEAD_TOKENS,
    spread: int = SPREAD,
    notice: Callable[[str], None] = lambda _: None,
) -> LinearResult:
    """Time W8A8 layers of `shapes` [out, in] with each number of `tokens`, and BF16 `heads` with `head_tokens`.

    Each has `runs` turns. Raises MissingExtraError without torch.
    """
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError("bench linear needs torch: pip install 'w8a8[serve]'") from error
    rows = []
    sizes = [*((shape, tokens, "W8A8") for shape in shapes), *((shape, head_tokens, "BF16") for shape in heads)]
    with torch.inference_mode():
        written = torch.ones(spread // 8, dtype=torch.int64)
        for (outputs, inputs), counts, kind in sizes:
            notice(f"{kind} {outputs} x {inputs}: making weights")
            made = _layers(kind, outputs, inputs, spread)
            for count in counts:
                x = torch.randn(count, inputs).to(torch.bfloat16)
                contenders = (*zip(made, (x, x, x.float()), strict=True), ([lambda _: written.sum()], x))
                ours, half, full, read = _times(contenders, runs)
                gb_s = tuple(written.nbytes / ms / 1e6 for ms in read)
                rows.append(LinearRow(outputs, inputs, count, ours, half, full, gb_s, kind))
                medians = (statistics.median(all_) for all_ in (ours, half, full))
                notice("{} tokens: {:.2f} ms, BF16 {:.2f} ms, F32 {:.2f} ms".format(count, *medians))
            del made, contenders
    return LinearResult(torch.get_num_threads(), tuple(rows))


def show(result: LinearResult, say: Callable[[Any], None]) -> None:
    """Print the table for a person; `say` prints text and Rich tables."""
    table = plain_table("out x in", "tokens", "layer", "ms", "BF16 ms", "F32 ms", "speedup", "of read", "TOPS", left=1)
    rows = [row.to_dict() for row in result.rows]
    for row in rows:
        table.add_row(
            f"{row['outputs']} x {row['inputs']}",
            f"{row['tokens']}",
            row["kind"],
            f"{row['ours_median_ms']:.2f}",
            f"{row['bf16_median_ms']:.2f}",
            f"{row['f32_median_ms']:.2f}",
            f"{row['speedup']:.2f} {row['better']:>4}",
            f"{row['share_of_read']:.0%}",
            f"{row['tera_ops']:.2f}",
        )
    read = statistics.median(row["read_median_gb_s"] for row in rows)
    runs = len(result.rows[0].ours_ms)
    say(f"{result.threads} threads, medians of {runs}; memory reads at {read:.1f} GB/s")
    say(table)
    say("speedup: over the better of torch's BF16 and F32, named beside it")


Layer = Callable[["torch.Tensor"], Any]


def _layers(kind: str, outputs: int, inputs: int, spread: int) -> tuple[list[Layer], list[Layer], list[Layer]]:
    """Make layers of random weights, ours of that `kind`, torch's in BF16 and F32: at least two that fill `spread`."""
    import torch

    from w8a8.runtime.linear import W8A8Linear
    from w8a8.runtime.unquantized import BF16Linear

    def count(size: int) -> range:
        return range(max(2, -(-spread // (size * outputs * inputs))))

    def plain(dtype: torch.dtype, made: Any = torch.nn.Linear) -> Layer:
        linear = made(inputs, outputs, bias=False, device="meta", dtype=dtype).to_empty(device="cpu")
        linear.weight.random_(-127, 128).mul_(0.02 / 127)
        return linear  # type: ignore[no-any-return]

    def quantized() -> Layer:
        layer = W8A8Linear(inputs, outputs, bias=False)
        layer.weight.random_(-127, 128)
        layer.weight_scale.fill_(0.02 / 127)
        return layer

    bf16, f32 = [plain(torch.bfloat16) for _ in count(2)], [plain(torch.float32) for _ in count(4)]
    if kind == "BF16":
        return [plain(torch.bfloat16, BF16Linear) for _ in count(2)], bf16, f32
    return [quantized() for _ in count(1)], bf16, f32


def _times(contenders: Sequence[tuple[Sequence[Layer], "torch.Tensor"]], runs: int) -> list[tuple[float, ...]]:
    """Return each contender's milliseconds per layer, in each of `runs` turns: its layers, and what they read."""
    works = {str(number): _through(layers, x) for number, (layers, x) in enumerate(contenders)}
    times = race(works, HostClock(), runs).values()
    return [tuple(ms / len(layers) for ms in all_) for (layers, _), all_ in zip(contenders, times, strict=True)]


def _through(layers: Sequence[Layer], x: "torch.Tensor") -> Work:
    def work() -> None:
        for layer in layers:
            layer(x)

    return work
