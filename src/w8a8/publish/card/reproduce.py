"""The commands that make a checkpoint again, and its citation."""

import glob
import re
import shlex
from dataclasses import replace

from w8a8.calibrate.request import SAMPLES, TOKENS
from w8a8.errors import W8A8Error
from w8a8.formats import COMPATS, FORMATS
from w8a8.formats.provenance import PROVENANCE, Provenance
from w8a8.plan import Rules, module_name
from w8a8.publish.card.origin import Origin
from w8a8.publish.made import Made
from w8a8.recipes import RECIPES
from w8a8.terminal.wording import printable
from w8a8.texts.samples import BUILT_IN


def commands(made: Made, origin: Origin, name: str) -> str:
    """Shell commands that make this checkpoint again from its source, and check it. Raises `W8A8Error`."""
    revision = f"@{origin.revision}" if origin.revision else ""
    source, target = shlex.quote(origin.name + revision), shlex.quote(name.rpartition("/")[2])
    options = [*_format_options(made.provenance.format), *_recipe_options(made.provenance), *_selection_options(made)]
    quantize = " \\\n  ".join([f"w8a8 quantize {source} {target}", *options])
    return f"{quantize}\nw8a8 verify {target} --source {source}"


def citation(made: Made, origin: Origin, name: str) -> str:
    """A BibTeX entry for this checkpoint."""
    title, source = (re.sub(r"[{}\\]", "", text) for text in (name, origin.name))
    return (
        f"@misc{{{re.sub('[^A-Za-z0-9]+', '-', title).strip('-') or 'w8a8'},\n"
        f"  title = {{{title}: {source} quantized to INT8 W8A8}},\n"
        f"  note = {{Quantized with w8a8 {printable(made.provenance.version)}}}\n}}"
    )


def _format_options(label: str) -> list[str]:
    name, _, mode = label.removesuffix(")").partition(" (as ")
    if name not in FORMATS or (mode and mode not in COMPATS):
        raise W8A8Error(f"{PROVENANCE}: {printable(label)!r} is not a format that this version knows")
    return [f"--compat {mode}"] if mode else [] if name == FORMATS[0] else [f"--format {name}"]


def _recipe_options(provenance: Provenance) -> list[str]:
    """Options of the calibration; its text is known by name only."""
    found = provenance.calibration
    if found is None:
        return []
    if provenance.recipe not in RECIPES:
        raise W8A8Error(f"{PROVENANCE}: {printable(provenance.recipe)!r} is not a recipe that this version knows")
    text = [] if found.text.name == BUILT_IN else [f"--calibration {shlex.quote(printable(found.text.name))}"]
    sizes = [("samples", found.samples, SAMPLES), ("tokens", found.tokens, TOKENS)]
    options = [f"--{name} {value}" for name, value, default in sizes if value != default]
    keep = [f"--keep-bf16 {found.keep_bf16 * 100:g}%"] if found.keep_bf16 else []
    return [f"--recipe {provenance.recipe}", *text, *options, *keep]


def _selection_options(made: Made) -> list[str]:
    """Options for the tensors that are quantized, or not, against the rules."""
    rules = Rules.for_config(made.checkpoint.config)
    calibration = made.provenance.calibration
    kept = set(calibration.kept if calibration else ())
    options = []
    for tensor in made.checkpoint.tensors.values():
        quantized = made.is_quantized(tensor)
        verdict = rules.judge(replace(tensor, dtype="BF16") if quantized else tensor)
        module = module_name(tensor.name)
        if quantized != verdict.quantize and module not in kept:
            pattern = shlex.quote(glob.escape(printable(module)))
            options.append(f"--{'include' if quantized else 'exclude'} {pattern}")
    return options
