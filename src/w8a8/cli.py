"""The command line: parses, calls one function, prints. No logic lives here.

Results go to standard output (`--json` for machines), progress and notices to standard error. An error is one line on
standard error and an exit code of its own (see `w8a8.errors`); with `--json` it is JSON on standard output too.
"""

import json as json_
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

import w8a8
from w8a8.errors import UsageError, W8A8Error

app = typer.Typer(
    name="w8a8",
    help="Turn a Hugging Face checkpoint into a verified INT8 W8A8 checkpoint that vLLM loads.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench_app = typer.Typer(help="Measure this tool against its peers, on this machine.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")
eval_app = typer.Typer(
    help="Measure how good a model is, and how far a quantized one is from it.", no_args_is_help=True
)
app.add_typer(eval_app, name="eval")

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notices, only the result and errors.")]

Workers = Annotated[
    int | None,
    typer.Option(min=1, max=64, help="Shards to work on at once.", show_default="one per core, at most 8"),
]

Baseline = Annotated[Path | None, typer.Option(envvar="EVAL_BASELINE_JSON", help="GSM8K result of the original.")]
Quantized = Annotated[Path | None, typer.Option(envvar="EVAL_QUANT_JSON", help="GSM8K result of OUT.")]
Divergence = Annotated[Path | None, typer.Option(help="Result of `w8a8 eval kld`.")]


def main() -> None:
    """Run the command line; every `W8A8Error` becomes one line and its exit code."""
    if {"--json", "--quiet", "-q"} & set(sys.argv):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except W8A8Error as error:
        from w8a8.terminal import printable

        if "--json" in sys.argv:
            print(json_.dumps({"error": type(error).__name__, "message": str(error), "exit_code": error.exit_code}))
        print(f"w8a8: error: {printable(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _version(value: bool) -> None:
    if value:
        print(f"w8a8 {w8a8.__version__}")
        raise typer.Exit


def _formats() -> list[str]:
    from w8a8.formats import FORMATS

    return list(FORMATS)


def _compats() -> list[str]:
    from w8a8.formats import COMPATS

    return list(COMPATS)


def _engines() -> list[str]:
    from w8a8.serve.launch import ENGINES

    return list(ENGINES)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(
    epilog="""
Examples:

- `w8a8 quantize google/gemma-4-31b-it gemma-4-31b-it-W8A8`
- `w8a8 quantize ./gemma ./gemma-W8A8 --dry-run`
- `w8a8 quantize ./gemma ./gemma-W8A8 --format compressed-tensors --exclude '*.layers.0.*'`
- `MODEL_IN=./gemma MODEL_OUT=./gemma-W8A8 w8a8 quantize`
"""
)
def quantize(
    source: Annotated[
        str | None, typer.Argument(metavar="SRC", envvar="MODEL_IN", help="Folder, or Hub id `org/name[@revision]`.")
    ] = None,
    out: Annotated[Path | None, typer.Argument(metavar="OUT", envvar="MODEL_OUT", help="Folder to create.")] = None,
    format: Annotated[  # noqa: A002
        str | None,
        typer.Option(
            help="`quark` (default) or `compressed-tensors`: the same codes, spelled differently.",
            autocompletion=_formats,
        ),
    ] = None,
    compat: Annotated[
        str | None,
        typer.Option(
            help="Reproduce another tool's bits: `quark-0.11`, `quark-0.13` or `llm-compressor-0.14`.",
            autocompletion=_compats,
        ),
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Glob of tensors to quantize although the rules would not. Repeatable.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Glob of tensors to leave as they are. Repeatable; wins over --include.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT, once the new one is whole.")] = False,
    workers: Workers = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; read no weight, write nothing.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize a checkpoint to INT8 W8A8: weights per channel, activations per token and dynamic.

    Reads SRC once, writes OUT once, in bounded memory and without a GPU. OUT appears when it is whole and has been
    opened again; a run that was killed goes on where it was when the same command is given again.
    """
    from w8a8.quantization import prepare, run
    from w8a8.terminal import Terminal

    if not source:
        raise UsageError("no source: give SRC, or set MODEL_IN")
    if out is None and not dry_run:
        raise UsageError("no target: give OUT, or set MODEL_OUT")
    terminal = Terminal(json=json, quiet=quiet)
    job = prepare(source, format=format, compat=compat, include=include or (), exclude=exclude or ())
    if dry_run or out is None:
        terminal.plan(job.plan)
        return
    with (
        _interruptible("the same command goes on from here"),
        terminal.bytes("quantizing", sum(s.size for s in job.checkpoint.shards)) as advance,
    ):
        result = run(job, out, overwrite=overwrite, workers=workers, advance=advance, notice=terminal.notice)
    terminal.quantized(result)


@app.command(
    epilog="""
Examples:

- `w8a8 verify ./gemma-W8A8 --source ./gemma`
- `w8a8 verify ./gemma-W8A8 --source google/gemma-3-270m --json`
"""
)
def verify(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The quantized checkpoint.")],
    source: Annotated[str, typer.Option(help="What it was made from: folder or Hub id `org/name[@revision]`.")],
    top: Annotated[int, typer.Option(min=0, help="How many of the worst tensors to list.")] = 10,
    workers: Workers = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check a W8A8 checkpoint against its source, tensor by tensor and byte by byte.

    Every source tensor must be accounted for, copies identical, quantized ones near; scales finite and positive;
    config, index, shards and checksums in agreement. Exits with 1 if anything is wrong.
    """
    from w8a8.terminal import Terminal
    from w8a8.verification import prepare, run

    terminal = Terminal(json=json, quiet=quiet)
    job = prepare(out, source)
    with (
        _interruptible("nothing was decided"),
        terminal.bytes("verifying", sum(s.size for s in job.source.shards)) as advance,
    ):
        result = run(job, workers=workers, advance=advance)
    terminal.verified(result, top)
    if not result.ok:
        raise typer.Exit(1)


@app.command(
    epilog="""
Examples:

- `w8a8 inspect ./gemma-W8A8`
- `w8a8 inspect google/gemma-3-270m --tensors`
"""
)
def inspect(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CKPT", help="Folder, or Hub id `org/name[@revision]` (only headers are fetched).")
    ],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor too.")] = False,
    json: Json = False,
) -> None:
    """Show what a checkpoint is, quantized or not, from its headers alone."""
    from w8a8.inspection import inspect as inspect_
    from w8a8.terminal import Terminal

    Terminal(json=json).inspected(inspect_(checkpoint), tensors=tensors)


@app.command(
    epilog="""
Examples:

- `w8a8 serve ./gemma-W8A8`
- `w8a8 serve ./gemma-W8A8 --engine transformers --port 9000`
- `w8a8 serve org/gemma-4-31b-it-W8A8 --text-only -- --enforce-eager --max-num-seqs 16`
- `w8a8 serve ./gemma-W8A8 --describe 4x24GiB:gfx1100 --dry-run`
"""
)
def serve(
    checkpoint: Annotated[str, typer.Argument(metavar="CKPT", help="Folder, or Hub id `org/name[@revision]`.")],
    vllm_args: Annotated[
        list[str] | None, typer.Argument(metavar="-- VLLM ARGS", help="Passed to vLLM as they are; they win.")
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            help="`auto`, `transformers` or `vllm`. auto: vLLM where it is installed and has a device it can use.",
            autocompletion=_engines,
        ),
    ] = "auto",
    host: Annotated[str, typer.Option(help="Address to listen on; `0.0.0.0` is every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar=["W8A8_API_KEY", "VLLM_API_KEY"],
            help="Key that requests must carry. Better in the environment: arguments can be read by others.",
        ),
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of the longest request.", show_default="8192, or what model and memory allow"),
    ] = None,
    gpu_memory_utilization: Annotated[
        float, typer.Option(min=0.1, max=1.0, help="Share of each GPU's memory that vLLM may use.")
    ] = 0.9,
    text_only: Annotated[bool, typer.Option("--text-only", help="Load no vision or audio encoder.")] = False,
    tensor_parallel_size: Annotated[
        int | None,
        typer.Option(min=1, help="GPUs to split over, on each node.", show_default="the most that can share the model"),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of a Ray cluster, with GPUs like this one's.")] = 1,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let vLLM run code that comes with the checkpoint.")
    ] = False,
    describe: Annotated[
        str | None, typer.Option(metavar="GPUS", help="With --dry-run: for these GPUs, as in `4x24GiB:gfx1100`.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the exact command; start nothing.")] = False,
    json: Json = False,
) -> None:
    """Serve a checkpoint over an OpenAI-compatible API, with vLLM or with transformers and this tool's INT8 layers.

    What can be checked is checked before minutes of loading. Says when it is ready and how to call it; Ctrl-C or
    SIGTERM ends all it started.
    """
    from w8a8.machine import describe as describe_
    from w8a8.serve.launch import prepare, run
    from w8a8.serve.vllm import Options
    from w8a8.terminal import Terminal

    terminal = Terminal(json=json)
    options = Options(
        host=host,
        port=port,
        max_model_len=max_model_len,
        gpu_memory_utilization=gpu_memory_utilization,
        text_only=text_only,
        tensor_parallel_size=tensor_parallel_size,
        nodes=nodes,
        trust_remote_code=trust_remote_code,
        extra=tuple(vllm_args or ()),
    )
    gpus = describe_(describe) if describe is not None else None
    with _interruptible("all it started has ended"):
        launch = prepare(checkpoint, engine=engine, options=options, api_key=api_key, gpus=gpus, dry_run=dry_run)
        if dry_run:
            terminal.command(launch)
        else:
            terminal.starting(launch)
            run(launch, lambda call, seconds: terminal.ready(launch, call, seconds))


@app.command(
    epilog="""
Examples:

- `w8a8 chat ./gemma-W8A8`
- `w8a8 chat http://localhost:8000 --image photo.jpg`
- `w8a8 chat ./gemma-W8A8 --prompt "The capital of France is" --max-tokens 16 --json`
- `git diff | w8a8 chat http://localhost:8000/v1 --system "Write a commit message for this diff."`
"""
)
def chat(
    target: Annotated[
        str, typer.Argument(metavar="CKPT|URL", help="Folder, Hub id, or address of an OpenAI-compatible server.")
    ],
    prompt: Annotated[
        str | None, typer.Option(help="Print the answer to this, and end.", show_default="standard input, if piped")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="Image to send with the first message. Repeatable.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of an answer.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 always takes the likeliest token.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="The server's key.")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Chat with a model in the terminal: a checkpoint, served for as long, or a server that runs already.

    Without a terminal, or with --prompt or --json, prints one answer and ends.
    """
    from w8a8.chat import Settings, connected, converse, data_url, once, piped
    from w8a8.terminal import Terminal

    terminal = Terminal(json=json, quiet=quiet)
    images = [data_url(path) for path in image or ()]
    prompt = piped() if prompt is None else prompt
    if prompt is None and json:
        raise UsageError("--json needs --prompt, or text on standard input")
    if prompt is not None and not prompt.strip():
        raise UsageError("the prompt is empty")
    settings = Settings(max_tokens=max_tokens, temperature=temperature)
    with (
        _interruptible("all it started has ended"),
        connected(target, api_key=api_key, settings=settings, system=system, notice=terminal.notice) as found,
    ):
        if prompt is None:
            converse(found, images)
        else:
            once(found, prompt, images, as_json=json)


@app.command(
    epilog="""
Examples:

- `w8a8 fit ./gemma-W8A8`
- `w8a8 fit google/gemma-4-31b-it --gpu 24GiB:gfx1100 --count 4`
- `w8a8 fit ./gemma-W8A8 --gpu 48GB --context 32768 --concurrency 4 --kv-dtype fp8`
"""
)
def fit(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CKPT", help="Folder, or Hub id `org/name[@revision]` (only headers are fetched).")
    ],
    gpu: Annotated[
        str | None,
        typer.Option(help="The GPU, as in `24GiB`, `48GB:gfx1100` or `4x24GiB`.", show_default="those of this machine"),
    ] = None,
    count: Annotated[int | None, typer.Option(min=1, max=64, help="How many of them.")] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens of a request, prompt and answer.")] = 8192,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests of that length at the same time.")] = 1,
    kv_dtype: Annotated[
        str, typer.Option(help="What the KV cache is kept in: `auto` (the model's dtype) or `fp8`.")
    ] = "auto",
    utilization: Annotated[float, typer.Option(help="Share of a GPU's memory that the engine takes.")] = 0.9,
    text_only: Annotated[bool, typer.Option("--text-only", help="Without vision and audio encoders.")] = False,
    json: Json = False,
) -> None:
    """Say whether a checkpoint fits the GPUs, how far they reach, and what to change if not. Reads headers only.

    Counts what vLLM allocates: weights, rotary tables, KV cache; estimates what it measures when it starts. Exits with
    52 if it does not fit.
    """
    from w8a8.errors import DoesNotFitError
    from w8a8.machine import find
    from w8a8.memory import fit as fit_
    from w8a8.terminal import Terminal

    found = fit_(
        checkpoint,
        find(gpu, count),
        context=context,
        concurrency=concurrency,
        kv_dtype=kv_dtype,
        utilization=utilization,
        text_only=text_only,
    )
    Terminal(json=json).fitted(found)
    if not found.fits:
        raise typer.Exit(DoesNotFitError.exit_code)


@app.command(
    epilog="""
Examples:

- `w8a8 card ./gemma-W8A8`
- `w8a8 card ./gemma-W8A8 --base-model google/gemma-4-31b-it --describe 4x24GiB:gfx1100`
- `w8a8 card ./gemma-W8A8 --baseline bf16.json --quant w8a8.json --kld kld.json`
"""
)
def card(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The quantized checkpoint; its README.md is written.")],
    base_model: Annotated[
        str | None,
        typer.Option(
            metavar="ID|SRC",
            help="The source's Hub id, or its folder, whose README.md says the license.",
            show_default="what `quantize` noted",
        ),
    ] = None,
    baseline: Baseline = None,
    quant: Quantized = None,
    kld: Divergence = None,
    describe: Annotated[
        str | None,
        typer.Option(
            metavar="GPUS", help="GPUs of the vLLM example.", show_default="24GiB, or 4x24GiB:gfx1100 where it needs it"
        ),
    ] = None,
    repo: Annotated[
        str | None,
        typer.Option("--repo", envvar="HF_REPO_ID", help="Hub id the examples use.", show_default="the folder's name"),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Move aside a README.md that this command did not write.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the model card of a checkpoint: README.md with Hub metadata, from its files and its results.

    What is not measured says so. What you add between lines marked `yours` stays when it is written again.
    """
    from w8a8.publish.card import make, show, write
    from w8a8.publish.card_facts import Results
    from w8a8.terminal import Terminal

    terminal = Terminal(json=json, quiet=quiet)
    results = Results(baseline=baseline, quant=quant, kld=kld)
    made = make(out, base_model=base_model, results=results, describe=describe, repo=repo)
    for notice in made.notices:
        terminal.notice(notice)
    write(made, overwrite=overwrite)
    terminal.table(made, show)


@app.command(
    epilog="""
Examples:

- `w8a8 push ./gemma-W8A8 me/gemma-W8A8`
- `w8a8 push ./gemma-W8A8 me/gemma-W8A8 --public --source google/gemma-4-31b-it`
- `HF_REPO_ID=me/gemma-W8A8 w8a8 push ./gemma-W8A8 --dry-run`
"""
)
def push(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The quantized checkpoint.")],
    repo: Annotated[
        str | None,
        typer.Argument(metavar="REPO", envvar="HF_REPO_ID", help="Hub id `org/name`; made if it is not there."),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Let everyone see a repository that this makes.", show_default="private")
    ] = False,
    source: Annotated[
        str | None, typer.Option(help="What it was made from, for a full `verify` first: folder or Hub id.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check, and list what would be uploaded; ask the Hub nothing.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Upload a checkpoint to the Hub, once it has been checked. Private unless you say `--public`.

    Every shard's checksum is compared with what `quantize` wrote, or all of it with --source. Given again after an
    interruption, the same command sends only what is missing.
    """
    from w8a8.publish.push import check, planned, prepare, run, show
    from w8a8.terminal import Terminal

    if not repo:
        raise UsageError("no repository: give REPO, or set HF_REPO_ID")
    terminal = Terminal(json=json, quiet=quiet)
    job = prepare(out, repo, public=public, source=source)
    with _interruptible("the same command goes on from here"):
        with terminal.bytes("checking", job.bytes_to_check) as advance:
            check(job, advance)
        result = planned(job) if dry_run else run(job, notice=terminal.notice)
    terminal.table(result, show)


@eval_app.command(
    "gsm8k",
    epilog="""
Examples:

- `w8a8 eval gsm8k --base-url http://localhost:8000/v1`
- `w8a8 eval gsm8k --ckpt ./gemma-W8A8 --limit 100`
- `w8a8 eval gsm8k --ckpt ./gemma-3-270m-W8A8 --completions --data ./gsm8k --out results/quantized.json`
""",
)
def eval_gsm8k(
    base_url: Annotated[str | None, typer.Option(help="Of an OpenAI-compatible server.")] = None,
    ckpt: Annotated[
        str | None, typer.Option(metavar="CKPT", help="Folder or Hub id, to be served for as long as it takes.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Which of the server's.", show_default="the only one")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="The server's key.")] = None,
    engine: Annotated[
        str, typer.Option(help="With --ckpt: `auto`, `transformers` or `vllm`.", autocompletion=_engines)
    ] = "auto",
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with train.jsonl and test.jsonl.", show_default="openai/gsm8k, by `datasets`"),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask the first so many.", show_default="all 1,319")] = None,
    shots: Annotated[int, typer.Option(min=0, help="Training examples shown first, as turns of the chat.")] = 8,
    completions: Annotated[
        bool, typer.Option("--completions", help="Complete text instead: for base models without a chat template.")
    ] = False,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")] = 0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 512,
    concurrency: Annotated[int, typer.Option(min=1, max=1024, help="Requests at the same time.")] = 16,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds a request may take before it is tried again.")] = 600,
    out: Annotated[
        Path | None, typer.Option(help="Result, ending in .json.", show_default="results/gsm8k-MODEL.json")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Ask all again, also what OUT has answers to.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Ask a model the 1,319 test questions of GSM8K, and score its answers.

    Every answer is kept as it comes, in a .jsonl beside the result: a run that was stopped, and requests that failed,
    go on when the same command is given again.
    """
    from w8a8.evals.gsm8k import evaluate
    from w8a8.evals.questions import load
    from w8a8.evals.server import connected
    from w8a8.evals.showing import live, show_gsm8k
    from w8a8.terminal import Terminal

    terminal = Terminal(json=json, quiet=quiet)
    if (base_url is None) == (ckpt is None):
        raise UsageError("give --base-url of a server that runs, or --ckpt to have one started")
    questions = load(data, shots=shots, limit=limit)
    with (
        _interruptible("the answers so far are kept, and the same command goes on from there"),
        connected(
            base_url,
            ckpt,
            api_key=api_key,
            engine=engine,
            completions=completions,
            timeout=timeout,
            notice=terminal.notice,
        ) as server,
        live(quiet=quiet) as progress,
    ):
        result = evaluate(
            server,
            questions,
            model=model,
            completions=completions,
            temperature=temperature,
            max_tokens=max_tokens,
            concurrency=concurrency,
            out=out,
            restart=restart,
            progress=progress,
            notice=terminal.notice,
        )
    terminal.table(result, show_gsm8k)


@app.command(
    epilog="""
Examples:

- `w8a8 compare results/gsm8k-gemma.json results/gsm8k-gemma-W8A8.json`
- `w8a8 compare base.json quantized.json --flips 3`
"""
)
def compare(
    base: Annotated[Path, typer.Argument(metavar="BASE.json", help="What `eval gsm8k` found of the original.")],
    quant: Annotated[Path, typer.Argument(metavar="QUANT.json", help="What it found of the quantized model.")],
    flips: Annotated[int, typer.Option(min=0, help="How many flipped questions to show, both answers beside.")] = 0,
    flexible: Annotated[
        bool, typer.Option("--flexible", help="Right is who has the last number right, not the one after `####`.")
    ] = False,
    json: Json = False,
) -> None:
    """Compare two models' answers to the same GSM8K questions, question by question.

    Both must have been asked the same questions in the same way.
    """
    from w8a8.evals.compare import compare as compare_
    from w8a8.evals.results import read
    from w8a8.evals.showing import show_comparison
    from w8a8.terminal import Terminal

    found = compare_(read(base), read(quant), score="flexible" if flexible else "strict")
    Terminal(json=json).table(found, lambda found, say: show_comparison(found, say, flips=flips))


@app.command(
    epilog="""
Examples:

- `w8a8 report ./gemma-W8A8`
- `w8a8 report ./gemma-W8A8 --source ./gemma --baseline base.json --quant quant.json --kld kld.json`
- `w8a8 report ./gemma-W8A8 --out report.html --png ./gemma-W8A8/figures`
"""
)
def report(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The quantized checkpoint.")],
    source: Annotated[
        str | None,
        typer.Option(
            help="What it was made from: folder or Hub id `org/name[@revision]`.",
            show_default="what OUT says, if that lies beside OUT or in the Hub's cache",
        ),
    ] = None,
    baseline: Baseline = None,
    quant: Quantized = None,
    kld: Divergence = None,
    page: Annotated[
        Path | None, typer.Option("--out", metavar="HTML", help="The page.", show_default="OUT-report/report.html")
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where the figures go, as PNG.", show_default="beside the page"),
    ] = None,
    workers: Workers = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write one HTML page about a quantized checkpoint, to look at, and its figures as PNG.

    Sizes, errors of every matrix, weight scales, and the results of the evaluations that are given. The page needs
    no network and no script, and opens anywhere.
    """
    from w8a8.publish.report import prepare, run, show, write
    from w8a8.terminal import Terminal

    terminal = Terminal(json=json, quiet=quiet)
    job = prepare(out, source, baseline=baseline, quant=quant, kld=kld)
    page = page or out.resolve().with_name(f"{out.resolve().name}-report") / "report.html"
    with _interruptible("nothing was written"), terminal.bytes("reading", job.nbytes) as advance:
        found = run(job, workers=workers, advance=advance)
    terminal.table(write(found, page, png or page.parent), show)


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


@eval_app.command(
    "kld",
    epilog="""
Examples:

- `w8a8 eval kld ./gemma ./gemma-W8A8`
- `w8a8 eval kld google/gemma-3-270m ./gemma-3-270m-W8A8 --text book.txt --tokens 32768 --context 2048`
- `w8a8 eval kld ./gemma ./gemma-W8A8 --data ./gsm8k --out kld.json`
""",
)
def eval_kld(
    reference: Annotated[str, typer.Argument(metavar="REF", help="The original: folder, or Hub id.")],
    candidate: Annotated[str, typer.Argument(metavar="CAND", help="The quantized one: folder, or Hub id.")],
    text: Annotated[Path | None, typer.Option(help="Plain text to read.", show_default="GSM8K's test split")] = None,
    jsonl: Annotated[
        Path | None, typer.Option(help="A document per line: its `text`, or its `question` and `answer`.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder with GSM8K's `train.jsonl` and `test.jsonl`.", show_default="the Hub")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to predict at most.")] = 8192,
    context: Annotated[int, typer.Option(min=2, help="Tokens of a window at most.")] = 512,
    out: Annotated[Path | None, typer.Option(help="File to write the result to, as JSON.")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure how far one model's predictions lie from another's: KL divergence per token, agreement, perplexity.

    Both are loaded at the same time, on the GPU if there is one, else in RAM, and read the same text.
    """
    from w8a8.evals.kld import prepare, run
    from w8a8.evals.kld_showing import progress, show
    from w8a8.evals.kld_text import choose
    from w8a8.evals.storing import store
    from w8a8.terminal import Terminal

    terminal = Terminal(json=json, quiet=quiet)
    source = choose(text=text, jsonl=jsonl, data=data)
    with _interruptible("nothing was written"):
        job = prepare(reference, candidate, source, tokens=tokens, context=context, out=out)
        with progress(job.tokens, quiet=quiet) as advance:
            result = run(job, advance=advance, notice=terminal.notice)
        if out is not None:
            store(result.to_dict(), out)
    terminal.table(result, show)


@contextmanager
def _interruptible(consequence: str) -> Iterator[None]:
    """On Ctrl-C or SIGTERM end in order, with 130 or 143, and say what that means."""

    codes = [130]

    def terminate(_signal: int, frame: FrameType | None) -> None:
        """As Ctrl-C does, which asyncio turns into cancelling; an exception would surface in any of its tasks."""
        codes.append(143)
        interrupt = signal.getsignal(signal.SIGINT)
        if not callable(interrupt):  # Ctrl-C is ignored, as in the background of a script
            raise KeyboardInterrupt
        interrupt(signal.SIGINT, frame)

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt:
        print(f"\nw8a8: interrupted; {consequence}", file=sys.stderr)
        sys.exit(codes[-1])
    finally:
        signal.signal(signal.SIGTERM, before)
