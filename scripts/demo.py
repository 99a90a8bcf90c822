"""`make demo`: a real Gemma 3 270M, quantized, verified, served, evaluated and reported on, on one screen.

Everything printed is measured in this run: each command is a whole process, and peak memory is what the kernel accounts
to it. A dozen questions say little of a model, and the comparison says so; the commands are the same for all 1,319.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from make_gemma import make_gemma
from openai import OpenAI
from rich.console import Console
from rich.table import Table

from w8a8.bench.process import timed
from w8a8.evals.server import serving
from w8a8.terminal.wording import size

GSM8K = Path(__file__).parent / "gsm8k"
"""The first 8 training examples and the first 12 test questions of GSM8K (MIT, OpenAI)."""

QUESTION = "The three most important inventions of the last century are"
ANSWER_TOKENS = 48
SCORED_TOKENS = 96
"""Of an answer to a question of GSM8K. A base model this small goes on until it is stopped."""

KLD_TOKENS = 1024

os.environ |= {"HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
console = Console(highlight=False, width=100)


def main(folder: Path) -> None:
    """Work in `folder`; running it again reuses the model and replaces the results."""
    source, out = folder / "gemma-3-270m", folder / "gemma-3-270m-W8A8"
    with console.status("writing the real Gemma 3 270M as a sharded BF16 checkpoint (once, about half a minute)"):
        make_gemma(source)
    quantize_and_verify(source, out)
    base = serve_and_ask(source, folder / "gsm8k-bf16.json")
    quantized = serve_and_ask(out, folder / "gsm8k-w8a8.json")
    compare(source, out, base, quantized, folder / "kld.json")
    results = ("--baseline", base, "--quant", quantized, "--kld", folder / "kld.json")
    with console.status("writing the card and the report"):
        command("card", out, *results, "--overwrite")
        command("report", out, "--source", source, *results, "--out", folder / "report" / "report.html")
    console.print(f"\n[bold]w8a8 card[/bold] wrote {out / 'README.md'}")
    console.print(f"[bold]w8a8 report[/bold] wrote {folder / 'report' / 'report.html'}: open it in a browser")
    console.print(f"\nTalk to it: [bold].venv/bin/w8a8 chat {out}[/bold]")


def quantize_and_verify(source: Path, out: Path) -> None:
    """Both commands, and a table of what became of each component."""
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
            "INT8" if row["quantized"] else "as it is",
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


def serve_and_ask(checkpoint: Path, result: Path) -> Path:
    """Serve a checkpoint, show an answer and its speed, and what it scores on a dozen questions."""
    console.print(f"\n[bold]w8a8 serve {checkpoint} --engine transformers[/bold]")
    with (
        console.status("serving"),
        serving(str(checkpoint), engine="transformers", completions=True, timeout=60, notice=lambda _: None) as server,
    ):
        os.environ["OPENAI_API_KEY"] = server.api_key  # which `w8a8 eval` reads
        answer, rate = ask(OpenAI(base_url=server.base_url, api_key=server.api_key), str(checkpoint))
        console.print(f"{QUESTION}[dim]...[/dim]{' '.join(answer.split())}", style="italic")
        console.print(f"{rate:.0f} tokens/s, one request, greedy")
        scored = command(
            *(
                "eval",
                "gsm8k",
                "--base-url",
                server.base_url,
                "--completions",
                "--data",
                GSM8K,
                "--out",
                result,
                "--restart",
            ),
            *("--max-tokens", SCORED_TOKENS),
        )
    strict, flexible = scored["strict"], scored["flexible"]
    console.print(
        f"[bold]w8a8 eval gsm8k[/bold]: {strict['correct']} of {scored['questions']} right (last number: "
        f"{flexible['correct']}) in {scored['seconds']:.0f} s, {scored['tokens']['completion']} tokens"
    )
    return result


def compare(source: Path, out: Path, base: Path, quantized: Path, result: Path) -> None:
    """The two by their answers, and by their predictions."""
    verdict = command("compare", base, quantized)["verdict"]
    console.print(f"\n[bold]w8a8 compare[/bold]: {verdict}")
    with console.status("comparing predictions"):
        kld = command("eval", "kld", source, out, "--data", GSM8K, "--tokens", KLD_TOKENS, "--out", result)
    console.print(
        f"[bold]w8a8 eval kld[/bold]: mean KL divergence {kld['kl']['mean']:.4f} nats, same likeliest token "
        f"{kld['top1']['agreement']:.1%}, perplexity {kld['perplexity']['reference']:.2f} and "
        f"{kld['perplexity']['candidate']:.2f}, over {kld['tokens']} tokens"
    )


def ask(client: OpenAI, model: str) -> tuple[str, float]:
    """The greedy continuation of `QUESTION`, and tokens per second from the first token to the last."""
    client.completions.create(model=model, prompt="Hello", max_tokens=2)  # the first request pays for warming up
    pieces, times = [], []
    for chunk in client.completions.create(
        model=model, prompt=QUESTION, max_tokens=ANSWER_TOKENS, temperature=0, stream=True
    ):
        if chunk.choices and chunk.choices[0].text:
            pieces.append(chunk.choices[0].text)
            times.append(time.perf_counter())
    return "".join(pieces), (len(times) - 1) / (times[-1] - times[0])


def command(*arguments: str | Path | int) -> dict[str, Any]:
    """Run `w8a8 ... --json` as a process of its own: its result."""
    return measured(*arguments)[0]


def measured(*arguments: str | Path | int) -> tuple[dict[str, Any], str]:
    """That, and what it took."""
    run = timed([sys.executable, "-m", "w8a8", *map(str, arguments), "--json"])
    if run.returncode != 0:
        console.print(run.stderr, markup=False)
        sys.exit(run.returncode)
    return json.loads(run.stdout), f"{run.seconds:.2f} s whole process, peak memory {run.peak_mib:.0f} MiB"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
