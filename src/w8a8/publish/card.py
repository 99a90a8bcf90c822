"""`w8a8 card`: the README.md of a checkpoint, written from its files and its results.

Parameters, sizes and ratio come from the headers, how it was made from `w8a8.json`, the command from what `serve
--dry-run` prints, the hardware from `fit`, accuracies from result files. What a person adds between the lines marked
`yours` stays when the card is written again; so do metadata this command does not write. Every name in it may hold
anything, and is escaped where the template prints it unless it says otherwise.
"""

import glob
import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from w8a8 import machine
from w8a8.checkpoint import TensorSpec, reading
from w8a8.checkpoint.reader import INDEX
from w8a8.errors import DoesNotFitError, MissingExtraError, TargetExistsError, UsageError, W8A8Error
from w8a8.evals.compare import compare
from w8a8.execute.run import PROVENANCE
from w8a8.execute.writer import disk_errors
from w8a8.formats import COMPATS, FORMATS, section
from w8a8.inspection import Inspection, inspect
from w8a8.memory import Fit, fit
from w8a8.plan import Rules, module_name, scale_name
from w8a8.publish.made import Made
from w8a8.publish.report_results import Gsm8k, Kld, read_gsm8k, read_kld
from w8a8.serve.launch import Launch
from w8a8.serve.launch import prepare as prepare_serve
from w8a8.terminal import clean, count, plural, printable, size

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

README = "README.md"
STAMP = "<!-- Written by `w8a8 card`, and written anew by it: only what stands between `yours` lines is kept. -->"
ASIDE = "README.before.md"
ONE_GPU, REFERENCE_GPUS = "24GiB", "4x24GiB:gfx1100"
"""What an example is for: one card people have, or the reference case's four."""

SETUPS = ("16GiB", "24GiB", "48GiB", "2x24GiB", "80GiB", "4x24GiB", "2x80GiB", "4x80GiB", "8x80GiB", "8x192GiB")
"""Setups people have, by their memory."""

_SHOWN = 4
_MARKER = re.compile(r"<!-- yours: (?P<what>begin|end) (?P<place>[a-z]+) -->")
_OURS = {"base_model", "base_model_relation", "tags", "library_name", "pipeline_tag", "model-index"}
_LICENSE_KEYS = ("license", "license_name", "license_link")
_LICENSE_FILE = re.compile(r"(?i)(licen[cs]e|notice|copying|use_policy|gemma_.*terms).*")


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


@dataclass(frozen=True, slots=True)
class Results:
    """Result files: GSM8K of the original and of the checkpoint, and the KL divergence between them."""

    baseline: Path | None = None
    quant: Path | None = None
    kld: Path | None = None


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
    old = _read(made.path / README)
    base, license_, notices = _origin(made, base_model)
    name = _valid_id(repo, "--repo") if repo else printable(made.path.resolve().name)
    gpus, launch = _launch(made, describe)
    launch = _named(launch, name)
    measured = _Measured.read(results or Results())
    inspection = inspect(made.path)
    data = _metadata(made, inspection, base, license_, measured, name)
    kept_metadata = _metadata_of(old) if _is_ours(old) else {}
    merged = {k: v for k, v in kept_metadata.items() if k not in _OURS} | data
    if "license" not in merged:
        notices.append("no license in the card: the source's metadata do not say one, or were not found")
    yours = _Places(_kept(old) if _is_ours(old) else {})
    context = {
        "name": name,
        "stamp": _Verbatim(STAMP),
        "base": base,
        "source": made.source,
        "made": made,
        "inspection": inspection,
        "compression": f"{made.source_bytes / inspection.nbytes:.1f}x",
        "unquantized": [row for row in inspection.components if row.dtype != "I8" and row.component != "scales"],
        "quantized": [row for row in inspection.components if row.dtype == "I8"],
        "tied_head": _tied_head(made, inspection),
        "quantized_tensors": sum(_is_quantized(t, made) for t in inspection.specs),
        "excludes": _summary(inspection.excludes),
        "measured": measured,
        "launch": launch,
        "gpus": gpus,
        "python": _python(made, name),
        "hardware": _hardware(made),
        "commands": _commands(made, name),
        "citation": _citation(made, base, name),
        "license": merged.get("license"),
        "license_files": [printable(n) for n in made.checkpoint.sidecars if _LICENSE_FILE.fullmatch(n)],
        "changed": [*(s.name for s in made.checkpoint.shards), *([INDEX] if made.checkpoint.indexed else [])],
        "unchanged": [printable(n) for n in made.checkpoint.sidecars if n not in {"config.json", PROVENANCE}],
        "provenance": PROVENANCE,
        "yours": yours,
    }
    text = _render(context)
    if lost := yours.unused:
        raise UsageError(f"{made.path / README}: the card has no place called {lost[0]!r}; move that text to another")
    return Card(made.path / README, _with_metadata(text, merged), tuple(notices), bool(old) and not _is_ours(old))


def write(card: Card, *, overwrite: bool = False) -> None:
    """Store a card, whole or not at all. A README.md that is none of ours is moved aside if `overwrite`, else kept.

    Raises `TargetExistsError` for such a README.md, and what writing raises.
    """
    aside = card.path.with_name(ASIDE)
    if card.stranger and (not overwrite or aside.exists()):
        way_out = f"{ASIDE} is there too: move one of them" if overwrite else f"--overwrite moves it to {ASIDE}"
        raise TargetExistsError(f"{card.path}: is there already, and not written by `w8a8 card`; {way_out}")
    temporary = card.path.with_name(f".{README}.{os.getpid()}")
    try:
        with disk_errors(card.path), temporary.open("w", encoding="utf-8", newline="") as file:
            file.write(card.text)
            file.flush()
            os.fsync(file.fileno())
        with disk_errors(card.path):
            if card.stranger:
                card.path.rename(aside)
            temporary.replace(card.path)
    finally:
        temporary.unlink(missing_ok=True)


# --- what was there -----------------------------------------------------------------------------------------------


def _read(path: Path) -> str:
    try:
        with reading(path):
            return path.read_text(encoding="utf-8") if path.exists() else ""
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is not UTF-8 text ({error}); move it away") from error


def _is_ours(text: str) -> bool:
    return STAMP in text.splitlines()


def _kept(text: str) -> dict[str, str]:
    """What a person wrote, by place. Raises `UsageError` where the marked lines do not come in pairs."""
    kept: dict[str, str] = {}
    place, lines = "", list[str]()
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        marker = _MARKER.fullmatch(line.strip())
        if marker is None and not line.strip().startswith("<!-- yours:"):
            lines.append(line)
            continue
        beginning = marker is not None and marker["what"] == "begin" and not place and marker["place"] not in kept
        ending = marker is not None and marker["what"] == "end" and place == marker["place"]
        if marker is None or not (beginning or ending):
            raise UsageError(f"{README}: line {number}, {line.strip()[:80]!r}, has no partner; {_MEND}")
        if ending:
            kept[place] = "".join(lines)
        place, lines = (marker["place"] if beginning else ""), []
    if place:
        raise UsageError(f"{README}: `yours: begin {place}` has no end; {_MEND}")
    return kept


_MEND = "mend the marked lines, and nothing you wrote is lost (the file is as it was)"


class _Places:
    """The places for a person's text, filled as the template comes by them."""

    def __init__(self, kept: Mapping[str, str]) -> None:
        self._kept = dict(kept)

    def __call__(self, place: str) -> str:
        return _Verbatim(f"<!-- yours: begin {place} -->\n{self._kept.pop(place, '')}<!-- yours: end {place} -->")

    @property
    def unused(self) -> list[str]:
        """Places with text that the template did not come by."""
        return [place for place, text in self._kept.items() if text.strip()]


def _metadata_of(text: str) -> Mapping[str, Any]:
    """The metadata of a README. Raises `UsageError` where they are none."""
    from huggingface_hub.repocard import REGEX_YAML_BLOCK
    from yaml import YAMLError, safe_load  # type: ignore[import-untyped]

    block = REGEX_YAML_BLOCK.search(text)
    try:
        values = safe_load(block.group(2)) if block else {}
    except YAMLError as error:
        raise UsageError(f"{README}: its metadata are no YAML ({' '.join(str(error).split())[:200]})") from error
    return values if isinstance(values, dict) else {}


# --- where it comes from ------------------------------------------------------------------------------------------


def _origin(made: Made, base_model: str | None) -> tuple[str | None, dict[str, Any], list[str]]:
    """The Hub id of the source if it has one, what its metadata say of its license, and what was left out and why."""
    notices = []
    asked = base_model or made.source
    folder = Path(asked) if base_model and Path(base_model).is_dir() else None
    base = None
    if folder:
        notices.append(f"{asked} is a folder, not a Hub id: no base_model in the card (--base-model ORG/NAME)")
    elif base_model or made.from_hub:
        base = _valid_id(asked, "--base-model" if base_model else PROVENANCE)
    else:
        notices.append(f"made from the folder {asked}: no base_model in the card (--base-model ORG/NAME)")
    revision = made.revision if asked == made.source else None
    return base, _license(_source_metadata(folder, base, revision), made, base), notices


def _valid_id(text: str, where: str) -> str:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(text)
    except HFValidationError as error:
        raise UsageError(f"{where}: {printable(text)!r} is neither a folder nor a Hub id ({error})") from error
    return text


def _source_metadata(folder: Path | None, base: str | None, revision: str | None) -> Mapping[str, Any]:
    """The metadata of the source's README: from its folder, from the cache, or asked of the Hub, once."""
    if folder:
        return _metadata_of(_read(folder / README))
    if base is None:
        return {}
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]

    cached = try_to_load_from_cache(base, README, revision=revision)
    if isinstance(cached, str):
        return _metadata_of(_read(Path(cached)))
    try:
        info = HfApi().model_info(base, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except (HTTPError, OfflineModeIsEnabled, OSError, ValueError):
        return {}  # the notice about the license says so
    return info.card_data.to_dict() if info.card_data else {}  # type: ignore[no-untyped-call]


def _license(metadata: Mapping[str, Any], made: Made, base: str | None) -> dict[str, Any]:
    """The license as the source's metadata say it; else that it is in the files that came along; else nothing."""
    found = {key: metadata[key] for key in _LICENSE_KEYS if isinstance(metadata.get(key), str)}
    link = found.get("license_link", "")
    copied = [name for name in made.checkpoint.sidecars if _LICENSE_FILE.fullmatch(name)]
    if link and "://" not in link and link not in made.checkpoint.sidecars:
        found.pop("license_link")
        if base:
            found["license_link"] = f"https://huggingface.co/{base}/blob/main/{link}"
    if "license" in found:
        return found
    return {"license": "other", "license_link": copied[0]} if copied else {}


def _metadata(
    made: Made, inspection: Inspection, base: str | None, license_: dict[str, Any], measured: "_Measured", name: str
) -> dict[str, Any]:
    """What the Hub reads."""
    from huggingface_hub import ModelCardData

    values: dict[str, Any] = {
        **({"base_model": base, "base_model_relation": "quantized"} if base else {}),
        **license_,
        "library_name": "vllm",
        "pipeline_tag": "image-text-to-text" if _sees(made) else "text-generation",
        "tags": ["int8", "w8a8", "ptpc", "8-bit", made.scheme.method, "vllm", *filter(None, [inspection.model_type])],
    }
    if measured.quant:
        values |= {"model_name": name, "eval_results": [_eval_result(measured.quant)]}
    return dict(ModelCardData(**values).to_dict())  # type: ignore[no-untyped-call]


# --- what was measured --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Measured:
    """The results there are, ready to be shown."""

    baseline: Gsm8k | None
    quant: Gsm8k | None
    kld: Kld | None

    @classmethod
    def read(cls, results: Results) -> "_Measured":
        baseline, quant = (read_gsm8k(path) if path else None for path in (results.baseline, results.quant))
        return cls(baseline, quant, read_kld(results.kld) if results.kld else None)

    @property
    def rows(self) -> list[tuple[str, str, str]]:
        """Accuracy, its interval and the count, of the original and of the checkpoint."""
        return [_score(result) for result in (self.baseline, self.quant)]

    @property
    def verdict(self) -> str:
        """What the two say together. Raises `UsageError` where they were not asked the same."""
        return compare(self.baseline.raw, self.quant.raw).verdict if self.baseline and self.quant else ""

    @property
    def protocol(self) -> str:
        """How the answers were asked for, in words; the numbers are those of the file."""
        result = self.quant or self.baseline
        if result is None:
            return ""
        asked = result.raw["protocol"]
        said = [plural(result.questions, "question"), f"{result.shots}-shot", f"{asked.get('endpoint')} API"]
        said += [f"{key} {asked[key]:g}" for key in ("temperature", "max_tokens") if _is_number(asked.get(key))]
        return ", ".join(said)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _eval_result(result: Gsm8k) -> "EvalResult":
    """A score as the Hub's model-index has it: in percent."""
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type="text-generation",
        dataset_type="openai/gsm8k",
        dataset_name="GSM8K",
        dataset_config="main",
        dataset_split="test",
        metric_type="exact_match",
        metric_name=f"{result.shots}-shot accuracy, strict, {plural(result.questions, 'question')}",
        metric_value=round(result.strict.value * 100, 2),
    )


def _score(result: Gsm8k | None) -> tuple[str, str, str]:
    if result is None:
        return "not measured", "", ""
    strict, right = result.strict, result.raw["strict"]["correct"]
    return f"{strict.value:.2%}", f"{strict.low:.2%} to {strict.high:.2%}", f"{right:,} / {result.questions:,}"


# --- how to run it ------------------------------------------------------------------------------------------------


def _launch(made: Made, describe: str | None) -> tuple[str, Launch]:
    """What `serve --dry-run` says for the GPUs described, else for the first of the usual ones that hold it."""
    choices = [describe] if describe else [ONE_GPU, REFERENCE_GPUS, *SETUPS]
    for i, choice in enumerate(choices, 1):
        try:
            return choice, prepare_serve(str(made.path), gpus=machine.describe(choice), dry_run=True)
        except DoesNotFitError:
            if i == len(choices):
                raise
    raise AssertionError


def _named(launch: Launch, name: str) -> Launch:
    """The same with the name the model will go by, instead of the folder it lies in now."""
    program, verb, _, *flags = launch.argv
    return replace(launch, argv=(program, verb, name, *flags), call=replace(launch.call, model=name))


def _python(made: Made, name: str) -> str:
    """The same in transformers."""
    model, words = (
        ("AutoModelForImageTextToText", "AutoProcessor") if _sees(made) else ("AutoModelForCausalLM", "AutoTokenizer")
    )
    return (
        "import w8a8.runtime  # from here on transformers loads W8A8 checkpoints\n"
        f"from transformers import {model}, {words}\n\n"
        f'model = {model}.from_pretrained({json.dumps(name)}, dtype="auto", device_map="auto")\n'
        f"{words[4:].lower()} = {words}.from_pretrained({json.dumps(name)})"
    )


def _hardware(made: Made) -> list[tuple[str, Fit]]:
    """The smallest of the usual setups that hold the model, all of whose GPUs it can use."""
    found = [(setup, fit(made.checkpoint, machine.describe(setup))) for setup in SETUPS]
    usable = [(setup, f) for setup, f in found if f.fits and f.tensor_parallel == len(f.gpus)]
    return [(setup if "x" in setup else f"1x{setup}", f) for setup, f in usable][:_SHOWN]


def _sees(made: Made) -> bool:
    return bool(section(made.checkpoint.config, "vision_config"))


# --- how it was made ----------------------------------------------------------------------------------------------


def _commands(made: Made, name: str) -> str:
    """The commands that make this checkpoint again and check it, for a shell."""
    source = made.source + (f"@{made.revision}" if made.revision and made.from_hub else "")
    source, target = shlex.quote(source), shlex.quote(name.rpartition("/")[2])
    options = [*_format_options(made.format), *_selection_options(made)]
    quantize = " \\\n  ".join([f"w8a8 quantize {source} {target}", *options])
    return f"{quantize}\nw8a8 verify {target} --source {source}"


def _citation(made: Made, base: str | None, name: str) -> str:
    """This checkpoint for BibTeX."""
    title, source = (re.sub(r"[{}\\]", "", text) for text in (name, base or made.source))
    return (
        f"@misc{{{re.sub('[^A-Za-z0-9]+', '-', title).strip('-') or 'w8a8'},\n"
        f"  title = {{{title}: {source} quantized to INT8 W8A8}},\n"
        f"  note = {{Quantized with w8a8 {made.version}}}\n}}"
    )


def _format_options(label: str) -> list[str]:
    name, _, mode = label.removesuffix(")").partition(" (as ")
    if name not in FORMATS or (mode and mode not in COMPATS):
        raise W8A8Error(f"{PROVENANCE}: {printable(label)!r} is no format that this version knows")
    return [f"--compat {mode}"] if mode else [] if name == FORMATS[0] else [f"--format {name}"]


def _selection_options(made: Made) -> list[str]:
    """Where the choice of tensors is not what the rules make it: the options that make it so."""
    rules = Rules.for_config(made.checkpoint.config)
    options = []
    for tensor in made.checkpoint.tensors.values():
        quantized = _is_quantized(tensor, made)
        verdict = rules.judge(replace(tensor, dtype="BF16") if quantized else tensor)
        if quantized != verdict.quantize:
            module = shlex.quote(glob.escape(printable(module_name(tensor.name))))
            options.append(f"--{'include' if quantized else 'exclude'} {module}")
    return options


def _is_quantized(tensor: TensorSpec, made: Made) -> bool:
    return tensor.dtype == "I8" and scale_name(tensor.name) in made.checkpoint.tensors


def _tied_head(made: Made, inspection: Inspection) -> str:
    """The dtype of the output layer where it is the embedding table, so that no tensor of its own is there."""
    if any(module_name(name).endswith("lm_head") for name in made.checkpoint.tensors):
        return ""
    return next((row.dtype for row in inspection.components if row.component == "embeddings"), "")


def _summary(excludes: Sequence[str]) -> list[tuple[str, int]]:
    """Names of modules, layer numbers replaced by a star, and how many each stands for."""
    return list(Counter(re.sub(r"\.\d+(?=\.|$)", ".*", printable(name)) for name in excludes).items())


# --- the text -----------------------------------------------------------------------------------------------------


class _Verbatim(str):
    """Text that is Markdown already."""

    __slots__ = ()


def _escaped(value: Any) -> str:
    """A value as Markdown that shows just that, in a table too."""
    if isinstance(value, _Verbatim):
        return value
    text = printable(str(value)).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]|~$])", r"\\\1", text)


def _code(text: str, language: str) -> str:
    """A fenced block that nothing in `text` can close."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return _Verbatim(f"{fence}{language}\n{text}\n{fence}")


def _render(context: Mapping[str, Any]) -> str:
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise MissingExtraError("`w8a8 card` needs Jinja: pip install 'w8a8[publish]'") from error
    environment = Environment(
        undefined=StrictUndefined,
        finalize=_escaped,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals.update(code=_code)
    environment.filters.update(size=size, count=count, plural=plural)
    template = files("w8a8.publish").joinpath("card.md.jinja").read_text(encoding="utf-8")
    return environment.from_string(template).render(context)


def _with_metadata(text: str, metadata: Mapping[str, Any]) -> str:
    """The whole README, read back as the Hub reads it."""
    from huggingface_hub import CardData, ModelCard

    card = ModelCard(f"---\n{CardData(**metadata).to_yaml()}\n---\n{text}")
    return str(card)


def show(card: Card, say: Callable[[Any], None]) -> None:
    """Where it is."""
    say(f"[bold]{clean(str(card.path))}[/bold] written; add to it between the lines marked `yours`")
