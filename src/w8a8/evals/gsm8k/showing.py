"""How GSM8K looks on a terminal: a live line during a run, then a table; for `compare` flipped answers side by side."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from w8a8.evals.gsm8k.run import SCORES, Progress, Result
from w8a8.evals.paired import Comparison, Flip
from w8a8.terminal.output import Terminal, plain_table
from w8a8.terminal.progress import live
from w8a8.terminal.wording import clean, printable

LEFT_OUT = "(left out, as --no-texts asks)"


@contextmanager
def live_score(terminal: Terminal, questions: int) -> Iterator[Callable[[Progress], None]]:
    """Show a live line with the accuracy so far and tokens/s, while `questions` questions are asked."""
    shown = 0
    with live(terminal, "GSM8K", questions, unit="questions") as line:

        def show(now: Progress) -> None:
            nonlocal shown
            line.say(f"{now.right / now.done:.1%} right, {now.tokens / max(now.seconds, 1e-9):.0f} tokens/s")
            line(now.done - shown)
            shown = now.done

        yield show


def show_gsm8k(result: Result, say: Callable[[Any], None]) -> None:
    """Show both accuracies with their intervals, the number of failures, and the path of the result."""
    found = result.to_dict()
    protocol = result.protocol
    say(
        f"[bold]{clean(result.model)}[/bold]: GSM8K, {found['questions']:,} questions, {protocol.shots}-shot, "
        f"{protocol.endpoint}, temperature {protocol.temperature:g}, at most {protocol.max_tokens} tokens"
    )
    table = plain_table("", "right", "accuracy", "95% interval", "the answer is", left=1)
    table.columns[-1].justify = "left"
    for score, what in zip(SCORES, ("the number after the last ####", "the last number"), strict=True):
        low, high = found[score]["interval"]
        row = found[score]
        table.add_row(score, f"{row['correct']:,}", f"{row['accuracy']:.1%}", f"{low:.1%} to {high:.1%}", what)
    say(table)
    say(f"cut off by max_tokens: {found['cut_off']:,}; empty: {found['empty']:,}; errors: {found['errors']:,}")
    if found["errors"]:
        say("[yellow]failed requests count as not right; give the same command to ask them again[/yellow]")
    tokens, seconds = found["tokens"], found["seconds"]
    say(
        f"{tokens['prompt']:,} tokens in, {tokens['completion']:,} out, {seconds:.0f} s "
        f"({tokens['completion'] / max(seconds, 1e-9):.0f} tokens/s)"
    )
    say(clean(str(result.path)))


def show_comparison(found: Comparison, say: Callable[[Any], None], *, flips: int) -> None:
    """Show `flips` flipped questions, the paired counts, the test, and the verdict."""
    for flip in found.flips[:flips]:
        say(_side_by_side(flip))
    say(f"base       [bold]{clean(found.base)}[/bold]\nquantized  [bold]{clean(found.quant)}[/bold]")
    table = plain_table("", "quantized right", "quantized wrong", "in all", left=1)
    counts = ((found.both_right, found.only_base), (found.only_quant, found.both_wrong))
    for name, row in zip(("base right", "base wrong"), counts, strict=True):
        table.add_row(name, *(_share(number, found.questions) for number in (*row, sum(row))))
    columns = [sum(column) for column in zip(*counts, strict=True)]
    table.add_row(
        "in all", *(_share(number, found.questions) for number in columns), f"{found.questions:,}", style="dim"
    )
    say(table)
    low, high = (f"{100 * bound:+.1f}" for bound in found.interval)
    say(
        f"difference {100 * found.difference:+.1f} points, 95% bootstrap interval {low} to {high};\n"
        f"exact McNemar p = {found.p_value:.3g}; overlap of the right answers (Jaccard) {found.jaccard:.3f}"
    )
    for name, errors in zip(("base", "quantized"), found.errors, strict=True):
        if errors:
            say(f"[yellow]{name}: failed requests, which count as not right: {errors:,}; run it again[/yellow]")
    if len(found.flips) > flips:
        say(f"[dim]{len(found.flips)} questions flipped; --flips {len(found.flips)} shows them all[/dim]")
    say(f"[bold]{clean(found.verdict)}[/bold]")


def _share(number: int, of: int) -> str:
    return f"{number:,} ({number / of:.1%})"


def _side_by_side(flip: Flip) -> Panel:
    """A question, with both answers in two columns."""
    answers = Table.grid(expand=True, padding=(0, 2))
    heads = []
    for name, right in (("base", flip.right == "base"), ("quantized", flip.right == "quant")):
        answers.add_column(ratio=1, overflow="fold")
        heads.append(f"[bold]{name}[/bold], [{'green]right' if right else 'red]wrong'}[/]")
    answers.add_row(*heads)
    answers.add_row(_text(flip.base_answer), _text(flip.quant_answer))
    asked = (_lines(flip.question or ""), "italic") if flip.question else (LEFT_OUT, "dim")
    question = Text.assemble(asked, f"\nThe answer is {printable(flip.gold)}.\n")
    return Panel(Group(question, answers), title=f"question {flip.index}", title_align="left", border_style="dim")


def _text(answer: str | None) -> Text:
    if answer is None:
        return Text(LEFT_OUT, style="dim")
    return Text(_lines(answer.strip())) if answer.strip() else Text("(empty)", style="dim")


def _lines(text: str) -> str:
    """`text` with its line breaks, but without other characters that move the cursor."""
    return "\n".join(printable(line) for line in text.split("\n"))
