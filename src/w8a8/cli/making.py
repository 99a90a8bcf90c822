"""`quantize`, `convert`, `verify`, `inspect`: from a checkpoint to a W8A8 checkpoint."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from w8a8.calibrate.request import SAMPLES, TOKENS
from w8a8.cli.common import Json, LogJson, Quiet, Ray, Workers, app, interruptible, parse_bytes, showing
from w8a8.errors import UsageError
from w8a8.recipes import RECIPES


def _formats() -> list[str]:
    from w8a8.formats import FORMATS

    return list(FORMATS)


def _recipes() -> list[str]:
    return list(RECIPES)


def _compats() -> list[str]:
    from w8a8.formats import COMPATS

    return list(COMPATS)


@app.command(
    epilog="""
Examples:

- `w8a8 quantize google/gemma-4-31b-it gemma-4-31b-it-W8A8`
- `w8a8 quantize deepseek-ai/DeepSeek-V3 ./DeepSeek-V3-W8A8 --disk-budget 20GB`
- `w8a8 quantize deepseek-ai/DeepSeek-V3 --push me/DeepSeek-V3-W8A8`
- `w8a8 quantize ./gemma ./gemma-W8A8 --push me/gemma-W8A8 --public`
- `w8a8 quantize s3://models/gemma s3://models/gemma-W8A8`
- `w8a8 quantize ./gemma ./gemma-W8A8 --dry-run`
- `w8a8 quantize ./gemma ./gemma-W8A8 --format compressed-tensors --exclude '*.layers.0.*'`
- `w8a8 quantize ./gemma ./gemma-W8A8 --recipe auto`
- `w8a8 quantize ./gemma --recipe auto --dry-run`
- `w8a8 quantize ./gemma ./gemma-W8A8 --recipe smooth+gptq --calibration questions.jsonl --keep-bf16 2%`
- `w8a8 quantize ./gemma ./gemma-W8A8 --calibration openai/gsm8k:main --samples 128`
- `w8a8 quantize /shared/DeepSeek-V3 /shared/DeepSeek-V3-W8A8 --ray auto`
- `MODEL_IN=./gemma MODEL_OUT=./gemma-W8A8 w8a8 quantize`
"""
)
def quantize(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="SRC",
            envvar="MODEL_IN",
            help="Folder, GGUF file, Hub id `org/name[@revision]`, or address `s3://bucket/folder`.",
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Argument(metavar="OUT", envvar="MODEL_OUT", help="Folder to create, here or at `s3://bucket/folder`."),
    ] = None,
    format: Annotated[  # noqa: A002
        str | None,
        typer.Option(
            help="`quark` or `compressed-tensors`: the same codes, spelled differently. Default: `quark`; "
            "`compressed-tensors` for mixtures of experts.",
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
        list[str] | None,
        typer.Option(help="Quantize tensors that match this glob although the rules would not. Repeatable."),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Leave tensors that match this glob unquantized. Repeatable; wins over --include."),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="`rtn` rounds to nearest; the others calibrate.",
            show_default="rtn; auto with --calibration",
            autocompletion=_recipes,
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Text to calibrate on: plain text, JSONL (`text`, `question` and `answer`, or `messages`), or a data "
            "set `org/name[:config]`.",
            show_default="a small built-in text",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=2, help="Number of samples of the text, at most.")] = SAMPLES,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens per sample.")] = TOKENS,
    keep_bf16: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            help="Allow OUT to grow by this share (e.g. `2%`) so that the most damaged layers stay in BF16.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT once the new one is whole.")] = False,
    workers: Workers = None,
    hash_source: Annotated[
        bool,
        typer.Option("--hash-source", help="Note the SHA-256 of local source files, too; takes another core's time."),
    ] = False,
    disk_budget: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Source files to hold at once while a model on the Hub is downloaded as it is quantized: `20GB`.",
            show_default="two shards per worker",
        ),
    ] = None,
    cache: Annotated[
        bool, typer.Option("--cache", help="Download a model from the Hub whole, into its cache, and keep it there.")
    ] = False,
    push: Annotated[
        str | None,
        typer.Option(
            metavar="REPO",
            help="Send OUT to this repository on the Hub while it is made; without OUT, nothing stays on the disk.",
        ),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="With --push: make a new repository public.", show_default="private")
    ] = False,
    ray: Ray = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the plan, and what a recipe will take, as its first layer does."),
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    log_json: LogJson = False,
) -> None:
    """Quantize a checkpoint to INT8 W8A8: weights per channel, activations per token and dynamic.

    Reads SRC once, writes OUT once, in bounded memory and without a GPU. OUT appears when it is whole and has been
    opened again. Give the same command again to resume a run that was killed.

    A model on the Hub arrives while it is quantized, and its shards leave the disk as they are done. With --push and
    without OUT, so do the shards of the result, which one commit makes visible at the end. Likewise with folders in
    object stores: `s3://`, `gs://`, `az://`.

    With a recipe that calibrates, the model first reads a text, one decoder layer in memory at a time, on the GPU if
    there is one. OUT has the same size and speed, and is closer to SRC. With --dry-run a layer of each kind is run, to
    say how long all of it takes, and how much memory and disk.
    """
    from w8a8.checkpoint.source import hub_id, is_on_hub
    from w8a8.cli.tables import by_node, show_plan, show_quantized
    from w8a8.quantization import Options, calibrated, estimated, in_a_store, prepare, run
    from w8a8.terminal.output import Terminal
    from w8a8.terminal.progress import live

    if not source:
        raise UsageError("no source: give SRC, or set MODEL_IN")
    if not (out or push or dry_run):
        raise UsageError("no target: give OUT, or set MODEL_OUT; or give --push REPO")
    if out and is_on_hub(out):
        if push:
            raise UsageError("give OUT on the Hub, or --push REPO")
        (push, revision), out = hub_id(out), None
        if revision:
            raise UsageError(f"hf://{push}@{revision}: a result goes to `main`; leave @{revision} away")
    if public and not push:
        raise UsageError("--public is for a new repository: give --push REPO")
    terminal = Terminal(json=json, quiet=quiet, log_json=log_json)
    options = Options(
        format=format,
        compat=compat,
        include=include or (),
        exclude=exclude or (),
        recipe=recipe,
        calibration=calibration,
        samples=samples,
        tokens=tokens,
        keep_bf16=keep_bf16,
    )
    budget = None if disk_budget is None else parse_bytes(disk_budget, "--disk-budget")
    with interruptible("nothing was begun"):
        job = prepare(source, options, cache=cache)
        if dry_run:
            measuring = partial(live, terminal, "measuring", unit="layers")
            show_plan(terminal, job.plan, estimated(job, progress=measuring, notice=terminal.notice))
            return
        target = in_a_store(job, out, overwrite=overwrite) if out else None
        if target and push:
            raise UsageError("give OUT in a store, or --push REPO")
        upload = None
        if push:
            from w8a8.publish.sending import Upload

            upload = Upload.open(push, source=job.source.name, public=public, departs=not out, notice=terminal.notice)
    delivery = upload or target
    here = target.here if target else Path(out or (push or "").rpartition("/")[2])
    with (
        interruptible("give the same command again to go on from here"),
        calibrated(
            job,
            here,
            overwrite=overwrite,
            appears=not (delivery and delivery.departs),
            workers=workers,
            ray=ray,
            progress=partial(live, terminal, "calibrating", unit="layers"),
            notice=terminal.notice,
        ) as job,
        live(terminal, "quantizing", sum(s.size for s in job.view.shards)) as advance,
    ):
        result = run(
            job,
            here,
            overwrite=overwrite,
            workers=workers,
            hash_source=hash_source,
            disk_budget=budget,
            delivery=delivery,
            ray=ray,
            advance=advance,
            arrived=advance.lane("downloaded"),
            sent=advance.lane("sent", job.plan.shard_bytes),
            notice=terminal.notice,
        )
        advance.ending |= by_node(result.nodes)
    with showing(f"{push} is uploaded" if push else f"{out} is whole"):
        show_quantized(terminal, replace(result, address=target.store.url) if target else result, upload)


def _targets() -> list[str]:
    from w8a8.conversion import TARGETS

    return list(TARGETS)


@app.command(
    epilog="""
Examples:

- `w8a8 convert ./gemma-W8A8 ./gemma-W8A8-ct --format compressed-tensors`
- `w8a8 convert ./deepseek-fp8 ./deepseek-bf16 --format bf16`
"""
)
def convert(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="Folder, GGUF file, Hub id `org/name[@revision]`, or address.")
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder to create, here or at `s3://bucket/folder`.")],
    format: Annotated[  # noqa: A002
        str,
        typer.Option(
            help="`quark` or `compressed-tensors`: W8A8 spelled differently; `bf16`: not quantized.",
            autocompletion=_targets,
        ),
    ],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT once the new one is whole.")] = False,
    workers: Workers = None,
    json: Json = False,
    quiet: Quiet = False,
    log_json: LogJson = False,
) -> None:
    """Write a quantized checkpoint in another format, or not quantized.

    Between `quark` and `compressed-tensors` no code and no scale changes. `bf16` decodes whatever `quantize` can read:
    FP8, MXFP4, AWQ, GPTQ and others. OUT appears when it is whole; give the same command again to resume.
    """
    from w8a8.cli.tables import show_converted
    from w8a8.conversion import prepare, run
    from w8a8.terminal.output import Terminal
    from w8a8.terminal.progress import live

    terminal = Terminal(json=json, quiet=quiet, log_json=log_json)
    with interruptible("nothing was begun"):
        job = prepare(source, format)
    with (
        interruptible("give the same command again to go on from here"),
        live(terminal, "converting", sum(s.size for s in job.view.shards)) as advance,
    ):
        result = run(
            job,
            out,
            overwrite=overwrite,
            workers=workers,
            advance=advance,
            arrived=advance.lane("downloaded"),
            sent=advance.lane("sent", job.plan.shard_bytes),
            notice=terminal.notice,
        )
    with showing(f"{out} is whole"):
        show_converted(terminal, result)


@app.command(
    epilog="""
Examples:

- `w8a8 verify ./gemma-W8A8 --source ./gemma`
- `w8a8 verify ./gemma-W8A8 --source google/gemma-3-270m --json`
- `w8a8 verify /shared/DeepSeek-V3-W8A8 --source /shared/DeepSeek-V3 --ray auto`
"""
)
def verify(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The quantized checkpoint.")],
    source: Annotated[
        str,
        typer.Option(help="The source it was made from: folder, GGUF file, Hub id `org/name[@revision]`, or address."),
    ],
    top: Annotated[int, typer.Option(min=0, help="Number of worst tensors to list.")] = 10,
    workers: Workers = None,
    ray: Ray = None,
    json: Json = False,
    quiet: Quiet = False,
    log_json: LogJson = False,
) -> None:
    """Check a W8A8 checkpoint against its source, tensor by tensor and byte by byte.

    Checks that every source tensor is accounted for, copies are identical and quantized tensors near, scales are finite
    and positive, and config, index, shards and checksums agree. Exits with 1 if anything is wrong.
    """
    from w8a8.cli.tables import by_node, show_verified
    from w8a8.terminal.output import Terminal
    from w8a8.terminal.progress import live
    from w8a8.verification.run import prepare, run

    terminal = Terminal(json=json, quiet=quiet, log_json=log_json)
    with interruptible("nothing was begun"):
        job = prepare(out, source, here=ray is not None)
    with (
        interruptible("nothing was decided"),
        live(terminal, "verifying", sum(s.size for s in job.source.shards)) as advance,
    ):
        arrived = advance.lane("downloaded")
        result = run(job, workers=workers, ray=ray, advance=advance, arrived=arrived, notice=terminal.notice)
        advance.ending |= by_node(result.nodes)
    show_verified(terminal, result, top)
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
        str,
        typer.Argument(
            metavar="CKPT", help="Folder, GGUF file, or Hub id `org/name[@revision]` (only headers are fetched)."
        ),
    ],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor too.")] = False,
    json: Json = False,
) -> None:
    """Show a checkpoint, quantized or not, at a glance: read from its headers alone."""
    from w8a8.cli.tables import show_inspected
    from w8a8.inspection import inspect as inspect_
    from w8a8.terminal.output import Terminal

    with interruptible("nothing was changed"):
        found = inspect_(checkpoint)
    show_inspected(Terminal(json=json), found, tensors=tensors)


@app.command(
    epilog="""
Examples:

- `w8a8 status ./gemma-W8A8`
- `w8a8 status ./gemma-W8A8 --json`
"""
)
def status(
    out: Annotated[str, typer.Argument(metavar="OUT", help="The folder, or address, that a run is making, or was.")],
    json: Json = False,
) -> None:
    """Say how far a run of `quantize` or `convert` is that is under way, or was interrupted: from its journal."""
    from w8a8.cli.tables import show_status
    from w8a8.execute.status import status as status_
    from w8a8.terminal.output import Terminal

    show_status(Terminal(json=json), status_(out))
