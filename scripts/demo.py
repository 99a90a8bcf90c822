"""`make demo`: a real chat model, quantized, verified, served beside its original, scored and reported on.

Everything printed is measured in this run: each command is a whole process, and peak memory is what the kernel accounts
to it. How many questions are asked is chosen by what this machine does in three minutes (`scripts/pace.py`). A dozen
questions say little of a model, and the comparison says so; the commands are the same for all 1,319.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from make_gemma import assembled
from make_qwen import fetch_qwen
from pace import BUDGET, LADDER, SHOTS, Amounts, Machine, Rates, choose, kld_tokens, spoken
from rich.console import Console
from rich.table import Table
from rich.text import Text

from w8a8.bench.process import timed
from w8a8.evals.asking import Server
from w8a8.evals.gsm8k.questions import load, request
from w8a8.evals.gsm8k.scoring import flexible, strict
from w8a8.evals.server import serving
from w8a8.terminal.wording import size

GSM8K = Path(__file__).parent / "gsm8k"
"""The first 8 training examples and the first 12 test questions of GSM8K (MIT, OpenAI)."""

TASK = "Write a Python function is_prime(n). Give only the code, without comments."
TASK_TOKENS = 112

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "COLUMNS": "100"}
console = Console(highlight=False, width=100)


@dataclass(frozen=True, slots=True)
class Pair:
    """The original and the quantized model: where each lies, and the file that their GSM8K results go to."""

    bf16: Path
    int8: Path

    @property
    def folders(self) -> tuple[Path, Path]:
        """Both, the original first."""
        return self.bf16, self.int8

    @property
    def results(self) -> tuple[Path, Path]:
        """The result files of both, beside them."""
        return self.bf16.with_name("gsm8k-bf16.json"), self.bf16.with_name("gsm8k-w8a8.json")


def main(folder: Path) -> None:
    """Work in `folder`; running it again keeps what was downloaded and converted, and replaces the results."""
    with console.status("downloading Qwen2.5-Coder 0.5B, 490 MB, once"):
        qwen = fetch_qwen(folder / "qwen2.5-coder-0.5b.gguf")
    begin = time.monotonic()
    console.print(f"Takes up to {spoken(BUDGET)} on two idle cores: short measurements choose how much is asked.")

    # 1) Two real models, in BF16: Gemma 3 270M, which continues texts, and Qwen2.5-Coder 0.5B, which chats.
    small, source = convert(assembled(folder / "gemma-3-270m.gguf"), qwen)
    models = Pair(source, source.with_name(f"{source.name}-W8A8"))

    # 2) INT8 files of both, verified.
    quantize_and_verify(small, small.with_name(f"{small.name}-W8A8"))
    quantize_and_verify(*models.folders)

    # 3) The chat model, served in BF16 and in W8A8: a task, then as many questions as there is time for.
    starting = time.monotonic()
    with both_served(models) as servers:
        start = time.monotonic() - starting
        machine = Machine(start, *measured_side_by_side(models, servers))
        asking = time.monotonic()
        amounts = choose(machine, BUDGET - (asking - begin))
        announce(machine, amounts, asking - begin)
        ask_questions(models, servers, amounts)

    # 4) What the two differ in; with fewer tokens where this machine has slowed down.
    slowed = max(1, (time.monotonic() - asking) / machine.asking(amounts))
    tokens = kld_tokens(machine, amounts.kld, BUDGET - (time.monotonic() - begin), slowed=slowed)
    compare(models, folder / "kld.json", tokens, planned=amounts.kld)

    # 5) What is published.
    write_card_and_report(models, folder)
    console.print(
        f"\nTook {spoken(time.monotonic() - begin)}. Talk to it: [bold].venv/bin/w8a8 chat {models.int8}[/bold]"
    )


def convert(*files: Path) -> list[Path]:
    """Write GGUF files as BF16 checkpoints, side by side, unless they are there."""

    def one(file: Path) -> str:
        return measured("convert", file, file.with_suffix(""), "--format", "bf16")[1]

    missing = [file for file in files if not file.with_suffix("").exists()]
    with console.status("converting both models from GGUF, once"), ThreadPoolExecutor() as pool:
        costs = list(pool.map(one, missing))
    for file, cost in zip(missing, costs, strict=True):
        console.print(f"\n[bold]w8a8 convert {file} {file.with_suffix('')} --format bf16[/bold]")
        console.print(f"the real model, from 4 bits to BF16: {cost}; only this once")
    return [file.with_suffix("") for file in files]


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
        f"{quantized['seconds']:.2f} s of work ({quantize_cost})"
    )
    console.print(f"\n[bold]w8a8 verify {out} --source {source}[/bold]")
    console.print(f"{verified['verdict']} ({verify_cost})")


@contextmanager
def both_served(models: Pair) -> Iterator[Sequence[Server]]:
    """Serve both checkpoints. Their processes start side by side: on two cores that takes as long as one."""

    def start(checkpoint: Path) -> Server:
        return stack.enter_context(
            serving(str(checkpoint), engine="transformers", completions=False, timeout=120, notice=lambda _: None)
        )

    with ExitStack() as stack:
        with console.status("starting both servers"), ThreadPoolExecutor() as pool:
            servers = list(pool.map(start, models.folders))
        yield servers


def measured_side_by_side(models: Pair, servers: Sequence[Server]) -> tuple[Rates, Rates]:
    """Give both models the same task, show their answers side by side, and return how quick they are."""
    question = load(GSM8K, shots=SHOTS, limit=1)
    prompt = request(question.questions[0].text, question.examples, completions=False)["messages"]
    answers = []
    for server, model in zip(servers, models.folders, strict=True):
        with console.status(f"asking {model}"):
            ask(server, model, _said("Hello"), 2)  # the first request pays for warming up
            read = ask(server, model, prompt, 1)
            answers.append((read.seconds / read.prompt, ask(server, model, _said(TASK), TASK_TOKENS)))
    console.print(f"\n[bold]w8a8 serve {models.bf16}[/bold] and [bold]w8a8 serve {models.int8}[/bold]")
    console.print(f"{TASK}\n", style="italic")
    table = Table.grid(expand=True, padding=(0, 2))
    for _ in answers:
        table.add_column(ratio=1, overflow="fold")
    names = ("BF16", "W8A8")
    table.add_row(*(f"[bold]{n}[/bold], {1 / a.step:.1f} tokens/s" for n, (_, a) in zip(names, answers, strict=True)))
    table.add_row(*(Text(answer.text.strip()) for _, answer in answers))
    console.print(table)
    bf16, int8 = (Rates(read, answer.step) for read, answer in answers)
    return bf16, int8


def announce(machine: Machine, amounts: Amounts, spent: float) -> None:
    """Say what was measured, what is therefore done, and about how long all of it takes."""
    every, seconds = LADDER[0], spent + machine.seconds(amounts)
    console.print(
        f"\nPrompts are read at {1 / machine.bf16.read:.0f} tokens/s in BF16 and {1 / machine.int8.read:.0f} in W8A8. "
        f"So: {amounts.questions} of {every.questions} questions, answers of up to {amounts.answer} tokens, KL "
        f"divergence over {amounts.kld} of {every.kld} tokens; about {spoken(seconds)} in all."
    )
    if seconds > BUDGET:
        console.print(f"That is more than {spoken(BUDGET)}: this machine is slow, or busy with other work.")


def ask_questions(models: Pair, servers: Sequence[Server], amounts: Amounts) -> None:
    """Score both models on the same questions, and show their answers beside the right ones."""
    found = []
    for server, result in zip(servers, models.results, strict=True):
        with console.status(f"asking {amounts.questions} questions of GSM8K: {result}"):
            os.environ["OPENAI_API_KEY"] = server.api_key  # which `w8a8 eval` reads
            asked = ("--limit", amounts.questions, "--shots", SHOTS, "--max-tokens", amounts.answer)
            where = ("--base-url", server.base_url, "--data", GSM8K, "--out", result, "--restart")
            found.append(command("eval", "gsm8k", *where, *asked))
    console.print(f"\n[bold]w8a8 eval gsm8k[/bold], {SHOTS} examples before each question")
    table = Table(box=None, header_style="dim")
    table.add_column("question", width=52, no_wrap=True, overflow="ellipsis")
    for column in ("right", "BF16", "W8A8"):
        table.add_column(column, justify="right", no_wrap=True)
    for base, quant in zip(*(result["outcomes"] for result in found), strict=True):
        table.add_row(" ".join(base["question"].split()), base["gold"], _answer(base), _answer(quant))
    totals = [f"{result['strict']['correct']} of {result['questions']}" for result in found]
    table.add_row("right answers", "", *totals, style="bold")
    table.add_row("seconds", "", *(f"{result['seconds']:.0f}" for result in found), style="dim")
    console.print(table)


def _answer(outcome: Mapping[str, Any]) -> str:
    number = strict(outcome["answer"])
    if number is None:
        number = flexible(outcome["answer"])
    shown = "none" if number is None else str(number)
    return f"[green]{shown} ✓[/green]" if outcome["strict"] else f"[red]{shown} ✗[/red]"


def compare(models: Pair, result: Path, tokens: int, *, planned: int) -> None:
    """Compare the two by their answers, and by their predictions of `tokens` tokens."""
    verdict = command("compare", *models.results)["verdict"]
    console.print(f"\n[bold]w8a8 compare[/bold]: {verdict}")
    with console.status("comparing predictions"):
        kld = command("eval", "kld", *models.folders, "--data", GSM8K, "--tokens", tokens, "--out", result)
    console.print(
        f"[bold]w8a8 eval kld[/bold]: mean KL divergence {kld['kl']['mean']:.4f} nats, same likeliest token "
        f"{kld['top1']['agreement']:.1%}, perplexity {kld['perplexity']['reference']:.2f} and "
        f"{kld['perplexity']['candidate']:.2f}, over {kld['tokens']} tokens"
        + (f" (not {planned}: this machine has slowed down)" if tokens < planned else "")
    )


def write_card_and_report(models: Pair, folder: Path) -> None:
    """Write the model card into the quantized model, and the report beside it."""
    base, quant = models.results
    results = ("--baseline", base, "--quant", quant, "--kld", folder / "kld.json")
    report = folder / "report" / "report.html"
    with console.status("writing the card and the report"):
        command("card", models.int8, *results, "--overwrite")
        command("report", models.int8, "--source", models.bf16, *results, "--out", report)
    console.print(f"\n[bold]w8a8 card[/bold] wrote {models.int8 / 'README.md'}")
    console.print(f"[bold]w8a8 report[/bold] wrote {report}: open it in a browser")


@dataclass(frozen=True, slots=True)
class Said:
    """An answer: its text, the prompt's tokens, seconds until the first token, seconds for each further one."""

    text: str
    prompt: int
    seconds: float
    step: float


def ask(server: Server, model: Path, messages: Sequence[Mapping[str, str]], tokens: int) -> Said:
    """Ask for a greedy answer of at most `tokens` tokens, as a stream."""
    from w8a8.serve.client import connect

    client = connect(server.base_url, server.api_key)
    pieces, times, begin = [], [], time.perf_counter()
    for chunk in client.chat.completions.create(
        model=str(model),
        messages=messages,
        max_tokens=tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    ):
        if chunk.choices and chunk.choices[0].delta.content:
            pieces.append(chunk.choices[0].delta.content)
            times.append(time.perf_counter())
        usage = chunk.usage
    steps = max(1, usage.completion_tokens - 1)
    return Said("".join(pieces), usage.prompt_tokens, times[0] - begin, (times[-1] - times[0]) / steps)


def _said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


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
