"""`w8a8 card`: the README.md of a checkpoint, written from its files and its results.

Parameters, sizes and ratio come from the headers, how it was made from `w8a8.json`, the command from what `serve
--dry-run` prints, the hardware from `fit`, accuracies from result files. What a person adds between the lines marked
`yours` stays when the card is written again; so do metadata this command does not write. Every name in it may hold
anything, and is escaped where the template prints it unless it says otherwise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w8a8.checkpoint import reading
from w8a8.checkpoint.reader import INDEX
from w8a8.errors import TargetExistsError, UsageError, W8A8Error
from w8a8.formats.provenance import PROVENANCE
from w8a8.inspection import inspect
from w8a8.publish.card import facts
from w8a8.publish.card.facts import Results
from w8a8.publish.card.text import (
    README,
    STAMP,
    Places,
    Verbatim,
    is_ours,
    kept,
    metadata_of,
    read_text,
    render,
    with_metadata,
)
from w8a8.publish.made import Made
from w8a8.storage.writer import write_whole
from w8a8.terminal.wording import clean, printable

ASIDE = "README.before.md"

_OURS = {"base_model", "base_model_relation", "tags", "library_name", "pipeline_tag", "model-index"}
"""Metadata this command writes; others in a card stay."""


@dataclass(frozen=True, slots=True)
class Card:
    """A finished card and where it belongs. `stranger` says that a README.md is there which is not a card of ours."""

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
    """Write the card of the checkpoint in the folder `out`, which `quantize` made; nothing is stored yet.

    `base_model` is the source's Hub id, or its folder, whose README.md then says the license; by default it is what
    `w8a8.json` says. `describe` are the GPUs of the example, as in `4x24GiB:gfx1100`; by default one of 24 GiB, or the
    reference, or the least that fits. `repo` is the id it will have on the Hub.

    Raises what opening raises, `UsageError` for impossible arguments, result files that are none, or a card whose
    `yours` lines are broken, and `MissingExtraError`.
    """
    made = Made.open(out)
    for problem in made.problems():
        raise W8A8Error(f"{out}: {problem}")
    old = read_text(made.path / README)
    base, license_, notices = facts.origin(made, base_model)
    name = facts.valid_id(repo, "--repo") if repo else printable(made.path.resolve().name)
    gpus, launch = facts.example(made, describe)
    launch = facts.named(launch, name)
    measured = facts.Measured.read(results or Results())
    inspection = inspect(made.path)
    data = facts.metadata(made, inspection, base, license_, measured, name)
    kept_metadata = metadata_of(old) if is_ours(old) else {}
    merged = {k: v for k, v in kept_metadata.items() if k not in _OURS} | data
    if "license" not in merged:
        notices.append("no license in the card: the source's metadata do not say one, or were not found")
    yours = Places(kept(old) if is_ours(old) else {})
    context = {
        "name": name,
        "stamp": Verbatim(STAMP),
        "base": base,
        "source": made.source,
        "made": made,
        "inspection": inspection,
        "compression": f"{made.source_bytes / inspection.nbytes:.1f}x",
        "unquantized": [row for row in inspection.components if row.dtype != "I8" and row.component != "scales"],
        "quantized": [row for row in inspection.components if row.dtype == "I8"],
        "tied_head": facts.tied_head(made, inspection),
        "quantized_tensors": sum(facts.is_quantized(t, made) for t in inspection.specs),
        "excludes": facts.summary(inspection.excludes),
        "measured": measured,
        "launch": launch,
        "gpus": gpus,
        "python": facts.python_example(made, name),
        "hardware": facts.hardware(made),
        "commands": facts.commands(made, base, name),
        "figures": facts.figures(made),
        "citation": facts.citation(made, base, name),
        "license": merged.get("license"),
        "license_files": [printable(n) for n in made.checkpoint.sidecars if facts.LICENSE_FILE.fullmatch(n)],
        "changed": [*(s.name for s in made.checkpoint.shards), *([INDEX] if made.checkpoint.indexed else [])],
        "unchanged": [printable(n) for n in made.checkpoint.sidecars if n not in {"config.json", PROVENANCE}],
        "provenance": PROVENANCE,
        "yours": yours,
    }
    text = render(context)
    if lost := yours.unused:
        raise UsageError(f"{made.path / README}: the card has no place called {lost[0]!r}; move that text to another")
    return Card(made.path / README, with_metadata(text, merged), tuple(notices), bool(old) and not is_ours(old))


def write(card: Card, *, overwrite: bool = False) -> None:
    """Store a card, whole or not at all. A README.md that is none of ours is moved aside if `overwrite`, else kept.

    Raises `TargetExistsError` for such a README.md, and what writing raises.
    """
    aside = card.path.with_name(ASIDE)
    if card.stranger and (not overwrite or aside.exists()):
        way_out = f"{ASIDE} is there too: move one of them" if overwrite else f"--overwrite moves it to {ASIDE}"
        raise TargetExistsError(f"{card.path}: is there already, and not written by `w8a8 card`; {way_out}")
    if card.stranger:
        with reading(card.path):
            write_whole(aside, card.path.read_bytes())
    write_whole(card.path, card.text.encode())


def show(card: Card, say: Callable[[Any], None]) -> None:
    """Where it is."""
    say(f"[bold]{clean(str(card.path))}[/bold] written; add to it between the lines marked `yours`")
