"""`bench ...`: this tool, measured against its peers."""

from pathlib import Path
from typing import Annotated

import typer

from w8a8.cli.common import Json, Quiet, bench_app

Vllm = Annotated[
    Path | None,
    typer.Option("--vllm", help="A folder or a Python that has vLLM, to compare with.", show_default="this one's"),
]


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
    from w8a8.cli.tables import show_bench
    from w8a8.terminal.output import Terminal

    terminal = Terminal(json=json, quiet=quiet)
    show_bench(terminal, bench(gib, runs=runs, peers=peers, folder=folder, notice=terminal.notice))


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
    from w8a8.terminal.output import Terminal

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
    from w8a8.terminal.output import Terminal

    terminal = Terminal(json=json, quiet=quiet)
    terminal.table(bench(layers=layers, tokens=tokens, runs=runs, notice=terminal.notice), show)


@bench_app.command(
    "gemm",
    epilog="""
Examples:

- `w8a8 bench gemm`
- `w8a8 bench gemm --tune`
- `w8a8 bench gemm --json > mine.json`
""",
)
def bench_gemm(
    runs: Annotated[int, typer.Option(min=1, help="Turns of each; medians are printed.")] = 20,
    tune: Annotated[
        bool, typer.Option("--tune", help="First find the fastest tiles for this GPU, and store them for later runs.")
    ] = False,
    vllm: Vllm = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time the INT8 kernels on this machine's GPU, against vLLM's Triton kernel, torch._int_mm and BF16."""
    from w8a8.bench.compiled import import_triton
    from w8a8.terminal.output import Terminal

    import_triton()
    from w8a8.bench.gemm import bench, show

    terminal = Terminal(json=json, quiet=quiet)
    terminal.table(bench(runs=runs, tune=tune, vllm=vllm, notice=terminal.notice), show)


@bench_app.command(
    "compile",
    epilog="""
Examples:

- `w8a8 bench compile`
- `w8a8 bench compile gfx1100 sm_120`
- `w8a8 bench compile gfx1100 --vllm ~/vllm/bin/python`
""",
)
def bench_compile(
    archs: Annotated[list[str] | None, typer.Argument(help="gfx1100, sm_90, ...", show_default="all known")] = None,
    vllm: Vllm = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compile the INT8 kernels for GPUs that need not be here, and show what their inner loops are made of."""
    from w8a8.bench.compiled import ARCHITECTURES, bench, show
    from w8a8.terminal.output import Terminal

    terminal = Terminal(json=json, quiet=quiet)
    terminal.table(bench(archs or ARCHITECTURES, vllm=vllm, notice=terminal.notice), show)


@bench_app.command(
    "quality",
    epilog="""
Examples:

- `w8a8 bench quality google/gemma-3-270m`
- `w8a8 bench quality ./gemma --gsm8k ./gsm8k --prose essays.txt`
- `w8a8 bench quality ./gemma --peers`
""",
)
def bench_quality(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder or a Hub id, in BF16.")],
    gsm8k: Annotated[
        Path | None,
        typer.Option("--gsm8k", help="Folder with train.jsonl and test.jsonl.", show_default="from the Hub"),
    ] = None,
    prose: Annotated[
        Path | None, typer.Option("--prose", help="English prose.", show_default="a built-in text")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each kind of text to measure.")] = 4096,
    samples: Annotated[int, typer.Option(min=2, help="Samples of 512 tokens to calibrate on.")] = 64,
    peers: Annotated[
        bool, typer.Option("--peers", help="Also AMD Quark 0.13 and llm-compressor 0.14 (builds environments).")
    ] = False,
    folder: Annotated[Path, typer.Option("--dir", help="Where to work; needs twice the model's size.")] = Path(
        ".cache/bench"
    ),
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize a model by every recipe, and compare their KL divergences from BF16 on GSM8K and on prose."""
    from w8a8.bench.quality import bench, show
    from w8a8.terminal.output import Terminal

    terminal = Terminal(json=json, quiet=quiet)
    result = bench(
        model,
        folder=folder,
        gsm8k=gsm8k,
        prose=prose,
        tokens=tokens,
        samples=samples,
        peers=peers,
        notice=terminal.notice,
    )
    terminal.table(result, show)


@bench_app.command(
    "calibrate",
    epilog="""
Examples:

- `w8a8 bench calibrate`
- `w8a8 bench calibrate --scale 2 --samples 64 --runs 3`
""",
)
def bench_calibrate(
    scale: Annotated[int, typer.Option(min=1, max=16, help="What Gemma 4 31B's sizes are divided by.")] = 4,
    layers: Annotated[int, typer.Option(min=2, help="Layers; the first one's time is not counted.")] = 3,
    samples: Annotated[int, typer.Option(min=2, help="Samples to calibrate on.")] = 32,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of a sample.")] = 512,
    runs: Annotated[int, typer.Option(min=1, help="Turns of each; medians are printed.")] = 1,
    folder: Annotated[Path, typer.Option("--dir", help="Where to work; needs four times the layers' size.")] = Path(
        ".cache/bench/calibrate"
    ),
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Calibrate layers of Gemma 4 31B's shape: time against one plain forward of the same tokens, and peak memory."""
    from w8a8.bench.calibrate import bench, show
    from w8a8.terminal.output import Terminal

    terminal = Terminal(json=json, quiet=quiet)
    found = bench(
        scale=scale, layers=layers, samples=samples, tokens=tokens, runs=runs, folder=folder, notice=terminal.notice
    )
    terminal.table(found, show)
