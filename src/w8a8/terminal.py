"""How results look on a terminal: tables, one live progress line, or JSON.

Data goes to standard output and everything about its making to standard error, so that a pipe gets the data alone.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

if TYPE_CHECKING:
    from w8a8.bench.quantize import BenchResult
    from w8a8.inspection import Inspection
    from w8a8.plan import Plan
    from w8a8.quantization import QuantizeResult
    from w8a8.verification import VerifyResult

PLAIN_INTERVAL_SECONDS = 5.0


class Terminal:
    """Prints for a person, or JSON for a machine; `quiet` leaves out all but results and errors."""

    def __init__(self, *, json: bool = False, quiet: bool = False) -> None:
        """`json` implies `quiet` on standard error only for progress bars that are not on a terminal."""
        self._json = json
        self._quiet = quiet
        self._out = Console(soft_wrap=False, highlight=False)
        self._err = Console(stderr=True, highlight=False)

    def notice(self, text: str) -> None:
        """Say something about the work under way."""
        if not self._quiet:
            self._err.print(escape(text), soft_wrap=True)

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        """Show that something of unknown length is under way."""
        if self._quiet or not self._err.is_terminal:
            yield
            return
        with self._err.status(what):
            yield

    @contextmanager
    def bytes(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """A live line with bytes, speed and ETA; plain lines where there is no terminal. Yields `advance(bytes)`."""
        if self._quiet:
            yield lambda _: None
        elif self._err.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=self._err, transient=True) as progress:
                task = progress.add_task(what, total=total)
                yield lambda count: progress.advance(task, count)
        else:
            yield _PlainProgress(what, total, self.notice)

    def plan(self, plan: "Plan") -> None:
        """What `quantize` would do."""
        if self._json:
            self._print_json({**plan.to_dict(), "totals": _totals(plan)})
            return
        out = self._out
        out.print(f"[bold]{escape(plan.source)}[/bold]  {escape(plan.architecture)} → {plan.format}, recipe {plan.recipe}")
        out.print(_component_table(plan))
        out.print(
            f"{size(plan.bytes_in)} in, {size(plan.bytes_out)} out ({plan.ratio:.1%}), {len(plan.shards)} "
            f"shard{_s(len(plan.shards))}; needs {size(plan.bytes_out)} of disk"
        )
        if plan.exclude:
            out.print(f"left alone by name in config.json: {len(plan.exclude)} linear layer{_s(len(plan.exclude))}, "
                      f"among them {', '.join(plan.exclude[:3])}")
        for name, reason in plan.left_out:
            out.print(f"[dim]not copied: {escape(name)} ({escape(reason)})[/dim]")
        for warning in plan.warnings:
            out.print(f"[yellow]warning: {escape(warning)}[/yellow]")

    def quantized(self, result: "QuantizeResult") -> None:
        """What `quantize` did."""
        plan = result.plan
        if self._json:
            self._print_json(
                {
                    "out": str(result.out),
                    "source": plan.source,
                    "revision": plan.revision,
                    "format": plan.format,
                    "seconds": round(result.seconds, 3),
                    "gb_per_second": round(result.gb_per_second, 3),
                    "resumed_shards": result.resumed,
                    "not_copied": [{"name": name, "reason": reason} for name, reason in plan.left_out],
                    "warnings": list(plan.warnings),
                    "totals": _totals(plan),
                }
            )
            return
        if not self._quiet:
            self._out.print(_component_table(plan))
            for name, reason in plan.left_out:
                self._out.print(f"[dim]not copied: {escape(name)} ({escape(reason)})[/dim]")
        self._out.print(
            f"[bold]{escape(str(result.out))}[/bold]: {size(plan.bytes_in)} → {size(plan.bytes_out)} "
            f"({plan.ratio:.1%}) in {result.seconds:.1f} s, {result.gb_per_second:.2f} GB/s"
        )

    def verified(self, result: "VerifyResult", top: int) -> None:
        """What `verify` found."""
        if self._json:
            self._print_json(result.to_dict())
            return
        if not self._quiet and result.tensors and top:
            table = Table(box=None, pad_edge=False, header_style="dim")
            table.add_column("worst quantized tensors", overflow="fold")
            for column in ("SQNR dB", "max error / scale", "saturated", "zeroed rows"):
                table.add_column(column, justify="right")
            for t in result.tensors[:top]:
                table.add_row(
                    escape(t.name), f"{t.sqnr_db:.2f}", f"{t.max_error:.3f}", f"{t.saturated:,}", f"{t.zeroed_rows:,}"
                )
            self._out.print(table)
        for problem in result.problems:
            self._out.print(f"[red]problem:[/red] {escape(problem)}", soft_wrap=True)
        color = "green" if result.ok else "red"
        self._out.print(f"[{color} bold]{escape(result.verdict)}[/]", soft_wrap=True)

    def inspected(self, found: "Inspection", *, tensors: bool) -> None:
        """What `inspect` saw."""
        if self._json:
            self._print_json(found.to_dict(tensors=tensors))
            return
        out = self._out
        out.print(f"[bold]{escape(found.name)}[/bold]  {escape(', '.join(found.architectures) or 'unknown architecture')}")
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column("component")
        table.add_column("dtype")
        for column in ("tensors", "parameters", "bytes", "share"):
            table.add_column(column, justify="right")
        for row in found.components:
            table.add_row(
                row.component, row.dtype, f"{row.tensors:,}", count(row.parameters), size(row.nbytes),
                f"{row.nbytes / max(found.nbytes, 1):.1%}",
            )  # fmt: skip
        table.add_section()
        table.add_row("total", "", f"{found.tensors:,}", count(found.parameters), size(found.nbytes), "")
        out.print(table)
        out.print(f"{found.shards} shard{_s(found.shards)}; {escape(found.scheme)}", soft_wrap=True)
        if found.excludes:
            shown = ", ".join(found.excludes[:5]) + (f" and {len(found.excludes) - 5} more" if len(found.excludes) > 5 else "")
            out.print(f"excludes: {escape(shown)}", soft_wrap=True)
        if tensors:
            for t in found.specs:
                out.print(escape(f"{t.dtype:5} {list(t.shape)!s:20} {t.name}  ({t.shard})"), soft_wrap=True)

    def benched(self, result: "BenchResult") -> None:
        """What a benchmark measured."""
        if self._json:
            self._print_json(result.to_dict())
            return
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column(f"{result.bytes / 2**30:.2f} GiB, {result.cores} cores, medians")
        for column in ("seconds", "min–max", "× cp -r", "peak MiB", "runs"):
            table.add_column(column, justify="right")
        for row in result.rows:
            table.add_row(
                row.name, f"{row.seconds:.2f}", f"{min(row.all_seconds):.2f}–{max(row.all_seconds):.2f}",
                f"{row.seconds / result.baseline:.2f}", f"{row.peak_mib:.0f}", str(len(row.all_seconds)),
            )  # fmt: skip
        self._out.print(table)
        for name, reason in result.failed.items():
            self._out.print(f"[yellow]{escape(name)} did not run: {escape(reason)}[/yellow]", soft_wrap=True)

    def _print_json(self, value: Any) -> None:
        print(json.dumps(value, indent=2, ensure_ascii=False, default=_plain))


class _PlainProgress:
    """A line now and then, for logs; callable from any thread."""

    def __init__(self, what: str, total: int, say: Callable[[str], None]) -> None:
        self._what, self._total, self._say = what, total, say
        self._done = 0
        self._start = self._last = time.monotonic()
        self._lock = Lock()

    def __call__(self, count: int) -> None:
        with self._lock:
            self._done += count
            now = time.monotonic()
            if now - self._last < PLAIN_INTERVAL_SECONDS:
                return
            self._last = now
        speed = self._done / (now - self._start)
        eta = (self._total - self._done) / max(speed, 1)
        self._say(
            f"{self._what}: {size(self._done)} of {size(self._total)} ({self._done / self._total:.0%}), "
            f"{speed / 1e9:.2f} GB/s, {eta:.0f} s left"
        )


def size(nbytes: float) -> str:
    """Bytes for people, in powers of 1000: `33.1 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def count(number: float) -> str:
    """A number of parameters for people: `31.2B`."""
    for unit in ("", "K", "M"):
        if number < 1000:
            return f"{number:.0f}" if not unit else f"{number:.1f}{unit}"
        number /= 1000
    return f"{number:.2f}B"


def _component_table(plan: "Plan") -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("component")
    table.add_column("becomes")
    for column in ("tensors", "parameters", "bytes in", "bytes out"):
        table.add_column(column, justify="right")
    table.add_column("why")
    reasons = _reasons(plan)
    for row in plan.components():
        table.add_row(
            row.component, "INT8" if row.quantized else "as it is", f"{row.tensors:,}", count(row.parameters),
            size(row.bytes_in), size(row.bytes_out), escape(reasons[row.component, row.quantized]),
        )  # fmt: skip
    return table


def _reasons(plan: "Plan") -> dict[tuple[str, bool], str]:
    """Why each component fares as it does: its tensors' reasons, the most frequent first."""
    tally: dict[tuple[str, bool], dict[str, int]] = {}
    for d in plan.decisions:
        reasons = tally.setdefault((d.component, d.quantize), {})
        reasons[d.reason] = reasons.get(d.reason, 0) + 1
    return {
        key: "; ".join(sorted(reasons, key=lambda r: -reasons[r])[:2]) + (" …" if len(reasons) > 2 else "")
        for key, reasons in tally.items()
    }


def _totals(plan: "Plan") -> dict[str, Any]:
    return {
        "bytes_in": plan.bytes_in,
        "bytes_out": plan.bytes_out,
        "disk_needed": plan.bytes_out,
        "ratio": plan.ratio,
        "components": plan.components(),
    }


def _plain(value: Any) -> Any:
    """What `json` cannot print by itself."""
    from dataclasses import asdict, is_dataclass

    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return str(value)


def _s(number: int) -> str:
    return "" if number == 1 else "s"


