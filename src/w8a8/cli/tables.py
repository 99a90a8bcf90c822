"""Prints the results of quantize, verify, inspect, fit and serve: tables for a person, JSON for a machine."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from w8a8.plan import module_name
from w8a8.terminal.output import Terminal, plain_table
from w8a8.terminal.wording import clean, count, duration, first_few, plural, size

if TYPE_CHECKING:
    from w8a8.calibrate.estimate import Estimate
    from w8a8.cluster import NodeWork
    from w8a8.conversion import ConvertResult
    from w8a8.doctor.findings import Diagnosis
    from w8a8.execute.status import Status
    from w8a8.inspection import Inspection
    from w8a8.memory import Fit
    from w8a8.plan import Plan
    from w8a8.publish.sending import Upload
    from w8a8.quantization import QuantizeResult
    from w8a8.serve.calling import Call
    from w8a8.serve.launch import Launch
    from w8a8.verification.result import VerifyResult

SHOWN = 10
"""Problems or warnings listed before the rest is only counted."""


def show_plan(terminal: Terminal, plan: "Plan", estimate: "Estimate | None" = None) -> None:
    """Print what `quantize` would do, and the `estimate` of what its calibration takes."""
    if terminal.json:
        more = {"estimate": estimate.to_dict()} if estimate else {}
        terminal.print_json({**plan.to_dict(), "totals": _totals(plan), **more})
        return
    terminal.say(f"[bold]{clean(plan.source)}[/bold]: {clean(plan.architecture)} to {plan.format}, {plan.recipe}")
    terminal.print(_component_table(plan, why=True))
    terminal.say(
        f"{size(plan.bytes_in)} in, {size(plan.bytes_out)} out ({plan.ratio:.1%}), "
        f"{plural(len(plan.shards), 'shard')}; needs {size(plan.bytes_out)} of disk"
    )
    _quantized_already(terminal, plan)
    terminal.say(f"config.json will exclude {plural(len(plan.exclude), 'linear layer')}: {first_few(plan.exclude)}")
    _not_copied(terminal, plan)
    for warning in plan.warnings:
        terminal.say(f"[yellow]warning:[/yellow] {clean(warning)}")
    if estimate:
        _show_estimate(terminal, estimate)


def _show_estimate(terminal: Terminal, found: "Estimate") -> None:
    ran = f"{plural(len(found.layers), 'layer')} of {found.of} run here ({', '.join(map(str, found.layers))})"
    terminal.say(
        f"\n[bold]calibration[/bold], {found.recipe}, {found.samples} samples of {found.tokens} tokens, on "
        f"{found.device}: an estimate, {ran}"
    )
    table = plain_table("", "measured, s", "times", "in all, s", left=1)
    for part in found.parts:
        table.add_row(part.name, f"{part.seconds:.2f}", f"{part.times}", f"{part.total:.0f}")
    terminal.print(table)
    gpu = f", and {size(found.gpu_memory)} on the GPU" if found.gpu_memory else ""
    terminal.say(
        f"about {duration(found.seconds)} if this machine stays as busy as it is, and then that of writing OUT\n"
        f"memory {size(found.memory)}{gpu}: what measuring took, and {size(found.counted)} counted besides\n"
        f"disk {size(found.disk.needed)} at most, counted; {size(found.disk.result)} of it stays as OUT"
    )


def show_quantized(terminal: Terminal, result: "QuantizeResult", upload: "Upload | None" = None) -> None:
    """Print what `quantize` did, and where it went."""
    plan, pushed = result.plan, upload.done if upload else None
    if terminal.json:
        terminal.print_json(
            {
                "out": None if upload and upload.departs else result.address or str(result.out),
                "source": plan.source,
                "revision": plan.revision,
                "format": plan.format,
                "seconds": round(result.seconds, 3),
                "gb_per_second": round(result.gb_per_second, 3),
                "resumed_shards": result.resumed,
                "nodes": [work.to_dict() for work in result.nodes],
                "quantized_source": plan.quantized_source,
                "not_copied": dict(plan.left_out),
                "warnings": list(plan.warnings),
                "totals": _totals(plan),
                **(pushed.address() if pushed else {}),
            }
        )
        return
    if not terminal.quiet:
        terminal.print(_component_table(plan))
        _quantized_already(terminal, plan)
        _not_copied(terminal, plan)
    what = plan.source if upload and upload.departs else result.address or str(result.out)
    terminal.say(
        f"[bold]{clean(what)}[/bold]: {size(plan.bytes_in)} to {size(plan.bytes_out)} "
        f"({plan.ratio:.1%}) in {result.seconds:.1f} s, {result.gb_per_second:.2f} GB/s"
    )
    if pushed:
        from w8a8.publish.push import show

        show(pushed, terminal.say)
    _nodes(terminal, result.nodes)


def by_node(nodes: Sequence["NodeWork"]) -> dict[str, Any]:
    """What the last event of a run on a cluster has of its nodes; nothing where there were none."""
    return {"nodes": [work.to_dict() for work in nodes]} if nodes else {}


def _nodes(terminal: Terminal, nodes: Sequence["NodeWork"]) -> None:
    for work in nodes:
        terminal.say(f"  {clean(work.node)}: {size(work.bytes)}, {work.gb_per_second:.2f} GB/s")


def show_converted(terminal: Terminal, result: "ConvertResult") -> None:
    """Print what `convert` did."""
    plan, where = result.plan, result.address or str(result.out)
    if terminal.json:
        values = {
            "out": where,
            "source": plan.source,
            "revision": plan.revision,
            "format": plan.format,
            "seconds": round(result.seconds, 3),
            "resumed_shards": result.resumed,
            "quantized_source": plan.quantized_source,
            "bytes_in": plan.bytes_in,
            "bytes_out": plan.bytes_out,
        }
        terminal.print_json(values)
        return
    terminal.say(
        f"[bold]{clean(where)}[/bold]: {plural(sum(1 for _ in plan.writes()), 'tensor')} in {plan.format}, "
        f"{size(plan.bytes_in)} to {size(plan.bytes_out)} in {result.seconds:.1f} s"
    )


def show_verified(terminal: Terminal, result: "VerifyResult", top: int) -> None:
    """Print what `verify` found."""
    if terminal.json:
        terminal.print_json(result.to_dict())
        return
    if not terminal.quiet:
        if result.tensors and top:
            terminal.print(_error_table(result, top))
        for warning in result.warnings[:SHOWN]:
            terminal.say(f"[yellow]warning:[/yellow] {clean(warning)}")
        _more(terminal, len(result.warnings), "warning")
    for problem in result.problems[:SHOWN]:
        terminal.say(f"[red]problem:[/red] {clean(problem)}")
    _more(terminal, len(result.problems), "problem")
    _nodes(terminal, result.nodes)
    terminal.say(f"[{'green' if result.ok else 'red'} bold]{clean(result.verdict)}[/]")


def show_inspected(terminal: Terminal, found: "Inspection", *, tensors: bool) -> None:
    """Print what `inspect` saw."""
    if terminal.json:
        terminal.print_json(found.to_dict(tensors=tensors))
        return
    terminal.say(f"[bold]{clean(found.name)}[/bold]: {clean(', '.join(found.architectures) or found.model_type)}")
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
    terminal.print(table)
    recipe = f"; recipe {clean(found.recipe)}" if found.recipe else ""
    terminal.say(f"{plural(found.shards, 'shard')}; {clean(found.scheme)}{recipe}")
    if found.excludes:
        terminal.say(f"excludes {len(found.excludes)}: {first_few(found.excludes)}")
    if tensors:
        for t in found.specs:
            terminal.say(clean(f"{t.dtype:5} {list(t.shape)!s:16} {t.name}  ({t.shard})"))


def show_diagnosis(terminal: Terminal, found: "Diagnosis") -> None:
    """Print what `doctor` found."""
    if terminal.json:
        terminal.print_json(found.to_dict())
        return
    for title, lines in (("This machine", found.has), ("What commands use", found.uses)):
        terminal.say(f"[bold]{title}[/bold]")
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(style="dim", no_wrap=True)
        for line in lines:
            table.add_row(f"  {line.about}", clean(line.text))
        terminal.print(table)
    terminal.say("[bold]To be faster[/bold]")
    for advice in found.faster:
        terminal.say(f"  {clean(advice.why)}\n      {clean(advice.command)}")
    if not found.faster:
        terminal.say("  Nothing is missing.")


def show_fit(terminal: Terminal, found: "Fit") -> None:
    """Print whether a checkpoint fits."""
    if terminal.json:
        terminal.print_json(found.to_dict())
        return
    from w8a8.memory.drawing import draw

    draw(found, terminal.out)


def show_command(terminal: Terminal, launch: "Launch") -> None:
    """Print the command that `serve` would start, and how to call the server."""
    if terminal.json:
        terminal.print_json(launch.to_dict())
        return
    for notice in launch.notices:
        terminal.notice(notice)
    if launch.engine == "vllm" and "--host" in launch.argv:
        print("# --host: vLLM's own default is every network this machine is in")
    print(f"{launch.shell}\n\n# once it is ready:\n{launch.call.curl}")


def show_start(terminal: Terminal, launch: "Launch") -> None:
    """Say which command `serve` starts."""
    for notice in launch.notices:
        terminal.notice(notice)
    terminal.notice(" ".join(launch.shell.replace("\\\n", "").split()))


def show_ready(terminal: Terminal, launch: "Launch", call: "Call", seconds: float) -> None:
    """Say that a server answers, and how to call it."""
    if terminal.json:
        terminal.print_json({**launch.to_dict(), "url": call.url, "seconds": round(seconds, 1)})
        sys.stdout.flush()
    terminal.notice(f"ready in {seconds:.0f} s: {call.url}")
    print(f"\n{call.curl}\n\nin Python: {call.python}\n", file=sys.stderr, flush=True)


def _more(terminal: Terminal, number: int, what: str) -> None:
    if number > SHOWN:
        terminal.say(f"... and {plural(number - SHOWN, what)} more (--json lists all)")


def _quantized_already(terminal: Terminal, plan: "Plan") -> None:
    if plan.quantized_source:
        terminal.say(f"SRC is quantized already ({clean(plan.quantized_source)}); the table has its sizes dequantized")


def _not_copied(terminal: Terminal, plan: "Plan") -> None:
    for name, reason in plan.left_out:
        terminal.say(f"[dim]not copied: {clean(name)} ({clean(reason)})[/dim]")


def _component_table(plan: "Plan", *, why: bool = False) -> Table:
    table = plain_table("component", "becomes", "tensors", "parameters", "bytes in", "bytes out", left=2)
    if why:
        table.add_column("why")
    reasons = _reasons(plan)
    for row in plan.components():
        cells = (
            row.component,
            "INT8" if row.quantized else "unchanged",
            f"{row.tensors:,}",
            count(row.parameters),
            size(row.bytes_in),
            size(row.bytes_out),
        )
        table.add_row(*cells, *([clean(reasons[row.component, row.quantized])] if why else []))
    return table


def _error_table(result: "VerifyResult", top: int) -> Table:
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
    """Collect why each component is quantized or not: its tensors' reasons, the most frequent first."""
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


def show_status(terminal: Terminal, found: "Status") -> None:
    """Print how far a run is."""
    if terminal.json:
        terminal.print_json(found.to_dict())
        return
    if found.state == "whole":
        terminal.say(f"[bold]{clean(found.out)}[/bold] is whole; no run is making it")
        return
    terminal.say(f"[bold]{clean(found.out)}[/bold] is not whole; its run is {_STATES[found.state]}")
    if not found.shards:
        terminal.say("no shard has been begun")
        return
    share = found.bytes_done / max(found.bytes, 1)
    terminal.say(
        f"{clean(found.format)}, {clean(found.recipe)}: {found.shards_done:,} of {plural(found.shards, 'shard')} done, "
        f"{size(found.bytes_done)} of {size(found.bytes)} ({share:.0%})"
    )
    if found.shards_sent:
        terminal.say(
            f"{plural(found.shards_sent, 'shard')} of the result {'is' if found.shards_sent == 1 else 'are'} sent"
        )
    if found.downloaded:
        terminal.say(f"{size(found.downloaded)} of the source are downloaded and wait")
    if found.remaining:
        terminal.say(f"remaining: {first_few(found.remaining)}")


_STATES = {"running": "under way", "interrupted": "interrupted; the same command goes on"}
