"""`card`, `report`, `push`: from a W8A8 checkpoint to a published model."""

from pathlib import Path
from typing import Annotated

import typer

from w8a8.cli.common import Json, Quiet, Workers, app, interruptible
from w8a8.errors import UsageError

Baseline = Annotated[Path | None, typer.Option(envvar="EVAL_BASELINE_JSON", help="GSM8K result of the original.")]
Quantized = Annotated[Path | None, typer.Option(envvar="EVAL_QUANT_JSON", help="GSM8K result of OUT.")]
Divergence = Annotated[Path | None, typer.Option(help="Result of `w8a8 eval kld`.")]


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
    from w8a8.publish.card.write import make, show, write
    from w8a8.publish.results import Results
    from w8a8.terminal.output import Terminal

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
    from w8a8.publish.report.write import prepare, run, show, write
    from w8a8.terminal.output import Terminal
    from w8a8.terminal.progress import live

    terminal = Terminal(json=json, quiet=quiet)
    job = prepare(out, source, baseline=baseline, quant=quant, kld=kld)
    page = page or out.resolve().with_name(f"{out.resolve().name}-report") / "report.html"
    with interruptible("nothing was written"), live("reading", job.nbytes, quiet=quiet) as advance:
        found = run(job, workers=workers, advance=advance)
    terminal.table(write(found, page, png or page.parent), show)


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
    from w8a8.terminal.output import Terminal
    from w8a8.terminal.progress import live

    if not repo:
        raise UsageError("no repository: give REPO, or set HF_REPO_ID")
    terminal = Terminal(json=json, quiet=quiet)
    job = prepare(out, repo, public=public, source=source)
    with interruptible("the same command goes on from here"):
        with live("checking", job.bytes_to_check, quiet=quiet) as advance:
            check(job, advance)
        result = planned(job) if dry_run else run(job, notice=terminal.notice)
    terminal.table(result, show)
