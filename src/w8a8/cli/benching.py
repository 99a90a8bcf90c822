"""`bench ...`: this tool, measured against its peers."""

from pathlib import Path
from typing import Annotated

import typer

from w8a8.cli.common import Json, Quiet, bench_app


@bench_app.command(
    "quantize",
    epilog="""
Examples:

- `w8a8 bench quantize`
- `w8a8 bench quantize --gib 16 --runs 3`
- `w8a8 bench quantize --peers`
""",
)
def bench_quantize(
    gib: Annotated[float, typer.Option(min=0.1, help="Size of the checkpoint to make, in GiB.")] = 4,
    runs: Annotated[int, typer.Option(min=1, help="Interleaved runs of each; medians are printed.")] = 5,
    peers: Annotated[
        bool, typer.Option("--peers", help="Also run AMD Quark 0.13 and llm-compressor 0.14 (builds environments).")
    ] = False,
    folder: Annotated[Path, typer.Option("--dir", help="Where to work; needs about 2.6 times the size.")] = Path(
        ".cache/bench"
    ),
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize a checkpoint of Gemma 4 31B's layers, timed against `cp -r` of the same files."""
    from w8a8.bench.quantize import bench
    from w8a8.terminal import Terminal

    terminal = Terminal(json=json, quiet=quiet)
    terminal.benched(bench(gib, runs=runs, peers=peers, folder=folder, notice=terminal.notice))


@bench_app.command(
    "linear",
    epilog="""
Examples:

- `w8a8 bench linear`
- `w8a8 bench linear --runs 31 --json`
""",
)
def bench_linear(
    runs: Annotated[int, typer.Option(min=1, help="Turns of each; medians are printed.")] = 15,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time one linear layer of Gemma 4 31B, W8A8 against BF16, for 1 to 512 tokens. Needs 2 GB of memory."""
    from w8a8.bench.linear import bench, show
    from w8a8.terminal import Terminal

    terminal = Terminal(json=json, quiet=quiet)
    terminal.table(bench(runs=runs, notice=terminal.notice), show)


@bench_app.command(
    "decode",
    epilog="""
Examples:

- `w8a8 bench decode`
- `w8a8 bench decode --layers 6 --tokens 64`
""",
)
def bench_decode(
    layers: Annotated[
        int | None, typer.Option(min=1, max=60, help="Of 60; 1.5 GB each.", show_default="as memory allows")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode, by turns.")] = 32,
    runs: Annotated[int, typer.Option(min=1, help="Prefills of each, by turns; medians are printed.")] = 5,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prefill and decode with layers of Gemma 4 31B in transformers, W8A8 against BF16, random weights."""
    from w8a8.bench.decode import bench, show
    from w8a8.terminal import Terminal

    terminal = Terminal(json=json, quiet=quiet)
    terminal.table(bench(layers=layers, tokens=tokens, runs=runs, notice=terminal.notice), show)
