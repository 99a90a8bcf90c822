"""`bench ...`: measure this tool against its peers."""

from pathlib import Path
from typing import Annotated

import typer

from w8a8.cli.common import Json, Quiet, bench_app
from w8a8.errors import UsageError

Vllm = Annotated[
    Path | None,
    typer.Option(
        "--vllm", help="Folder or Python with a vLLM to compare with.", show_default="this environment's, if any"
    ),
]
Runs = Annotated[int, typer.Option(min=1, help="Turns of each contender; medians are shown.")]
Gib = Annotated[float, typer.Option(min=0.1, help="Size of the checkpoint that is made, in GiB.")]
Folder = Annotated[Path, typer.Option("--dir", help="Folder to work in; needs about 2.6 times the size.")]
FOLDER = Path(".cache/bench")
Peers = Annotated[
    bool, typer.Option("--peers", help="Also run AMD Quark 0.13 and llm-compressor 0.14, in environments built here.")
]


@bench_app.command(
    "quantize",
    epilog="""
Examples:

- `w8a8 bench quantize`
- `w8a8 bench quantize --gib 16 --runs 3`
- `w8a8 bench quantize --peers`
- `w8a8 bench quantize --experts`
""",
)
def bench_quantize(
    gib: Gib = 4,
    runs: Runs = 5,
    peers: Peers = False,
    experts: Annotated[
        bool, typer.Option("--experts", help="Compare with mixtures of 128 experts instead; needs 5 times the size.")
    ] = False,
    folder: Folder = FOLDER,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time quantizing a checkpoint of Gemma 4 31B's layers, against `cp -r` of the same files."""
    from w8a8.terminal.output import Terminal

    terminal = Terminal(json=json, quiet=quiet)
    if experts:
        from w8a8.bench import experts as mixtures

        if peers:
            raise UsageError("--experts and --peers: give one of them")
        found = mixtures.bench(gib, runs=runs, folder=folder, notice=terminal.notice)
        terminal.table(found, mixtures.show)
        return
    from w8a8.bench.quantize import bench, show

    terminal.table(bench(gib, runs=runs, peers=peers, folder=folder, notice=terminal.notice), show)


@bench_app.command(
    "stream",
    epilog="""
Examples:

- `w8a8 bench stream`
- `w8a8 bench stream --mbps 100 --runs 3`
- `w8a8 bench stream --gib 3 --shards 12`
""",
)
def bench_stream(
    gib: Gib = 4,
    mbps: Annotated[float, typer.Option(min=1, help="Megabytes a second that the server gives.")] = 300,
    shards: Annotated[
        int | None, typer.Option(min=1, max=999, help="Files that it lies in.", show_default="one for two layers")
    ] = None,
    runs: Runs = 5,
    folder: Folder = FOLDER,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time quantizing a model while it is downloaded from a server on this machine, against doing both in turn."""
    from w8a8.bench.stream import bench, show
    from w8a8.terminal.output import Terminal

    terminal = Terminal(json=json, quiet=quiet)
    terminal.table(bench(gib, mbps, runs=runs, folder=folder, shards=shards, notice=terminal.notice), show)


@bench_app.command(
    "scale",
    epilog="""
Examples:

- `w8a8 bench scale`
- `w8a8 bench scale --cores 16 --mbps 3000`
- `w8a8 bench scale --ray --runs 3`
""",
)
def bench_scale(
    gib: Gib = 4,
    shards: Annotated[int, typer.Option(min=1, max=999, help="Files that it lies in.")] = 16,
    mbps: Annotated[float, typer.Option(min=1, help="Megabytes a second of a node's network, for the model.")] = 1250,
    cores: Annotated[
        int | None, typer.Option(min=1, help="Cores of a node, for the model.", show_default="those of this machine")
    ] = None,
    ray: Annotated[bool, typer.Option("--ray", help="Measure workers of Ray, too.")] = False,
    runs: Runs = 5,
    folder: Folder = FOLDER,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time quantizing with 1, 2, 4, ... workers, and say by a model what bounds larger runs on many machines.

    The model's speeds are measured in the same run, but for the network's, and the model is compared with the runs.
    """
    from w8a8.bench.scale import bench, show
    from w8a8.terminal.output import Terminal

    terminal = Terminal(json=json, quiet=quiet)
    found = bench(
        gib, shards=shards, megabytes=mbps, runs=runs, folder=folder, cores=cores, ray=ray, notice=terminal.notice
    )
    terminal.table(found, show)


@bench_app.command(
    "linear",
    epilog="""
Examples:

- `w8a8 bench linear`
- `w8a8 bench linear --runs 31 --json`
""",
)
def bench_linear(
    runs: Runs = 15,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time one linear layer of Gemma 4 31B, W8A8 against BF16 and F32, for 1 to 512 tokens. Needs 3 GB of memory."""
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
        int | None,
        typer.Option(min=1, max=60, help="Layers, of the model's 60; 1.5 GB each.", show_default="as many as fit"),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode with each model, by turns.")] = 32,
    runs: Annotated[int, typer.Option(min=1, help="Prefills of each model, by turns; medians are shown.")] = 5,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time prefill and decode with layers of Gemma 4 31B, W8A8 against the better of torch's BF16 and float32."""
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
    runs: Runs = 20,
    tune: Annotated[
        bool,
        typer.Option("--tune", help="First find the fastest tiles for this GPU, and store them for all later runs."),
    ] = False,
    vllm: Vllm = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time the INT8 kernels on this machine's GPU, against vLLM's Triton kernel, torch._int_mm and BF16."""
    from w8a8.bench.targets import require_triton

    require_triton()
    from w8a8.bench.gemm import bench, show
    from w8a8.terminal.output import Terminal

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
    archs: Annotated[
        list[str] | None, typer.Argument(help="Architectures: gfx1100, sm_90, ...", show_default="all known")
    ] = None,
    vllm: Vllm = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compile the INT8 kernels for GPUs that need not be here, and show the instructions of their inner loops."""
    from w8a8.bench.compiled import bench, show
    from w8a8.bench.targets import ARCHITECTURES
    from w8a8.terminal.output import Terminal

    terminal = Terminal(json=json, quiet=quiet)
    terminal.table(bench(archs or ARCHITECTURES, vllm=vllm, notice=terminal.notice), show)


@bench_app.command(
    "quality",
    epilog="""
Examples:

- `w8a8 bench quality google/gemma-3-270m`
- `w8a8 bench quality ./gemma --gsm8k ./gsm8k --prose essays.txt --other program.py`
- `w8a8 bench quality ./gemma --peers`
""",
)
def bench_quality(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint in BF16: a folder or a Hub id.")],
    gsm8k: Annotated[
        Path | None,
        typer.Option("--gsm8k", help="Folder with GSM8K's train.jsonl and test.jsonl.", show_default="from the Hub"),
    ] = None,
    prose: Annotated[
        Path | None, typer.Option("--prose", help="Text file of English prose.", show_default="a built-in text")
    ] = None,
    other: Annotated[
        Path | None,
        typer.Option(
            "--other", help="Text file of a kind that no calibration saw.", show_default="a built-in text in German"
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to measure of each kind of text.")] = 4096,
    samples: Annotated[int, typer.Option(min=2, help="Samples to calibrate on, of 512 tokens each.")] = 64,
    peers: Peers = False,
    folder: Annotated[Path, typer.Option("--dir", help="Folder to work in; needs twice the model's size.")] = Path(
        ".cache/bench"
    ),
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize a model by every recipe, and compare the results' KL divergence from BF16 on three kinds of text.

    Calibration reads other questions of GSM8K and other English prose, and nothing of the third kind, German prose.
    """
    from w8a8.bench.quality import bench, show
    from w8a8.terminal.output import Terminal

    terminal = Terminal(json=json, quiet=quiet)
    result = bench(
        model,
        folder=folder,
        gsm8k=gsm8k,
        prose=prose,
        other=other,
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
    scale: Annotated[int, typer.Option(min=1, max=16, help="Divisor of Gemma 4 31B's sizes.")] = 4,
    layers: Annotated[int, typer.Option(min=2, help="Layers; the first one is not timed.")] = 3,
    samples: Annotated[int, typer.Option(min=2, help="Samples to calibrate on.")] = 32,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens per sample.")] = 512,
    runs: Runs = 1,
    folder: Annotated[Path, typer.Option("--dir", help="Folder to work in; needs four times the layers' size.")] = Path(
        ".cache/bench/calibrate"
    ),
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Calibrate layers of Gemma 4 31B's shape: show time, in plain forwards of the same tokens, and peak memory."""
    from w8a8.bench.calibrate import bench, show
    from w8a8.terminal.output import Terminal

    terminal = Terminal(json=json, quiet=quiet)
    found = bench(
        scale=scale, layers=layers, samples=samples, tokens=tokens, runs=runs, folder=folder, notice=terminal.notice
    )
    terminal.table(found, show)


@bench_app.command(
    "sources",
    epilog="""
Examples:

- `w8a8 bench sources`
- `w8a8 bench sources --runs 31 --json`
""",
)
def bench_sources(
    size: Annotated[int, typer.Option(min=256, help="Rows and columns of the weights; a multiple of 256.")] = 4096,
    runs: Runs = 9,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time decoding weights that are quantized already, on one core, against transformers and compressed-tensors."""
    from w8a8.bench.sources import bench, show
    from w8a8.terminal.output import Terminal

    terminal = Terminal(json=json, quiet=quiet)
    terminal.table(bench(runs=runs, size=size - size % 256, notice=terminal.notice), show)


@bench_app.command(
    "engines",
    epilog="""
Examples:

- `w8a8 bench engines .demo/qwen2.5-coder-0.5b.gguf --vllm .venv-vllm`
- `w8a8 bench engines ./gemma-3-270m --runs 3 --json`
""",
)
def bench_engines(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A GGUF file, or a checkpoint in BF16.")],
    vllm: Annotated[
        Path | None,
        typer.Option(
            "--vllm", help="Environment or Python with a vLLM for the CPU.", show_default="that of `serve`, if any"
        ),
    ] = None,
    runs: Runs = 5,
    folder: Annotated[
        Path, typer.Option("--dir", help="Folder to work in; holds environments, 4 GB, and the model in three dtypes.")
    ] = FOLDER,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time a small model on the CPU, 1 and 16 requests: `serve`, vLLM, torchao's INT8, llama.cpp's Q8_0.

    torchao and llama.cpp get environments of their own, built once. llama.cpp's uses AVX2 and nothing newer.
    """
    from w8a8.bench.engines import bench, show
    from w8a8.terminal.output import Terminal

    terminal = Terminal(json=json, quiet=quiet)
    terminal.table(bench(model, folder=folder, vllm=vllm, runs=runs, notice=terminal.notice), show)
