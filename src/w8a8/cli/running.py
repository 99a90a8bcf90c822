"""`doctor`, `fit`, `serve`, `chat`: from a machine and a checkpoint to answers."""

from pathlib import Path
from typing import Annotated

import typer

from w8a8.cli.common import Dtype, Json, Quiet, app, engines, interruptible
from w8a8.errors import UsageError


@app.command(
    epilog="""
Examples:

- `w8a8 doctor`
- `w8a8 doctor --json`
- `W8A8_CPU=avx2 w8a8 doctor`
"""
)
def doctor(json: Json = False) -> None:
    """Say what this machine has, what each command uses of it, and what to install to be faster.

    Takes some seconds, one of them to measure how fast memory is read. What is missing is no error.
    """
    from w8a8.cli.tables import show_diagnosis
    from w8a8.doctor.facts import look
    from w8a8.doctor.findings import diagnose
    from w8a8.terminal.output import Terminal

    with interruptible("nothing was changed"):
        found = diagnose(look())
    show_diagnosis(Terminal(json=json), found)


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
        str,
        typer.Argument(
            metavar="CKPT", help="Folder, GGUF file, or Hub id `org/name[@revision]` (only headers are fetched)."
        ),
    ],
    gpu: Annotated[
        str | None,
        typer.Option(
            help="The GPU, such as `24GiB`, `48GB:gfx1100` or `4x24GiB`.", show_default="those of this machine"
        ),
    ] = None,
    count: Annotated[int | None, typer.Option(min=1, max=64, help="Number of such GPUs.")] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens of a request: prompt and answer.")] = 8192,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests of that length answered at the same time.")] = 1,
    kv_dtype: Annotated[str, typer.Option(help="Dtype of the KV cache: `auto` (the model's) or `fp8`.")] = "auto",
    utilization: Annotated[float, typer.Option(help="Share of a GPU's memory that the engine takes.")] = 0.9,
    text_only: Annotated[bool, typer.Option("--text-only", help="Count no vision or audio encoder.")] = False,
    json: Json = False,
) -> None:
    """Say whether a checkpoint fits the GPUs, how long a context they hold, and what to change if not.

    Reads headers only. Counts the weights, rotary tables and KV cache that vLLM allocates; estimates the memory that
    vLLM measures at its start. Exits with 52 if the checkpoint does not fit.
    """
    from w8a8.cli.tables import show_fit
    from w8a8.errors import DoesNotFitError
    from w8a8.machine import find
    from w8a8.memory import fit as fit_
    from w8a8.terminal.output import Terminal

    with interruptible("nothing was changed"):
        found = fit_(
            checkpoint,
            find(gpu, count),
            context=context,
            concurrency=concurrency,
            kv_dtype=kv_dtype,
            utilization=utilization,
            text_only=text_only,
        )
    show_fit(Terminal(json=json), found)
    if not found.fits:
        raise typer.Exit(DoesNotFitError.exit_code)


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
        list[str] | None,
        typer.Argument(metavar="-- VLLM ARGS", help="Passed to vLLM unchanged; they win over this tool's own."),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            help="`auto`, `transformers` or `vllm`. auto: vLLM if it is installed and has a device, else transformers.",
            autocompletion=engines,
        ),
    ] = "auto",
    host: Annotated[str, typer.Option(help="Address to listen on; `0.0.0.0` is every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar=["W8A8_API_KEY", "VLLM_API_KEY"],
            help="Key that requests must carry. Safer in the environment: other users can read arguments.",
        ),
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of the longest request.", show_default="8192, or what model and memory allow"),
    ] = None,
    dtype: Dtype = "auto",
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
        str | None, typer.Option(metavar="GPUS", help="With --dry-run: plan for these GPUs, such as `4x24GiB:gfx1100`.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the exact command; start nothing.")] = False,
    json: Json = False,
) -> None:
    """Serve a checkpoint over an OpenAI-compatible API, with vLLM or with transformers and this tool's INT8 layers.

    Checks port, packages, scheme and memory before minutes of loading. Says when it is ready and how to call it;
    Ctrl-C or SIGTERM ends all it started.
    """
    from w8a8.cli.tables import show_command, show_ready, show_start
    from w8a8.machine import describe as describe_
    from w8a8.serve.launch import prepare, run
    from w8a8.serve.vllm import Options
    from w8a8.terminal.output import Terminal

    terminal = Terminal(json=json)
    options = Options(
        host=host,
        port=port,
        max_model_len=max_model_len,
        dtype=dtype,
        gpu_memory_utilization=gpu_memory_utilization,
        text_only=text_only,
        tensor_parallel_size=tensor_parallel_size,
        nodes=nodes,
        trust_remote_code=trust_remote_code,
        extra=tuple(vllm_args or ()),
    )
    gpus = describe_(describe) if describe is not None else None
    with interruptible("all it started has ended"):
        launch = prepare(checkpoint, engine=engine, options=options, api_key=api_key, gpus=gpus, dry_run=dry_run)
        if dry_run:
            show_command(terminal, launch)
        else:
            show_start(terminal, launch)
            run(launch, lambda call, seconds: show_ready(terminal, launch, call, seconds))


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
        str | None,
        typer.Option(help="Print the answer to this prompt, and end.", show_default="standard input, if piped"),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="Image to send with the first message. Repeatable.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Limit of an answer, in tokens.")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="Sampling temperature; 0 always takes the likeliest token.")
    ] = None,
    dtype: Dtype = "auto",
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="The server's API key.")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Chat in the terminal with a checkpoint (served while you chat) or with a running server.

    Without a terminal, or with --prompt or --json, prints one answer and ends.
    """
    from w8a8.serve.chat import Settings, connected, data_url
    from w8a8.serve.chat_screen import converse, once, piped
    from w8a8.terminal.output import Terminal

    terminal = Terminal(json=json, quiet=quiet)
    images = [data_url(path) for path in image or ()]
    prompt = piped() if prompt is None else prompt
    if prompt is None and json:
        raise UsageError("--json needs --prompt, or text on standard input")
    if prompt is not None and not prompt.strip():
        raise UsageError("the prompt is empty")
    settings = Settings(max_tokens=max_tokens, temperature=temperature)
    with (
        interruptible("all it started has ended"),
        connected(
            target, api_key=api_key, dtype=dtype, settings=settings, system=system, notice=terminal.notice
        ) as found,
    ):
        if prompt is None:
            converse(found, images)
        else:
            once(found, prompt, images, as_json=json)
