"""How the result of `w8a8 eval kld` looks on a terminal."""

from collections.abc import Callable
from itertools import dropwhile
from typing import Any

from w8a8.evals.kld.run import KldResult
from w8a8.terminal.output import plain_table
from w8a8.terminal.wording import clean

BAR = 40


def show(result: KldResult, say: Callable[[Any], None]) -> None:
    """Show the result; `say` prints anything that Rich can print."""
    say(f"[bold]{clean(result.candidate)}[/bold] against {clean(result.reference)}")
    where = f"{result.device}, in {result.dtypes[0]}" if result.dtypes[0] else result.device
    say(f"{result.tokens:,} tokens of {clean(result.text)}, in windows of up to {result.context}, on {where}")
    table = plain_table("", "", "95% interval", left=1)
    low, high = result.mean_interval
    table.add_row("mean KL divergence, nats", f"{result.mean:.5f}", f"{low:.5f} to {high:.5f}")
    table.add_row("median", f"{result.median:.5f}")
    table.add_row("99th percentile", f"{result.p99:.5f}")
    table.add_row("largest", f"{result.max:.5f}")
    low, high = result.agreement_interval
    table.add_row("same likeliest token", f"{result.agreement:.2%}", f"{low:.2%} to {high:.2%}")
    table.add_row("perplexity, reference", f"{result.reference_perplexity:.3f}")
    table.add_row("perplexity, candidate", f"{result.candidate_perplexity:.3f}")
    say(table)
    say("")
    table = plain_table("position", "tokens", "mean KL", left=1)
    for band in result.positions:
        table.add_row(f"{band.first}-{band.last}", f"{band.tokens:,}", f"{band.mean_kl:.5f}")
    say(table)
    say("")
    table = plain_table("KL from", "tokens", "share", "", left=0)
    most = max(count for _, _, count in result.histogram)
    for low, _, count in dropwhile(lambda bin_: not bin_[2], result.histogram):
        table.add_row(f"{low:.2g}", f"{count:,}", f"{count / result.tokens:.1%}", "▇" * round(BAR * count / most))
    say(table)
