"""`make demo`: a real Gemma 3 270M, quantized, verified, served, evaluated and reported on, on one screen.

Everything printed is measured in this run: each command is a whole process, and peak memory is what the kernel accounts
to it. How many questions are asked is chosen by what this machine does in three minutes (`scripts/pace.py`). A dozen
questions say little of a model, and the comparison says so; the commands are the same for all 1,319.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from make_gemma import make_gemma
from measuring import import_torch, measure
from pace import BUDGET, LADDER, Amounts, Machine, choose, kld_tokens, spoken
from rich.console import Console
from rich.table import Table

from w8a8.bench.process import timed
from w8a8.evals.gsm8k.asking import Server
from w8a8.evals.server import serving
from w8a8.terminal.wording import size

GSM8K = Path(__file__).parent / "gsm8k"
"""The first 8 training examples and the first 12 test questions of GSM8K (MIT, OpenAI)."""

QUESTION = "The three most important inventions of the last century are"

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "COLUMNS": "100"}
console = Console(highlight=False, width=100)


def main(folder: Path) -> None:
    """Work in `folder`; running it again reuses the model and replaces the results."""
    begin = time.monotonic()
    source, out = folder / "gemma-3-270m", folder / "gemma-3-270m-W8A8"
    console.print(f"Takes up to {spoken(BUDGET)} on two idle cores: a short measurement chooses how much is asked.")

    # 1) The model, and how quick this machine is with it
    imported = write_model(source)
    with console.status("measuring this machine (the first time, the INT8 layer is compiled: some seconds more)"):
        machine = measure(source, imported)
    asking = time.monotonic()
    amounts = choose(machine, BUDGET - (asking - begin))
    announce(machine, amounts, asking - begin)

    # 2) The commands, on the original and on what they make of it
    quantize_and_verify(source, out)
    base, quantized = folder / "gsm8k-bf16.json", folder / "gsm8k-w8a8.json"
    with both_served(source, out) as (base_server, quantized_server):
        ask_questions(source, base_server, base, amounts)
        ask_questions(out, quantized_server, quantized, amounts)

    # 3) What the two differ in; with fewer tokens where this machine has slowed down
    slowed = max(1, (time.monotonic() - asking) / machine.asking(amounts))
    tokens = kld_tokens(machine, amounts.kld, BUDGET - (time.monotonic() - begin), slowed=slowed)
    compare(source, out, base, quantized, folder / "kld.json", tokens, planned=amounts.kld)

    # 4) What is published
    write_card_and_report(source, out, base, quantized, folder)
    console.print(f"\nTook {spoken(time.monotonic() - begin)}. Talk to it: [bold].venv/bin/w8a8 chat {out}[/bold]")


def write_model(source: Path) -> float:
    """Write the real model unless it is there; return the seconds that importing torch and transformers took."""
    with console.status("importing torch and transformers"):
        imported = import_torch()
    begin, there = time.monotonic(), source.exists()
    with console.status("writing the real Gemma 3 270M as a sharded BF16 checkpoint (once, about half a minute)"):
        make_gemma(source)
    if not there:
        console.print(
            f"Wrote {source}, the real model in BF16, in {spoken(time.monotonic() - begin)} (only this once)."
        )
    return imported


def announce(machine: Machine, amounts: Amounts, spent: float) -> None:
    """Say what was measured, what is therefore done, and about how long all of it takes."""
    every, seconds = LADDER[0], spent + machine.seconds(amounts)
    console.print(
        f"This machine reads {1 / machine.bf16.read:.0f} tokens/s in BF16 and {1 / machine.int8.read:.0f} in INT8. So: "
        f"{amounts.questions} of {every.questions} questions, {amounts.shots} of {every.shots} examples before each, "
        f"KL divergence over {amounts.kld} of {every.kld} tokens; about {spoken(seconds)} in all."
    )
    if seconds > BUDGET:
        console.print(f"That is more than {spoken(BUDGET)}: this machine is slow, or busy with other work.")


def quantize_and_verify(source: Path, out: Path) -> None:
    """Run both commands, and show a table of what became of each component."""
    with console.status("quantizing"):
        quantized, quantize_cost = measured("quantize", source, out, "--overwrite")
    with console.status("verifying"):
        verified, verify_cost = measured("verify", out, "--source", source)
    totals = quantized["totals"]
    console.print(f"\n[bold]w8a8 quantize {source} {out}[/bold]")
    table = Table(box=None, header_style="dim")
    for column in ("component", "becomes"):
        table.add_column(column)
    for column in ("tensors", "in", "out", "SQNR dB", "max error/scale"):
        table.add_column(column, justify="right")
    errors = {row["component"]: row for row in verified["components"]}
    for row in totals["components"]:
        error = errors.get(row["component"]) if row["quantized"] else None
        table.add_row(
            row["component"],
            "INT8" if row["quantized"] else "unchanged",
            str(row["tensors"]),
            size(row["bytes_in"]),
            size(row["bytes_out"]),
            f"{error['sqnr_db']:.2f}" if error else "exact",
            f"{error['max_error']:.3f}" if error else "0",
        )
    console.print(table)
    console.print(
        f"{size(totals['bytes_in'])} to {size(totals['bytes_out'])} ({totals['ratio']:.1%}) in "
        f"{quantized['seconds']:.2f} s of work, {quantized['gb_per_second']:.2f} GB/s ({quantize_cost})"
    )
    console.print(f"\n[bold]w8a8 verify {out} --source {source}[/bold]")
    console.print(f"{verified['verdict']} ({verify_cost})")


@contextmanager
def both_served(source: Path, out: Path) -> Iterator[list[Server]]:
    """Serve both checkpoints. Their processes start side by side: on two cores that takes as long as one."""

    def start(checkpoint: Path) -> Server:
        return stack.enter_context(
            serving(str(checkpoint), engine="transformers", completions=True, timeout=60, notice=lambda _: None)
        )

    with ExitStack() as stack:
        with console.status("starting both servers"), ThreadPoolExecutor() as pool:
            servers = list(pool.map(start, (source, out)))
        yield servers


def ask_questions(checkpoint: Path, server: Server, result: Path, amounts: Amounts) -> None:
    """Show an answer of the model served and its speed, and what it scores on some questions: `result` has all."""
    console.print(f"\n[bold]w8a8 serve {checkpoint} --engine transformers[/bold]")
    with console.status("asking"):
        os.environ["OPENAI_API_KEY"] = server.api_key  # which `w8a8 eval` reads
        answer, rate = ask(server, str(checkpoint), amounts.shown)
        console.print(f"{QUESTION}[dim]...[/dim]{' '.join(answer.split())}", style="italic")
        console.print(f"{rate:.1f} tokens/s, one request, greedy")
        asked = ("--limit", amounts.questions, "--shots", amounts.shots, "--max-tokens", amounts.answer)
        where = ("--base-url", server.base_url, "--completions", "--data", GSM8K, "--out", result, "--restart")
        scored = command("eval", "gsm8k", *where, *asked)
    strict, flexible = scored["strict"], scored["flexible"]
    console.print(
        f"[bold]w8a8 eval gsm8k[/bold]: {strict['correct']} of {scored['questions']} right (last number: "
        f"{flexible['correct']}) in {scored['seconds']:.0f} s, {scored['tokens']['completion']} tokens"
    )


def compare(source: Path, out: Path, base: Path, quantized: Path, result: Path, tokens: int, *, planned: int) -> None:
    """Compare the two by their answers, and by their predictions of `tokens` tokens."""
    verdict = command("compare", base, quantized)["verdict"]
    console.print(f"\n[bold]w8a8 compare[/bold]: {verdict}")
    with console.status("comparing predictions"):
        kld = command("eval", "kld", source, out, "--data", GSM8K, "--tokens", tokens, "--out", result)
    console.print(
        f"[bold]w8a8 eval kld[/bold]: mean KL divergence {kld['kl']['mean']:.4f} nats, same likeliest token "
        f"{kld['top1']['agreement']:.1%}, perplexity {kld['perplexity']['reference']:.2f} and "
        f"{kld['perplexity']['candidate']:.2f}, over {kld['tokens']} tokens"
        + (f" (not {planned}: this machine has slowed down)" if tokens < planned else "")
    )


def write_card_and_report(source: Path, out: Path, base: Path, quantized: Path, folder: Path) -> None:
    """Write the model card into `out`, and the report beside it."""
    results = ("--baseline", base, "--quant", quantized, "--kld", folder / "kld.json")
    report = folder / "report" / "report.html"
    with console.status("writing the card and the report"):
        command("card", out, *results, "--overwrite")
        command("report", out, "--source", source, *results, "--out", report)
    console.print(f"\n[bold]w8a8 card[/bold] wrote {out / 'README.md'}")
    console.print(f"[bold]w8a8 report[/bold] wrote {report}: open it in a browser")


def ask(server: Server, model: str, tokens: int) -> tuple[str, float]:
    """The greedy continuation of `QUESTION`, and tokens per second from the first token to the last."""
    from openai import OpenAI

    client = OpenAI(base_url=server.base_url, api_key=server.api_key)
    client.completions.create(model=model, prompt="Hello", max_tokens=2)  # the first request pays for warming up
    pieces, times = [], []
    for chunk in client.completions.create(model=model, prompt=QUESTION, max_tokens=tokens, temperature=0, stream=True):
        if chunk.choices and chunk.choices[0].text:
            pieces.append(chunk.choices[0].text)
            times.append(time.perf_counter())
    return "".join(pieces), (len(times) - 1) / (times[-1] - times[0])


def command(*arguments: str | Path | int) -> dict[str, Any]:
    """Run `w8a8 ... --json` as a process of its own: its result."""
    return measured(*arguments)[0]


def measured(*arguments: str | Path | int) -> tuple[dict[str, Any], str]:
    """Run it so: its result, and its time and peak memory in words."""
    run = timed([sys.executable, "-m", "w8a8", *map(str, arguments), "--json"])
    if run.returncode != 0:
        console.print(run.stderr, markup=False)
        sys.exit(run.returncode)
    return json.loads(run.stdout), f"{run.seconds:.2f} s whole process, peak memory {run.peak_mib:.0f} MiB"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
