"""How lm-evaluation-harness's results look on a terminal, one model's and two compared."""

from collections.abc import Callable
from typing import Any

from w8a8.evals.lm.compare import LmComparison
from w8a8.evals.lm.results import Result
from w8a8.terminal.output import plain_table
from w8a8.terminal.wording import clean


def show_lm(result: Result, say: Callable[[Any], None]) -> None:
    """Show each row's metrics with their standard errors, and the path of the result."""
    harness = result.versions["lm-eval"]
    how = "chat" if result.protocol.chat else "completions"
    say(f"[bold]{clean(result.model)}[/bold]: lm-evaluation-harness {clean(harness)}, {how}")
    table = plain_table("task", "metric", "shots", "documents", "value", "standard error", left=2)
    for row in result.rows:
        shots, asked = result.asked(row)
        for metric in row.metrics:
            error = "" if metric.stderr is None else f"{metric.stderr:.4f}"
            table.add_row(clean(row.name), clean(metric.name), shots, f"{asked:,}", f"{metric.value:.4f}", error)
    say(table)
    say(f"{sum(len(task.documents) for task in result.tasks):,} documents, {result.seconds:.0f} s")
    say(clean(str(result.path)))


def show_lm_comparison(found: LmComparison, say: Callable[[Any], None]) -> None:
    """Show each row's values, the paired difference with its interval and test, and the verdict."""
    say(f"base       [bold]{clean(found.base)}[/bold]\nquantized  [bold]{clean(found.quant)}[/bold]")
    table = plain_table("task", "metric", "base", "quantized", "points, 95% interval", "flipped", left=2)
    for row in found.rows:
        base, quant = (f"{value:.4f}" for value in row.values)
        pair = row.paired
        flipped = f"{pair.only_base + pair.only_quant:,} of {pair.questions:,}" if pair else ""
        table.add_row(clean(row.name), clean(row.metric), base, quant, pair.summary if pair else "not paired", flipped)
    say(table)
    say(f"[bold]{clean(found.verdict)}[/bold]")
