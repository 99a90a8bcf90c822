"""A recipe, carried from layer to layer.

First it is measured what errors cost (`costs.py`). Then, for each decoder layer: its weights are read, the recipe
chooses codes and foldings on the states that enter it, and the states that leave the layer as it will be go on to the
next one. What a layer came to lies in a file of its own beside OUT, with those states, and a journal says how far the
work is: a run that was interrupted goes on with the layer it was at.

Where some layers may stay in BF16, a first pass tells what each group of them costs, and a second one calibrates the
rest around those that stay.
"""

import hashlib
import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from w8a8.calibrate import costs
from w8a8.calibrate.activations import Activations, Batches
from w8a8.calibrate.costs import Probe
from w8a8.calibrate.journal import Journal
from w8a8.calibrate.request import Request
from w8a8.checkpoint import Checkpoint, read_header
from w8a8.checkpoint.stream import Identity
from w8a8.errors import DiskFullError, NonFiniteWeightError, UnsupportedModelError, UsageError
from w8a8.execute.run import SLACK_BYTES, check_apart
from w8a8.execute.shard import Finished
from w8a8.execute.staging import Staging
from w8a8.plan import Plan, module_name, scale_name
from w8a8.recipes.budget import Damage, choose_bf16
from w8a8.recipes.costs import Cost
from w8a8.recipes.gptq import Codes
from w8a8.recipes.groups import Group, groups_of
from w8a8.recipes.layer import Gain, LayerResult, calibrate_layer, quantized
from w8a8.runtime.loading import load_tokenizer
from w8a8.runtime.streamed import DTYPES, StreamedModel, forward
from w8a8.storage.folders import lock_folder
from w8a8.texts import samples as texts
from w8a8.texts.samples import CalibrationText
from w8a8.version import __version__

Progress = Callable[[int], AbstractContextManager[Callable[[int], None]]]
"""Shows how many of a number of layers are done: a context, whose value is called with how many more."""


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What calibration came to: the plan that includes it, and its tensors by their names in the result."""

    plan: Plan
    finished: Mapping[str, Finished]


@dataclass(frozen=True, slots=True)
class Setup:
    """What is the same for all layers and passes; `kwargs` are what each layer's forward takes besides the states."""

    model: StreamedModel
    checkpoint: Checkpoint
    request: Request
    text: CalibrationText
    samples: Sequence[Sequence[int]]
    kwargs: Sequence[Mapping[str, Any]]
    notice: Callable[[str], None]

    def states(self, path: Path) -> Activations:
        """The states of all samples, in the file at `path`."""
        hidden = self.model.model.config.get_text_config(decoder=True).hidden_size
        return Activations(path, len(self.samples), len(self.samples[0]), hidden)


@contextmanager
def calibrated(
    name: str,
    checkpoint: Checkpoint,
    request: Request,
    make: Callable[..., Plan],
    out: Path,
    *,
    overwrite: bool,
    progress: Progress,
    notice: Callable[[str], None],
) -> Iterator[Calibrated]:
    """Calibrate the model of `checkpoint` for the folder `out`; the context is for making use of it.

    `make` makes the plan, given what calibration adds to it; `progress(layers)` shows how many layers are done: first
    those that costs are measured in, forwards and backwards, then those that are calibrated. What is on the disk is
    removed when the context ends as it should, and is gone on from when the same is asked for again.
    Raises the errors of `Staging.claim` and of `StreamedModel`, UsageError where text and model do not go together,
    DiskFullError, NonFiniteWeightError.
    """
    out = Path(os.path.realpath(out))
    check_apart(checkpoint.path, out)
    with Staging.claim(out, overwrite=overwrite):
        pass  # both raise now what they would raise after hours
    text = texts.load(request.text)
    if request.text is None:
        notice("no --calibration given: using the small built-in text; one like what the model will read does better")
    model = StreamedModel(name, checkpoint, torch.float32)
    if not groups_of(checkpoint.config, model.hollow(0)):
        kind = checkpoint.config.get("model_type")
        raise UnsupportedModelError(f"{name}: no recipe knows the layers of {kind} models; --recipe rtn takes any")
    samples = _samples(name, model, text, request, notice)
    setup = Setup(model, checkpoint, request, text, samples, model.embed(samples[0])[1], notice)
    home = out.parent / f".{out.name}.w8a8-calibration"
    with lock_folder(home, out):
        plan, kept, folder = make(), dict[str, str](), home / "first"
        passes = 2 if request.keep_bf16 else 1
        _check_room(plan, setup, home, passes)
        measured = _measure(home, plan, setup, progress)
        with progress(model.count * passes) as done:
            gains = _pass(folder, plan, setup, measured, done)
            if request.keep_bf16:
                kept, folder = _choose_kept(plan, gains, setup), home / "second"
                plan = make(kept=kept)
                gains = _pass(folder, plan, setup, measured, done)
        _say_gains(gains, notice)
        finished = _finished(folder, model.count)
        yield Calibrated(make(kept=kept, calibration=_record(finished, setup, plan, kept)), finished)
        shutil.rmtree(home, ignore_errors=True)


def _samples(
    name: str, model: StreamedModel, text: CalibrationText, request: Request, notice: Callable[[str], None]
) -> list[tuple[int, ...]]:
    """The samples, as token ids."""
    limit = getattr(model.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if request.tokens > (limit or request.tokens):
        raise UsageError(f"--tokens {request.tokens}: {name} reads {limit} tokens at most")
    samples = texts.cut(text, load_tokenizer(name, model.folder), samples=request.samples, tokens=request.tokens)
    notice(f"calibrating on {len(samples)} samples of {request.tokens} tokens, {text.name}, on {model.device.type}")
    if len(samples) < request.samples:
        notice(f"{text.name} is too short for {request.samples} samples; a longer text does better")
    return samples


def _check_room(plan: Plan, setup: Setup, home: Path, passes: int) -> None:
    """Room for what calibration writes, and then the result, must be there, or be taken by an earlier run already."""
    codes = sum(decision.tensor.numel for decision in plan.decisions if decision.quantize)
    states = setup.states(home).nbytes
    probed = states * len(costs.probed(len(setup.samples), len(setup.samples[0]))) // len(setup.samples)
    passing = passes * codes + (passes + 1) * states + plan.bytes_out
    needed = max(passing, probed * (setup.model.count + 1)) + SLACK_BYTES
    there = sum(path.stat().st_size for path in home.rglob("*") if path.is_file())
    free = shutil.disk_usage(home).free
    if needed > free + there:
        if not there:
            home.rmdir()
        raise DiskFullError(
            f"{home.parent}: calibrating needs {(needed - there) / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
            "free some space or choose another disk"
        )


@dataclass(frozen=True, slots=True)
class Measured:
    """What errors cost: of each layer's consumers, for the tokens of the samples `numbers`, each of `tokens` tokens."""

    layers: Sequence[Mapping[str, Cost]]
    numbers: Sequence[int]
    tokens: int

    def token_costs(self, layer: int, device: torch.device) -> Mapping[int, Mapping[str, Tensor]]:
        """By sample, what errors of its tokens cost in a layer."""
        split = {path: cost.token.to(device).split(self.tokens) for path, cost in self.layers[layer].items()}
        return {number: {path: parts[i] for path, parts in split.items()} for i, number in enumerate(self.numbers)}

    def row_costs(self, layer: int, device: torch.device) -> Mapping[str, Tensor]:
        """What errors in the outputs of a layer's consumers cost."""
        return {path: cost.row.to(device) for path, cost in self.layers[layer].items()}


def _measure(folder: Path, plan: Plan, setup: Setup, progress: Progress) -> Measured:
    """Measure what errors cost, or read what was measured before."""
    model, tokens = setup.model, len(setup.samples[0])
    numbers = costs.probed(len(setup.samples), tokens)
    groups = [groups_of(setup.checkpoint.config, model.hollow(number)) for number in range(model.count)]
    paths = [[path for group in each for path in group.consumers] for each in groups]
    probe = Probe(numbers, [setup.samples[n] for n in numbers], setup.kwargs, paths)
    path, job = folder / "costs.safetensors", _job(plan, setup)
    layers = costs.load(path, probe, job)
    if layers is None:
        setup.notice("measuring what errors cost, by a reading forwards and one backwards")
        with progress(model.count * 2) as done:
            layers = costs.measure(model, probe, folder, done)
        costs.store(layers, path, job)
    return Measured(layers, numbers, tokens)


# --- a pass over the layers ---------------------------------------------------------------------------------------


def _pass(
    folder: Path, plan: Plan, setup: Setup, measured: Measured, done: Callable[[int], None]
) -> list[tuple[Gain, ...]]:
    """Calibrate all layers, or those that are left, and return what each one's groups gained."""
    model = setup.model
    chosen = {module_name(d.tensor.name) for d in plan.decisions if d.quantize}
    journal = Journal(folder, _job(plan, setup), setup.states(folder).nbytes)
    if not journal.begun:
        setup.states(journal.states(0)).write(model.embed_all(setup.samples, setup.kwargs))
        journal.begin()
    elif journal.gains:
        setup.notice(f"resuming: {len(journal.gains)} of {model.count} layers are calibrated already")
        done(len(journal.gains))
    for number in range(len(journal.gains), model.count):
        entering, leaving = (setup.states(journal.states(n)) for n in (number, number + 1))
        token_costs = measured.token_costs(number, model.device)
        batches = Batches(entering, setup.kwargs[number], token_costs, model.device)
        row_costs = measured.row_costs(number, model.device)
        journal.record(_calibrate(number, batches, row_costs, leaving, chosen, journal, setup))
        done(1)
    return journal.gains


def _job(plan: Plan, setup: Setup) -> dict[str, Any]:
    """What decides what comes out: this version, the source files as they are now, the text, and the options."""
    files = {shard.name: Identity.of(setup.checkpoint.path / shard.name) for shard in setup.checkpoint.shards}
    values = [list(map(list, setup.samples)), [[d.tensor.name, d.quantize] for d in plan.decisions]]
    return {
        "version": __version__,
        "recipe": setup.request.recipe,
        "samples and plan": hashlib.sha256(json.dumps(values).encode()).hexdigest(),
        "sources": {name: [file.size, file.mtime_ns] for name, file in files.items()},
        "device": setup.model.device.type,
    }


@torch.no_grad()  # type: ignore[untyped-decorator]
def _calibrate(
    number: int,
    batches: Batches,
    row_costs: Mapping[str, Tensor],
    leaving: Activations,
    chosen: set[str],
    journal: Journal,
    setup: Setup,
) -> tuple[Gain, ...]:
    """Calibrate a layer whose linear layers in `chosen` are quantized: write what it came to, and what leaves it."""
    model = setup.model
    with model.layer(number) as layer:
        _check_finite(number, layer, model)
        linear = {path for path, module in layer.named_modules() if isinstance(module, nn.Linear)}
        ours = {path for path in linear if module_name(model.tensor(number, f"{path}.weight").name) in chosen}
        groups = _usable(groups_of(setup.checkpoint.config, layer), ours)
        dtype = DTYPES[model.tensor(number, f"{min(linear)}.weight").dtype]
        result = calibrate_layer(layer, groups, batches, row_costs, setup.request.recipe, dtype)
        journal.store(number, save(_tensors(number, result, model)))
        made = quantized(layer, result)
        for path in linear - ours:
            made.set_submodule(path, layer.get_submodule(path))
        leaving.write(forward(made, batch.hidden, batch.kwargs) for batch in batches)
        return result.gains


def _check_finite(number: int, layer: nn.Module, model: StreamedModel) -> None:
    for name, value in layer.named_parameters():
        if not value.isfinite().all():
            raise NonFiniteWeightError(f"{model.tensor(number, name).name} holds NaN or infinity; repair the source")


def _usable(groups: Sequence[Group], ours: set[str]) -> tuple[Group, ...]:
    """The groups whose consumers are all quantized; producers that are not quantized stay as they are."""
    return tuple(
        group if group.kind == "norm" or group.producer in ours else replace(group, producer=None)
        for group in groups
        if ours.issuperset(group.consumers)
    )


def _tensors(number: int, result: LayerResult, model: StreamedModel) -> dict[str, Tensor]:
    """A layer's finished tensors by their names in the result."""
    found = {}
    for name, value in result.tensors.items():
        spec = model.tensor(number, name)
        if isinstance(value, Codes):
            found[spec.name] = value.codes.contiguous().cpu()
            found[scale_name(spec.name)] = value.scale.float().contiguous().cpu()
        else:
            found[spec.name] = value.to(DTYPES[spec.dtype]).contiguous().cpu()
    return found


# --- what comes of it ---------------------------------------------------------------------------------------------


def _choose_kept(plan: Plan, gains: Sequence[Sequence[Gain]], setup: Setup) -> dict[str, str]:
    """The modules to leave as they are within the budget, fused groups whole, and why."""
    quantized_, model = {d.tensor.name: d.tensor for d in plan.decisions if d.quantize}, setup.model
    damages: dict[tuple[int, str], Damage] = {}
    members: dict[tuple[int, str], list[str]] = {}
    for number, layer in enumerate(gains):
        groups = {group.name: group for group in groups_of(setup.checkpoint.config, model.hollow(number))}
        for gain in layer:
            names = [model.tensor(number, f"{path}.weight").name for path in groups[gain.group].consumers]
            cost = sum(
                quantized_[name].nbytes - quantized_[name].numel - 4 * quantized_[name].shape[0] for name in names
            )
            damages[number, gain.group] = Damage(gain.error, cost)
            members[number, gain.group] = [module_name(name) for name in names]
    chosen = choose_bf16(damages, int(setup.request.keep_bf16 * plan.bytes_out))
    if not chosen:
        setup.notice(f"--keep-bf16: no group of layers fits into {setup.request.keep_bf16:.2%} of the result")
    return {
        module: f"--keep-bf16: would cost {damages[key].error:.1e} nats a token"
        for key in chosen
        for module in members[key]
    }


def _say_gains(gains: Sequence[Sequence[Gain]], notice: Callable[[str], None]) -> None:
    """What each kind of group costs on the held-out samples, rounded to nearest and as it was chosen, and all of it."""
    by_group: dict[str, list[Gain]] = defaultdict(list)
    for gain in (gain for layer in gains for gain in layer):
        by_group[gain.group].append(gain)
    notice("expected KL divergence from the source, in nats a token of the held-out samples:")
    for group, found in by_group.items():
        chosen = Counter(gain.chosen for gain in found)
        said = ", ".join(f"{name} in {count}" for name, count in chosen.most_common())
        notice(f"{group}: {_cost(found)} ({said} of {len(found)} layers)")
    notice(f"together: {_cost([gain for found in by_group.values() for gain in found])}")


def _cost(gains: Sequence[Gain]) -> str:
    return f"{sum(gain.error for gain in gains):.5f}, rounded to nearest {sum(gain.rtn for gain in gains):.5f}"


def _finished(folder: Path, layers: int) -> dict[str, Finished]:
    paths = [folder / f"layer-{number:05}.safetensors" for number in range(layers)]
    return {spec.name: Finished(path, spec) for path in paths for spec in read_header(path).tensors}


def _record(finished: Mapping[str, Finished], setup: Setup, plan: Plan, kept: Collection[str]) -> dict[str, Any]:
    """What `w8a8.json` says of it: the text, the options, and which tensors are not what rounding would make them."""
    changed = sorted(d.tensor.name for d in plan.decisions if d.quantize and d.tensor.name in finished)
    folded = sorted(d.tensor.name for d in plan.decisions if not d.quantize and d.tensor.name in finished)
    model, norms = setup.model, []
    for number in range(model.count):
        for group in groups_of(setup.checkpoint.config, model.hollow(number)):
            norm = model.tensor(number, f"{group.producer}.weight").name if group.kind == "norm" else ""
            if norm in folded:
                into = [model.tensor(number, f"{path}.weight").name for path in group.consumers]
                norms.append({"name": norm, "offset": group.offset, "into": into})
    return {
        "text": {"name": setup.text.name, "sha256": setup.text.sha256},
        "samples": len(setup.samples),
        "tokens": setup.request.tokens,
        "keep_bf16": setup.request.keep_bf16,
        "kept": sorted(kept),
        "changed": changed,
        "folded": folded,
        "norms": norms,
    }
