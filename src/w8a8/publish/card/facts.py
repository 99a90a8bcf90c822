"""What a card says, found out: the source and its license, results, how to run it, how it was made."""

import glob
import json
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from w8a8 import machine
from w8a8.calibrate.request import RECIPES, SAMPLES, TOKENS
from w8a8.checkpoint import TensorSpec
from w8a8.errors import DoesNotFitError, UsageError, W8A8Error
from w8a8.evals.gsm8k.compare import compare
from w8a8.formats import COMPATS, FORMATS, section
from w8a8.formats.provenance import PROVENANCE
from w8a8.inspection import Inspection
from w8a8.memory import Fit, fit
from w8a8.plan import Rules, module_name, scale_name
from w8a8.publish.card.text import README, metadata_of, read_text
from w8a8.publish.made import Made
from w8a8.publish.results import Gsm8k, Kld, read_gsm8k, read_kld
from w8a8.serve.launch import Launch
from w8a8.serve.launch import prepare as prepare_serve
from w8a8.terminal.wording import plural, printable
from w8a8.texts.samples import BUILT_IN

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

ONE_GPU, REFERENCE_GPUS = "24GiB", "4x24GiB:gfx1100"
"""What an example is for: one card people have, or the reference case's four."""

SETUPS = ("16GiB", "24GiB", "48GiB", "2x24GiB", "80GiB", "4x24GiB", "2x80GiB", "4x80GiB", "8x80GiB", "8x192GiB")
"""Setups people have, by their memory."""

FIGURES = {
    "size": "Size by component, before and after",
    "sqnr": "SQNR by layer and projection",
    "worst": "The matrices that lost most",
    "scales": "Weight scales by projection",
    "gsm8k": "GSM8K accuracy",
    "kld": "KL divergence from the original",
}
"""What `w8a8 report` draws, by file name."""

LICENSE_FILE = re.compile(r"(?i)(licen[cs]e|notice|copying|use_policy|gemma_.*terms).*")

_SHOWN = 4
_LICENSE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True, slots=True)
class Results:
    """Result files: GSM8K of the original and of the checkpoint, and the KL divergence between them."""

    baseline: Path | None = None
    quant: Path | None = None
    kld: Path | None = None


# --- where it comes from ------------------------------------------------------------------------------------------


def origin(made: Made, base_model: str | None) -> tuple[str | None, dict[str, Any], list[str]]:
    """The Hub id of the source if it has one, what its metadata say of its license, and what was left out and why."""
    notices = []
    asked = base_model or made.source
    folder = Path(asked) if base_model and Path(base_model).is_dir() else None
    base = None
    if folder:
        notices.append(f"{asked} is a folder, not a Hub id: no base_model in the card (--base-model ORG/NAME)")
    elif base_model or made.from_hub:
        base = valid_id(asked, "--base-model" if base_model else PROVENANCE)
    else:
        notices.append(f"made from the folder {asked}: no base_model in the card (--base-model ORG/NAME)")
    revision = made.revision if asked == made.source else None
    return base, _license(_source_metadata(folder, base, revision), made, base), notices


def valid_id(text: str, where: str) -> str:
    """A Hub id as it was given. Raises `UsageError` that says `where` it stands if it is none."""
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
        return metadata_of(read_text(folder / README))
    if base is None:
        return {}
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]

    cached = try_to_load_from_cache(base, README, revision=revision)
    if isinstance(cached, str):
        return metadata_of(read_text(Path(cached)))
    try:
        info = HfApi().model_info(base, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except (HTTPError, OfflineModeIsEnabled, OSError, ValueError):
        return {}  # the notice about the license says so
    return info.card_data.to_dict() if info.card_data else {}  # type: ignore[no-untyped-call]


def _license(metadata: Mapping[str, Any], made: Made, base: str | None) -> dict[str, Any]:
    """The license as the source's metadata say it; else that it is in the files that came along; else nothing."""
    found = {key: metadata[key] for key in _LICENSE_KEYS if isinstance(metadata.get(key), str) and metadata[key]}
    link = found.get("license_link", "")
    copied = [name for name in made.checkpoint.sidecars if LICENSE_FILE.fullmatch(name)]
    if link and "://" not in link and link not in made.checkpoint.sidecars:
        found.pop("license_link")
        if base:
            found["license_link"] = f"https://huggingface.co/{base}/blob/main/{link}"
    if "license" in found:
        return found
    return {"license": "other", "license_link": copied[0]} if copied else {}


def metadata(
    made: Made, inspection: Inspection, base: str | None, license_: dict[str, Any], measured: "Measured", name: str
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
class Measured:
    """The results there are, ready to be shown."""

    baseline: Gsm8k | None
    quant: Gsm8k | None
    kld: Kld | None

    @classmethod
    def read(cls, results: Results) -> "Measured":
        """Read the files there are. Raises `InvalidResultError` where one is something else."""
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


def example(made: Made, describe: str | None) -> tuple[str, Launch]:
    """What `serve --dry-run` says for the GPUs described, else for the first of the usual ones that hold it."""
    choices = [describe] if describe else [ONE_GPU, REFERENCE_GPUS, *SETUPS]
    for i, choice in enumerate(choices, 1):
        try:
            return choice, prepare_serve(str(made.path), gpus=machine.describe(choice), dry_run=True)
        except DoesNotFitError:
            if i == len(choices):
                raise
    raise AssertionError


def named(launch: Launch, name: str) -> Launch:
    """The same with the name the model will go by, instead of the folder it lies in now."""
    program, verb, _, *flags = launch.argv
    return replace(launch, argv=(program, verb, name, *flags), call=replace(launch.call, model=name))


def python_example(made: Made, name: str) -> str:
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


def hardware(made: Made) -> list[tuple[str, Fit]]:
    """The smallest of the usual setups that hold the model, all of whose GPUs it can use."""
    found = [(setup, fit(made.checkpoint, machine.describe(setup))) for setup in SETUPS]
    usable = [(setup, f) for setup, f in found if f.fits and f.tensor_parallel == len(f.gpus)]
    return [(setup if "x" in setup else f"1x{setup}", f) for setup, f in usable][:_SHOWN]


def _sees(made: Made) -> bool:
    return bool(section(made.checkpoint.config, "vision_config"))


# --- how it was made ----------------------------------------------------------------------------------------------


def commands(made: Made, base: str | None, name: str) -> str:
    """The commands that make this checkpoint again, from `base` or what it was made from, and check it."""
    source = base or made.source
    source += f"@{made.revision}" if made.revision and source == made.source and made.from_hub else ""
    source, target = shlex.quote(source), shlex.quote(name.rpartition("/")[2])
    options = [*_format_options(made.format), *_recipe_options(made), *_selection_options(made)]
    quantize = " \\\n  ".join([f"w8a8 quantize {source} {target}", *options])
    return f"{quantize}\nw8a8 verify {target} --source {source}"


def figures(made: Made) -> list[tuple[str, str]]:
    """The figures that `w8a8 report --png OUT/figures` drew, by name, with what they show."""
    return [(name, what) for name, what in FIGURES.items() if (made.path / "figures" / f"{name}.png").is_file()]


def citation(made: Made, base: str | None, name: str) -> str:
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


def _recipe_options(made: Made) -> list[str]:
    """The options that calibrate it so; of the text, its name is all that is known."""
    found = made.calibration
    if found is None:
        return []
    if made.recipe not in RECIPES:
        raise W8A8Error(f"{PROVENANCE}: {made.recipe!r} is no recipe that this version knows")
    text = [] if found.text == BUILT_IN else [f"--calibration {shlex.quote(found.text)}"]
    sizes = [("samples", found.samples, SAMPLES), ("tokens", found.tokens, TOKENS)]
    options = [f"--{name} {value}" for name, value, default in sizes if value != default]
    keep = [f"--keep-bf16 {found.keep_bf16 * 100:g}%"] if found.keep_bf16 else []
    return [f"--recipe {made.recipe}", *text, *options, *keep]


def _selection_options(made: Made) -> list[str]:
    """Where the choice of tensors is not what the rules make it: the options that make it so."""
    rules = Rules.for_config(made.checkpoint.config)
    options = []
    for tensor in made.checkpoint.tensors.values():
        quantized = is_quantized(tensor, made)
        verdict = rules.judge(replace(tensor, dtype="BF16") if quantized else tensor)
        kept = made.calibration is not None and module_name(tensor.name) in made.calibration.kept
        if quantized != verdict.quantize and not kept:
            module = shlex.quote(glob.escape(printable(module_name(tensor.name))))
            options.append(f"--{'include' if quantized else 'exclude'} {module}")
    return options


def is_quantized(tensor: TensorSpec, made: Made) -> bool:
    """Whether a tensor of the checkpoint is codes that belong to a scale."""
    return tensor.dtype == "I8" and scale_name(tensor.name) in made.checkpoint.tensors


def tied_head(made: Made, inspection: Inspection) -> str:
    """The dtype of the output layer where it is the embedding table, so that no tensor of its own is there."""
    if any(module_name(name).endswith("lm_head") for name in made.checkpoint.tensors):
        return ""
    return next((row.dtype for row in inspection.components if row.component == "embeddings"), "")


def summary(excludes: Sequence[str]) -> list[tuple[str, int]]:
    """Names of modules, layer numbers replaced by a star, and how many each stands for."""
    return list(Counter(re.sub(r"\.\d+(?=\.|$)", ".*", printable(name)) for name in excludes).items())
