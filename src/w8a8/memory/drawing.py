"""Draw what `w8a8 fit` found: a bar for each GPU, a legend, and the answer.

Every part of a bar has a character of its own, so that it reads without colour too, in a log or a pipe.
"""

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from w8a8.machine import Gpu, gigabytes
from w8a8.memory.fit import Fit
from w8a8.terminal.wording import plural, printable

MAX_BARS = 8
MAX_WIDTH = 100
_LABEL, _FIGURES = 7, 18


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of a GPU's memory: its bytes, how it is drawn, and a note."""

    name: str
    nbytes: int
    mark: str
    plain: str
    style: str
    note: str


def draw(found: Fit, console: Console) -> None:
    """Print `found` for a person."""
    parts, ascii_only = _parts(found), not console.encoding.lower().startswith("utf")
    long = not console.is_terminal  # lines stay whole in a file
    console.print(Text.assemble((printable(found.name), "bold"), f": {printable(found.scheme)}"), soft_wrap=long)
    console.print(_headline(found), soft_wrap=long)
    console.print()
    for number, gpu in enumerate(found.gpus[: found.tensor_parallel][:MAX_BARS]):
        console.print(
            _bar(number, gpu, found, parts, min(console.width, MAX_WIDTH), ascii_only=ascii_only), soft_wrap=True
        )
    if found.tensor_parallel > MAX_BARS:
        console.print(f"... and {found.tensor_parallel - MAX_BARS} more like them", style="dim")
    console.print()
    console.print(_legend(parts, ascii_only=ascii_only))
    console.print(_verdict(found), soft_wrap=long)
    for line in found.advice:
        console.print(f"  - {line}", soft_wrap=long, markup=False)
    for line in found.notices:
        console.print(Text.assemble(("note: ", "yellow"), printable(line)), soft_wrap=long)


def _parts(found: Fit) -> tuple[_Part, ...]:
    """The parts of a GPU's memory in drawing order; memory not needed is free, or left to others."""
    free = max(0, found.budget - found.needed)
    tokens = f"{found.concurrency} x {found.context:,} tokens of {_kb(found.kv_per_token)}"
    if found.kv_beyond_window != found.kv_per_token:
        tokens += f" (past the window {_kb(found.kv_beyond_window)})"
    if found.state_per_sequence:
        tokens += f", state of {_kb(found.state_per_sequence)}"
    share = f"split over {found.tensor_parallel} GPUs, " if found.tensor_parallel > 1 else ""
    weights = f"{share}rotary tables {gigabytes(found.rotary)}"
    estimate = "estimated: batch, logits, images; context, graphs"
    return (
        _Part("weights", found.weights + found.rotary, "█", "#", "blue", weights),
        _Part("KV cache", found.kv, "▓", "=", "green", tokens),
        _Part("working", found.activations + found.engine, "▒", "+", "yellow", estimate),
        _Part("free", free, "░", ".", "", "for more, or longer, requests"),
        _Part(
            "left", found.memory - found.budget, "·", " ", "dim", f"{1 - found.utilization:.0%} that the engine leaves"
        ),
    )


def _headline(found: Fit) -> str:
    count, gpu = found.tensor_parallel, min(found.gpus, key=lambda gpu: gpu.memory)
    where = f"{count} x {printable(gpu.name)}" + (f", tensor parallelism {count}" if count > 1 else "")
    return f"on {where}" + ("; text only" if found.text_only else "")


def _bar(number: int, gpu: Gpu, found: Fit, parts: tuple[_Part, ...], width: int, *, ascii_only: bool) -> Text:
    """One GPU's parts, to scale; where they exceed the card, a line marks its end."""
    cells = max(10, width - _LABEL - _FIGURES)
    scale = max(max(g.memory for g in found.gpus), found.needed) / cells
    bar, drawn, position = Text(), 0, 0
    for part in parts:
        position += part.nbytes
        until = min(cells, max(drawn + (part.nbytes > 0), round(position / scale)))
        bar.append((part.plain if ascii_only else part.mark) * (until - drawn), part.style)
        drawn = until
    bar.append(" " * (cells - drawn))
    if found.needed > gpu.memory:
        end = min(cells - 1, int(gpu.memory / scale))
        bar = Text.assemble(bar[:end], ("|" if ascii_only else "┃", "bold red"), bar[end + 1 :])
    figures = f"{found.needed / 1e9:>6.1f} of {gigabytes(gpu.memory):>8}"
    return Text.assemble(f"GPU {number:<{_LABEL - 4}}", bar, (figures, "" if found.fits else "red"))


def _legend(parts: tuple[_Part, ...], *, ascii_only: bool) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    for part in parts:
        mark = part.plain if ascii_only else part.mark
        table.add_row(Text.assemble((mark * 2, part.style), f" {part.name}"), gigabytes(part.nbytes), part.note)
    return table


def _verdict(found: Fit) -> Text:
    if not found.fits:
        over = found.needed - found.budget
        text = Text.assemble(("does not fit", "bold red"), f": {gigabytes(over)} too much on each GPU")
        return text.append("; what would help:" if found.advice else "")
    whole = " (the model's maximum)" if found.max_context == found.model_context else ""
    each = f" for each of {found.concurrency} requests" if found.concurrency > 1 else ""
    requests = plural(found.max_concurrency, "request")
    reach = f": up to {found.max_context:,} tokens{whole}{each}, or {requests} of {found.context:,} at once"
    return Text.assemble(("fits", "bold green"), reach)


def _kb(nbytes: int) -> str:
    return f"{nbytes / 1000:.1f} kB"
