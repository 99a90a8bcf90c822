"""`w8a8 card`: the README.md of a checkpoint, written from its files and its results.

Parameters, sizes and ratio come from the headers, the way it was made from `w8a8.json`, the command from
`serve --dry-run`, the hardware from `fit`, accuracies from result files. Text that a person adds between the lines
marked `yours` stays when the card is written again, and so do metadata that this command does not write.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w8a8.checkpoint.reader import INDEX
from w8a8.errors import TargetExistsError, UsageError, W8A8Error
from w8a8.formats.provenance import PROVENANCE
from w8a8.inspection import Inspection, inspect
from w8a8.plan import module_name
from w8a8.publish.card.accuracy import accuracy
from w8a8.publish.card.frontmatter import entries_but, metadata_of, with_metadata
from w8a8.publish.card.metadata import OURS, describe_model
from w8a8.publish.card.origin import find_origin
from w8a8.publish.card.reproduce import citation, commands
from w8a8.publish.card.text import (
    README,
    STAMP,
    Places,
    Verbatim,
    is_ours,
    kept,
    read_text,
    render,
)
from w8a8.publish.card.usage import example, hardware, python_example
from w8a8.publish.hub import valid_id
from w8a8.publish.made import Made
from w8a8.publish.results import Results
from w8a8.reading import MAX_TEXT_BYTES, read_bytes, reading, real
from w8a8.storage.writer import write_whole
from w8a8.terminal.wording import clean, printable

ASIDE = "README.before.md"

FIGURES = {
    "size": "Size by component, before and after",
    "sqnr": "SQNR by layer and projection",
    "worst": "The matrices with the largest error",
    "scales": "Weight scales by projection",
    "gsm8k": "GSM8K accuracy",
    "kld": "KL divergence from the original",
}
"""Figures that `w8a8 report` draws: what each shows, by file name."""


@dataclass(frozen=True, slots=True)
class Card:
    """A finished card and where it belongs; `stranger` says that a README.md is there which `card` did not write."""

    path: Path
    text: str
    notices: tuple[str, ...]
    stranger: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"card": str(self.path), "notices": list(self.notices)}


def make(
    out: str | Path,
    *,
    base_model: str | None = None,
    results: Results | None = None,
    describe: str | None = None,
    repo: str | None = None,
) -> Card:
    """Compose the card of the checkpoint in the folder `out`, which `quantize` made; `write` stores it.

    `base_model` is the source's Hub id, or its folder, whose README.md then says the license; by default it is what
    `w8a8.json` says. `describe` are the GPUs of the example, as in `4x24GiB:gfx1100`; by default one of 24 GiB, or the
    reference, or the least that fits. `repo` is the id it will have on the Hub.

    Raises what opening raises, `UsageError` for impossible arguments, `InvalidResultError` for a file that is not a
    result, `UsageError` where the `yours` lines of the old card are broken, and `MissingExtraError`.
    """
    # 1) open the checkpoint, and the card that is there
    made = Made.open(out)
    for problem in made.problems():
        raise W8A8Error(f"{out}: {problem}")
    before = read_text(made.path / README)
    ours = before if is_ours(before) else ""

    # 2) find out what the card says
    origin = find_origin(made, base_model)
    name = valid_id(repo, "--repo") if repo else printable(real(made.path).name)
    measured = (results or Results()).read()
    gpus, launch = example(made, describe, name)
    inspection = inspect(made.path)

    # 3) metadata: what a person added stays
    metadata = describe_model(made, origin, measured, name)
    added = entries_but(ours, OURS | metadata.keys())
    license_ = metadata.get("license") or metadata_of(ours).get("license")
    notices = list(origin.notices)
    if not license_:
        notices.append("no license in the card: the source names none, or could not be read; add it to the metadata")

    # 4) fill in the template, with what a person wrote at its places
    yours = Places(kept(ours))
    context = {
        "name": name,
        "stamp": Verbatim(STAMP),
        "origin": origin,
        "made": made,
        "provenance": made.provenance,
        "inspection": inspection,
        "compression": f"{smaller:.1f}x" if (smaller := made.provenance.bytes.source / inspection.nbytes) > 1 else "",
        "unquantized": [row for row in inspection.components if row.dtype != "I8" and row.component != "scales"],
        "quantized": [row for row in inspection.components if row.dtype == "I8"],
        "tied_head": _tied_head(inspection),
        "quantized_tensors": sum(map(made.is_quantized, inspection.specs)),
        "excludes": _summary(inspection.excludes),
        "accuracy": accuracy(measured),
        "gpus": gpus,
        "launch": launch,
        "python": python_example(made, name),
        "hardware": hardware(made),
        "commands": commands(made, origin, name),
        "citation": citation(made, origin, name),
        "figures": _figures(made.path),
        "license": license_,
        "license_files": list(map(printable, origin.license_files)),
        "yours": yours,
        **_files(made),
    }
    text = render(context)
    if lost := yours.unused:
        raise UsageError(f"{made.path / README}: the card has no place called {lost[0]!r}; move that text to another")
    return Card(made.path / README, with_metadata(text, metadata, added), tuple(notices), bool(before) and not ours)


def write(card: Card, *, overwrite: bool = False) -> None:
    """Store a card, whole or not at all; `overwrite` moves a README.md aside that this command did not write.

    Raises `TargetExistsError` where such a README.md is in the way, `UnwritableError` or `DiskFullError`.
    """
    if card.stranger:
        aside = card.path.with_name(ASIDE)
        with reading(card.path):
            before = read_bytes(card.path, MAX_TEXT_BYTES)
            taken = (
                aside.exists() and read_bytes(aside, MAX_TEXT_BYTES) != before
            )  # equal: a killed run has got as far as this
        if taken or not overwrite:
            way_out = f"{ASIDE} is there too: move one of them" if overwrite else f"--overwrite moves it to {ASIDE}"
            raise TargetExistsError(f"{card.path}: exists, and `w8a8 card` did not write it; {way_out}")
        write_whole(aside, before)
    write_whole(card.path, card.text.encode())


def show(card: Card, say: Callable[[Any], None]) -> None:
    """Print where the card is."""
    say(f"[bold]{clean(str(card.path))}[/bold] written; add to it between the lines marked `yours`")


def _files(made: Made) -> Mapping[str, Any]:
    """Names of the files that the card lists: those that quantizing changed, and those it copied."""
    sidecars = [name for name in made.checkpoint.sidecars if name not in {"config.json", PROVENANCE}]
    return {
        "changed": [*(s.name for s in made.checkpoint.shards), *([INDEX] if made.checkpoint.indexed else [])],
        "unchanged": [printable(name) for name in sidecars],
    }


def _figures(folder: Path) -> list[tuple[str, str]]:
    """Figures that `w8a8 report --png OUT/figures` drew: name, and what it shows."""
    return [(name, what) for name, what in FIGURES.items() if (folder / "figures" / f"{name}.png").is_file()]


def _tied_head(inspection: Inspection) -> str:
    """The dtype of the output layer where it is the embedding table; empty where it has a tensor of its own."""
    if any(module_name(tensor.name).endswith("lm_head") for tensor in inspection.specs):
        return ""
    return next((row.dtype for row in inspection.components if row.component == "embeddings"), "")


def _summary(modules: Sequence[str]) -> list[tuple[str, int]]:
    """Names of `modules`, layer numbers replaced by a star, and how many each stands for.

    A blank name is shown as such: an empty list item would make a heading of the line above.
    """
    names = (re.sub(r"\.\d+(?=\.|$)", ".*", printable(name).strip()) or "(blank)" for name in modules)
    return list(Counter(names).items())
