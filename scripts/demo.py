"""`make demo`: a real Gemma 3 270M, quantized, verified and served, on one screen.

Everything printed is measured in this run: the commands are whole processes, and their peak memory is what the kernel
accounts to them.
"""

import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from make_gemma import make_gemma
from openai import OpenAI
from rich.console import Console
from rich.table import Table

from w8a8.bench.process import timed
from w8a8.terminal import size

QUESTION = "The three most important inventions of the last century are"
ANSWER_TOKENS = 48

console = Console(highlight=False)


def main(folder: Path) -> None:
    """Work in `folder`; running it again reuses the model and replaces the result."""
    source, out = folder / "gemma-3-270m", folder / "gemma-3-270m-W8A8"
    with console.status("writing the real Gemma 3 270M as a sharded BF16 checkpoint (once, about half a minute)"):
        make_gemma(source)
    with console.status("quantizing"):
        quantized, quantize_seconds, quantize_mib = command("quantize", source, out, "--overwrite")
    with console.status("verifying"):
        verified, verify_seconds, verify_mib = command("verify", out, "--source", source)

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
        f"{quantized['seconds']:.2f} s of work, {quantized['gb_per_second']:.2f} GB/s "
        f"({quantize_seconds:.2f} s whole process, peak memory {quantize_mib:.0f} MiB)"
    )
    console.print(f"\n[bold]w8a8 verify {out} --source {source}[/bold]")
    console.print(f"{verified['verdict']} ({verify_seconds:.2f} s, peak memory {verify_mib:.0f} MiB)")
    for checkpoint in (source, out):
        console.print(f"\n[bold]w8a8 serve {checkpoint} --engine transformers[/bold]")
        with console.status("serving"), serving(checkpoint) as client:
            answer, rate = ask(client, str(checkpoint))
        console.print(f"{QUESTION}[dim]...[/dim]{answer}", style="italic")
        console.print(f"{rate:.0f} tokens/s, one request, greedy")
    console.print(
        f"\nThe checkpoint is {out}. Look at it with [bold].venv/bin/w8a8 inspect {out}[/bold], "
        f"talk to it with [bold].venv/bin/w8a8 chat {out}[/bold]"
    )


@contextmanager
def serving(checkpoint: Path) -> Iterator[OpenAI]:
    """`w8a8 serve` on a free port, as a process of its own, stopped at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "w8a8", "serve", str(checkpoint), "--engine", "transformers", "--port", str(port)]
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            while not healthy(port):
                if server.poll() is not None:
                    log.seek(0)
                    sys.exit(log.read())
                time.sleep(0.2)
            yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        finally:
            server.terminate()


def healthy(port: int) -> bool:
    """Whether the server answers."""
    try:
        with urlopen(f"http://127.0.0.1:{port}/health") as answer:
            return bool(answer.status == 200)
    except (URLError, ConnectionError):
        return False


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


def command(*arguments: str | Path) -> tuple[dict[str, Any], float, float]:
    """Run `w8a8 ...` as a process of its own: its JSON result, seconds, and peak MiB."""
    run = timed([sys.executable, "-m", "w8a8", *map(str, arguments), "--json"])
    if run.returncode != 0:
        console.print(run.stderr, markup=False)
        sys.exit(run.returncode)
    return json.loads(run.stdout), run.seconds, run.peak_mib


if __name__ == "__main__":
    main(Path(sys.argv[1]))
