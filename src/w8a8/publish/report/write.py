"""`w8a8 report`: one HTML page about a quantized checkpoint, and its figures as PNG.

Everything is gathered first (`data` from the checkpoints, `results` from the result files) into one value, `Report`;
`page` and `figures` draw it. What was not given is not drawn, and the page says so.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w8a8.checkpoint import Checkpoint
from w8a8.checkpoint.reader import inside
from w8a8.checkpoint.source import cached, hub_id
from w8a8.errors import MissingExtraError, UnsupportedSchemeError, W8A8Error
from w8a8.formats import Scheme, detect
from w8a8.formats.provenance import Provenance
from w8a8.publish.report.data import ridges, sizes, stacks
from w8a8.publish.report.facts import Report
from w8a8.publish.results import Measured, Results
from w8a8.reading import real
from w8a8.storage.writer import disk_errors, write_whole
from w8a8.verification import run as verification


@dataclass(frozen=True)
class Job:
    """The files that a report is made from, opened and checked; no weight is read yet."""

    out: Checkpoint
    scheme: Scheme
    verification: verification.Job | None
    measured: Measured

    @property
    def nbytes(self) -> int:
        """Bytes that `run` will read to measure the errors."""
        return sum(shard.size for shard in self.verification.source.shards) if self.verification else 0


@dataclass(frozen=True)
class Written:
    """The files that were written, and the page's headline."""

    headline: str
    page: Path
    figures: tuple[Path, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"headline": self.headline, "page": str(self.page), "figures": [str(path) for path in self.figures]}


def prepare(
    out: str | Path,
    source: str | Path | None = None,
    *,
    baseline: Path | None = None,
    quant: Path | None = None,
    kld: Path | None = None,
    lm_baseline: Path | None = None,
    lm_quant: Path | None = None,
) -> Job:
    """Open the checkpoint `out`, its source, and the result files.

    Without `source`, the one that w8a8.json names is used if it lies beside `out` or in the Hub's cache.

    Raises `UnsupportedSchemeError` where `out` is not INT8 W8A8, `InvalidResultError` where a file is not a result,
    `UsageError` where two results do not compare, `MissingExtraError`, and the source errors of `w8a8.errors`.
    """
    _require_extra()
    checkpoint = Checkpoint.open(out)
    scheme = detect(checkpoint.config)
    if not scheme.w8a8:
        raise UnsupportedSchemeError(f"{out}: {scheme.summary}; a report needs a checkpoint that `w8a8 quantize` made")
    measured = Results(baseline, quant, kld, lm_baseline, lm_quant).read()
    against = verification.prepare(out, source) if source is not None else _beside(checkpoint)
    return Job(checkpoint, scheme, against, measured)


def run(job: Job, *, workers: int | None = None, advance: Callable[[int], None] = lambda _: None) -> Report:
    """Gather the facts; where the source is known, source and result are read once to measure the errors."""
    errors = verification.run(job.verification, workers=workers, advance=advance) if job.verification else None
    source = job.verification.source if job.verification else None
    found, low, high = ridges(job.out)
    architectures = job.out.config.get("architectures")
    return Report(
        name=real(job.out.path).name,
        model=", ".join(map(str, architectures)) if isinstance(architectures, list) else "",
        scheme=job.scheme.summary,
        before=source.stored_bytes if source else None,
        after=job.out.nbytes,
        sizes=sizes(job.out, source),
        errors=errors,
        stacks=stacks(errors.tensors) if errors else (),
        ridges=found,
        scale_range=(low, high),
        baseline=job.measured.baseline,
        quant=job.measured.quant,
        paired=job.measured.paired,
        kld=job.measured.kld,
        tasks=job.measured.tasks,
    )


def write(report: Report, page: Path, figures: Path) -> Written:
    """Write the HTML to `page` and the PNGs into `figures`, each file whole or not at all.

    Raises `UnwritableError` or `DiskFullError`.
    """
    from w8a8.publish.report.figures import draw
    from w8a8.publish.report.page import render

    # 1) draw all of it, so that an error leaves no file behind
    html = render(report).encode(errors="replace")  # an answer may hold half a surrogate pair
    drawn = {figures / f"{name}.png": png for name, png in draw(report).items()}

    # 2) store it, the page last
    for folder in (figures, page.parent):
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
    for path, png in drawn.items():
        write_whole(path, png)
    write_whole(page, html)
    return Written(report.headline, page, tuple(drawn))


def show(written: Written, say: Callable[[Any], None]) -> None:
    """Print the headline and where the files are."""
    from rich.text import Text

    say(Text(written.headline, style="bold"))
    say(Text(f"{written.page}\n{len(written.figures)} figures in {written.figures[0].parent}"))


def _beside(out: Checkpoint) -> verification.Job | None:
    """Prepare to verify against the source that w8a8.json names; None where it is not on this machine."""
    try:
        provenance = Provenance.read(out.path)
        if provenance is None:
            return None
        source = provenance.source
        if "/" in source.name:
            folder = cached(hub_id(source.name)[0], source.revision)
        else:
            folder = inside(real(out.path).parent, source.name)
        return verification.prepare(out.path, folder) if folder is not None and folder.exists() else None
    except W8A8Error:
        return None


def _require_extra() -> None:
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(f"a report needs {error.name}: pip install 'w8a8[publish]'") from error
