"""How results look on a terminal: tables, one live progress line, or JSON.

Data goes to standard output and everything about its making to standard error, so that a pipe gets the data alone.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Any

from rich import markup
from rich.console import Console
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
    from w8a8.memory import Fit
    from w8a8.plan import Plan
    from w8a8.quantization import QuantizeResult
    from w8a8.serve.calling import Call
    from w8a8.serve.launch import Launch
    from w8a8.verification.run import VerifyResult

PLAIN_INTERVAL_SECONDS = 5.0
SHOWN = 10
"""Problems or warnings listed before the rest is only counted."""


class Terminal:
    """Prints for a person, or JSON for a machine; `quiet` leaves out all but results and errors."""

    def __init__(self, *, json: bool = False, quiet: bool = False) -> None:
        """`json` prints results as JSON; `quiet` concerns standard error and tables."""
        self._json = json
        self._quiet = quiet
        self._out = Console(highlight=False)
        self._err = Console(stderr=True, highlight=False)

    def notice(self, text: str) -> None:
        """Say something about the work under way."""
        if not self._quiet:
            self._err.print(clean(text), soft_wrap=True)

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
        self._say(f"[bold]{clean(plan.source)}[/bold]: {clean(plan.architecture)} to {plan.format}, {plan.recipe}")
        self._out.print(_component_table(plan, why=True))
        self._say(
            f"{size(plan.bytes_in)} in, {size(plan.bytes_out)} out ({plan.ratio:.1%}), "
            f"{plural(len(plan.shards), 'shard')}; needs {size(plan.bytes_out)} of disk"
        )
        self._say(f"config.json will exclude {plural(len(plan.exclude), 'linear layer')}: {_some(plan.exclude)}")
        self._not_copied(plan)
        for warning in plan.warnings:
            self._say(f"[yellow]warning:[/yellow] {clean(warning)}")

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
                    "not_copied": dict(plan.left_out),
                    "warnings": list(plan.warnings),
                    "totals": _totals(plan),
                }
            )
            return
        if not self._quiet:
            self._out.print(_component_table(plan))
            self._not_copied(plan)
        self._say(
            f"[bold]{clean(str(result.out))}[/bold]: {size(plan.bytes_in)} to {size(plan.bytes_out)} "
            f"({plan.ratio:.1%}) in {result.seconds:.1f} s, {result.gb_per_second:.2f} GB/s"
        )

    def verified(self, result: "VerifyResult", top: int) -> None:
        """What `verify` found."""
        if self._json:
            self._print_json(result.to_dict())
            return
        if not self._quiet:
            if result.tensors and top:
                self._out.print(_error_table(result, top))
            for warning in result.warnings[:SHOWN]:
                self._say(f"[yellow]warning:[/yellow] {clean(warning)}")
            self._more(len(result.warnings), "warning")
        for problem in result.problems[:SHOWN]:
            self._say(f"[red]problem:[/red] {clean(problem)}")
        self._more(len(result.problems), "problem")
        self._say(f"[{'green' if result.ok else 'red'} bold]{clean(result.verdict)}[/]")

    def inspected(self, found: "Inspection", *, tensors: bool) -> None:
        """What `inspect` saw."""
        if self._json:
            self._print_json(found.to_dict(tensors=tensors))
            return
        self._say(f"[bold]{clean(found.name)}[/bold]: {clean(', '.join(found.architectures) or found.model_type)}")
        table = plain_table("component", "dtype", "tensors", "parameters", "bytes", "share", left=2)
        for row in found.components:
            table.add_row(
                row.component,
                row.dtype,
                f"{row.tensors:,}",
                count(row.parameters),
                size(row.nbytes),
                f"{row.nbytes / max(found.nbytes, 1):.1%}",
            )
        table.add_row("total", "", f"{found.tensors:,}", count(found.parameters), size(found.nbytes), "", style="bold")
        self._out.print(table)
        recipe = f"; recipe {clean(found.recipe)}" if found.recipe else ""
        self._say(f"{plural(found.shards, 'shard')}; {clean(found.scheme)}{recipe}")
        if found.excludes:
            self._say(f"excludes {len(found.excludes)}: {_some(found.excludes)}")
        if tensors:
            for t in found.specs:
                self._say(clean(f"{t.dtype:5} {list(t.shape)!s:16} {t.name}  ({t.shard})"))

    def fitted(self, found: "Fit") -> None:
        """Whether a checkpoint fits."""
        if self._json:
            self._print_json(found.to_dict())
            return
        from w8a8.memory.drawing import draw

        draw(found, self._out)

    def command(self, launch: "Launch") -> None:
        """What `serve` would start, and how to call it then."""
        if self._json:
            self._print_json(launch.to_dict())
            return
        for notice in launch.notices:
            self.notice(notice)
        if launch.engine == "vllm" and "--host" in launch.argv:
            print("# --host: vLLM's own default is every network this machine is in")
        print(f"{launch.shell}\n\n# once it is ready:\n{launch.call.curl}")

    def starting(self, launch: "Launch") -> None:
        """What `serve` starts."""
        for notice in launch.notices:
            self.notice(notice)
        self.notice(" ".join(launch.shell.replace("\\\n", "").split()))

    def ready(self, launch: "Launch", call: "Call", seconds: float) -> None:
        """That a server answers, and how to call it."""
        if self._json:
            self._print_json({**launch.to_dict(), "url": call.url, "seconds": round(seconds, 1)})
            sys.stdout.flush()
        self.notice(f"ready in {seconds:.0f} s: {call.url}")
        print(f"\n{call.curl}\n\nin Python: {call.python}\n", file=sys.stderr, flush=True)

    def benched(self, result: "BenchResult") -> None:
        """What a benchmark measured."""
        if self._json:
            self._print_json(result.to_dict())
            return
        table = plain_table("seconds", "min-max", "x cp -r", "peak MiB", "contender", left=0)
        for row in result.rows:
            table.add_row(
                f"{row.seconds:.2f}",
                f"{min(row.all_seconds):.2f}-{max(row.all_seconds):.2f}",
                f"{row.seconds / result.baseline:.2f}",
                f"{row.peak_mib:.0f}",
                row.name,
            )
        self._say(f"{result.bytes / 2**30:.2f} GiB, {result.cores} cores, medians of {len(result.rows[0].all_seconds)}")
        self._out.print(table)
        for name, reason in result.failed.items():
            self._say(f"[yellow]{clean(name)} did not run:[/yellow] {clean(reason)}")

    def table(self, result: Any, show: Callable[[Any, Callable[[Any], None]], None]) -> None:
        """A result that has a `to_dict`, as JSON or by its own `show(result, say)`; `say` prints what Rich can."""
        if self._json:
            self._print_json(result.to_dict())
        else:
            show(result, self._out.print)

    def _say(self, text: str) -> None:
        self._out.print(text, soft_wrap=True)

    def _more(self, number: int, what: str) -> None:
        if number > SHOWN:
            self._say(f"... and {plural(number - SHOWN, what)} more (--json lists all)")

    def _not_copied(self, plan: "Plan") -> None:
        for name, reason in plan.left_out:
            self._say(f"[dim]not copied: {clean(name)} ({clean(reason)})[/dim]")

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


def printable(text: str) -> str:
    """`text` with what could move the cursor or start a line spelled out: names in a checkpoint may hold anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def clean(text: str) -> str:
    """`text` safe to put between Rich markup."""
    return markup.escape(printable(text))


def plural(number: int, what: str) -> str:
    """`1 shard`, `2 shards`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _some(names: Sequence[str]) -> str:
    """The first few of many names."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return clean(", ".join(names[:3])) + more


def plain_table(*columns: str, left: int) -> Table:
    """A plain table whose first `left` columns and last one are text, the others numbers."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for i, column in enumerate(columns):
        text = i < left or (i == len(columns) - 1 and left == 0)
        table.add_column(column, justify="left" if text else "right", overflow="fold" if text else "ellipsis")
    return table


def _component_table(plan: "Plan", *, why: bool = False) -> Table:
    table = plain_table("component", "becomes", "tensors", "parameters", "bytes in", "bytes out", left=2)
    if why:
        table.add_column("why")
    reasons = _reasons(plan)
    for row in plan.components():
        cells = (
            row.component,
            "INT8" if row.quantized else "as it is",
            f"{row.tensors:,}",
            count(row.parameters),
            size(row.bytes_in),
            size(row.bytes_out),
        )
        table.add_row(*cells, *([clean(reasons[row.component, row.quantized])] if why else []))
    return table


def _error_table(result: "VerifyResult", top: int) -> Table:
    from w8a8.plan import module_name

    table = plain_table("SQNR dB", "error/scale", "saturated", "zeroed rows", "worst quantized tensors", left=0)
    for t in result.tensors[:top]:
        table.add_row(
            f"{t.sqnr_db:.2f}",
            f"{t.max_error:.3f}",
            f"{t.saturated:,}",
            f"{t.zeroed_rows:,}",
            clean(module_name(t.name)),
        )
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
