"""`card`, `report`, `push`: from a W8A8 checkpoint to a published model."""

from pathlib import Path
from typing import Annotated

import typer

from w8a8.cli.common import Json, LogJson, Quiet, Workers, app, interruptible, showing
from w8a8.errors import UsageError
from w8a8.reading import real

Baseline = Annotated[Path | None, typer.Option(envvar="EVAL_BASELINE_JSON", help="GSM8K result of the original model.")]
Quantized = Annotated[Path | None, typer.Option(envvar="EVAL_QUANT_JSON", help="GSM8K result of OUT.")]
Divergence = Annotated[Path | None, typer.Option(help="Result of `w8a8 eval kld`.")]
LmBaseline = Annotated[Path | None, typer.Option(help="Result of `w8a8 eval lm` for the original model.")]
LmQuantized = Annotated[Path | None, typer.Option(help="Result of `w8a8 eval lm` for OUT.")]


@app.command(
    epilog="""
Examples:

- `w8a8 card ./gemma-W8A8`
- `w8a8 card ./gemma-W8A8 --base-model google/gemma-4-31b-it --describe 4x24GiB:gfx1100`
- `w8a8 card ./gemma-W8A8 --baseline bf16.json --quant w8a8.json --kld kld.json`
"""
)
def card(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The quantized checkpoint; README.md is written into it.")],
    base_model: Annotated[
        str | None,
        typer.Option(
            metavar="ID|SRC",
            help="The source's Hub id, or its folder, whose README.md says the license.",
            show_default="the source that `quantize` recorded",
        ),
    ] = None,
    baseline: Baseline = None,
    quant: Quantized = None,
    kld: Divergence = None,
    lm_baseline: LmBaseline = None,
    lm_quant: LmQuantized = None,
    describe: Annotated[
        str | None,
        typer.Option(
            metavar="GPUS", help="GPUs of the vLLM example.", show_default="24GiB, or 4x24GiB:gfx1100 if it needs more"
        ),
    ] = None,
    repo: Annotated[
        str | None,
        typer.Option("--repo", envvar="HF_REPO_ID", help="Hub id in the examples.", show_default="the folder's name"),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Move a README.md of yours to README.before.md, to write the card.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the model card of a checkpoint: README.md with Hub metadata, from its files and its results.

    Without a result the card says "not measured". Text that you add between lines marked `yours` stays when the card is
    written again.
    """
    from w8a8.publish.card.write import make, show, write
    from w8a8.publish.results import Results
    from w8a8.terminal.output import Terminal

    terminal = Terminal(json=json, quiet=quiet)
    results = Results(baseline, quant, kld, lm_baseline, lm_quant)
    made = make(out, base_model=base_model, results=results, describe=describe, repo=repo)
    for notice in made.notices:
        terminal.notice(notice)
    write(made, overwrite=overwrite)
    with showing(f"{made.path} is written"):
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
            help="The source checkpoint: folder, GGUF file, or Hub id `org/name[@revision]`.",
            show_default="the source that OUT names, if it lies beside OUT or in the Hub's cache",
        ),
    ] = None,
    baseline: Baseline = None,
    quant: Quantized = None,
    kld: Divergence = None,
    lm_baseline: LmBaseline = None,
    lm_quant: LmQuantized = None,
    page: Annotated[
        Path | None,
        typer.Option("--out", metavar="HTML", help="The page to write.", show_default="OUT-report/report.html"),
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Folder for the figures, as PNG.", show_default="beside the page"),
    ] = None,
    workers: Workers = None,
    json: Json = False,
    quiet: Quiet = False,
    log_json: LogJson = False,
) -> None:
    """Write one HTML page about a quantized checkpoint, and its figures as PNG.

    It shows sizes, the error of every matrix, weight scales, and the results that are given. The page needs no network
    and no script, and opens anywhere.
    """
    from w8a8.publish.report.write import prepare, run, show, write
    from w8a8.terminal.output import Terminal
    from w8a8.terminal.progress import live

    terminal = Terminal(json=json, quiet=quiet, log_json=log_json)
    page = page or Path(f"{real(out)}-report") / "report.html"
    with interruptible("nothing was written"):
        job = prepare(out, source, baseline=baseline, quant=quant, kld=kld, lm_baseline=lm_baseline, lm_quant=lm_quant)
        with live(terminal, "reading", job.nbytes) as advance:
            found = run(job, workers=workers, advance=advance)
    written = write(found, page, png or page.parent)
    with showing(f"{page} is written"):
        terminal.table(written, show)


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
        typer.Argument(
            metavar="REPO",
            envvar="HF_REPO_ID",
            help="Hub id `org/name`; the repository is created if it does not exist.",
        ),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Make a new repository public.", show_default="private")
    ] = False,
    source: Annotated[
        str | None, typer.Option(help="The source checkpoint (folder or Hub id), for a full `verify` first.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check, and list which files would go and which would stay; ask the Hub nothing."
        ),
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    log_json: LogJson = False,
) -> None:
    """Check a checkpoint and upload it to the Hub; a new repository is private without `--public`.

    Every file is compared with the checksum that `quantize` recorded; with --source, every tensor with its source.
    Card, licenses, reports and results go too; any other file stays and is named. After an interruption, the same
    command sends only the missing files.
    """
    from w8a8.publish.push import check, planned, prepare, run, show
    from w8a8.terminal.output import Terminal
    from w8a8.terminal.progress import live

    if not repo:
        raise UsageError("no repository: give REPO, or set HF_REPO_ID")
    terminal = Terminal(json=json, quiet=quiet, log_json=log_json)
    with interruptible("the same command goes on from here"):
        job = prepare(out, repo, public=public, source=source)
        for notice in job.notices:
            terminal.notice(notice)
        with live(terminal, "checking", job.bytes_to_check) as advance:
            check(job, advance)
        result = planned(job) if dry_run else run(job, notice=terminal.notice)
    with showing("nothing was uploaded, as asked" if dry_run else f"{repo} is uploaded"):
        terminal.table(result, show)
