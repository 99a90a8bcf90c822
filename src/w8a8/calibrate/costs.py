"""Measure what errors cost, layer by layer: some samples pass through the model once forwards and once backwards.

Forwards, the states that enter each layer are kept in files; backwards, each layer's weights are read again, and its
file is read once and removed. A part of the head's vocabulary is in memory at a time. The costs are then kept in a file
of their own, for a run that goes on after an interruption.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from msgspec import to_builtins
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from w8a8.calibrate.activations import Activations, spread
from w8a8.calibrate.journal import Job
from w8a8.calibrate.request import Progress
from w8a8.calibrate.setup import Setup
from w8a8.plan import Plan
from w8a8.recipes.costs import Cost, backwards, direction, place_of, squares
from w8a8.runtime.calls import Call, States
from w8a8.runtime.streamed import forward_block
from w8a8.storage.folders import keep_only
from w8a8.storage.writer import disk_errors, write_whole

SEARCHED, JUDGED = 6144, 4096
"""Number of tokens whose error cost is measured: for choosing scales, and for judging them."""
VALUES = 2**22
"""Number of logits in memory at once."""

LayerCosts = Mapping[str, Cost]
"""The costs of errors in the outputs of a layer's linear layers, by their paths."""


@dataclass(frozen=True, slots=True)
class MeasuredCosts:
    """The costs of each layer, for the tokens of the samples `numbers`, each of `tokens` tokens."""

    layers: Sequence[LayerCosts]
    numbers: Sequence[int]
    tokens: int

    def token_costs(self, layer: int, device: torch.device) -> Mapping[int, Mapping[str, Tensor]]:
        """By sample and path, the costs of errors of its tokens in a layer."""
        split = {path: cost.token.to(device).split(self.tokens) for path, cost in self.layers[layer].items()}
        return {number: {path: parts[i] for path, parts in split.items()} for i, number in enumerate(self.numbers)}

    def row_costs(self, layer: int, device: torch.device) -> Mapping[str, Tensor]:
        """By path, the costs of errors in the outputs of a layer."""
        return {path: cost.row.to(device) for path, cost in self.layers[layer].items()}


def measured_costs(folder: Path, plan: Plan, setup: Setup, progress: Progress) -> MeasuredCosts:
    """Measure the costs, or read them from `folder` if an earlier run of the same job measured them.

    Raises `DiskFullError` or `UnwritableError`.
    """
    path, job, count = folder / "costs.safetensors", setup.job(plan), setup.model.count
    numbers = probed(len(setup.samples), setup.tokens)
    paths = [[path for group in setup.groups[layer] for path in group.consumers] for layer in range(count)]
    layers = _load(path, paths, job)
    if layers is None:
        again = "again (the file of an interrupted run is damaged, or another job's), " if path.exists() else ""
        setup.notice(f"measuring what errors cost, {again}in one pass forwards and one backwards")
        with progress(count * 2) as done:
            layers = _measure(setup, numbers, paths, folder / "costs", done)
        _store(layers, path, job)
    return MeasuredCosts(layers, numbers, setup.tokens)


def probed(samples: int, tokens: int) -> list[int]:
    """The numbers of the samples whose costs are measured: evenly spread, some that choose and some that judge."""
    return sorted([*spread(samples, SEARCHED // tokens, apart=False), *spread(samples, JUDGED // tokens, apart=True)])


@torch.no_grad()  # type: ignore[untyped-decorator]
def _measure(
    setup: Setup, numbers: Sequence[int], paths: Sequence[Sequence[str]], folder: Path, done: Callable[[int], None]
) -> list[LayerCosts]:
    """Measure the costs in the linear layers `paths` of each layer, for all tokens of the samples `numbers`, in order.

    `done(1)` is called for every layer, forwards and backwards.
    """
    with disk_errors(folder):
        keep_only(folder, ())
    entering = _forwards(setup, numbers, folder, done)
    costs = _backwards(setup, numbers, paths, entering, done)
    folder.rmdir()
    return costs


def _forwards(setup: Setup, numbers: Sequence[int], folder: Path, done: Callable[[int], None]) -> list[Activations]:
    """Write the states that enter every layer, and those that leave the last."""
    model = setup.model
    entering = [Activations(folder / f"states-{layer:05}.bin") for layer in range(model.count + 1)]
    entering[0].write(setup.embedded(numbers))
    for number in range(model.count):
        forwards_through(number, setup, numbers, entering[number], entering[number + 1])
        done(1)
    return entering


def forwards_through(
    number: int, setup: Setup, numbers: Sequence[int], entering: Activations, leaving: Activations
) -> None:
    """Write the states of the samples `numbers` that leave a layer."""
    calls = setup.calls(number, entering, numbers)
    with setup.model.layer(number) as layer, setup.hands.placed(layer, calls) as placed:
        leaving.write(chain.from_iterable(placed.each(forward_block)))


def _backwards(
    setup: Setup,
    numbers: Sequence[int],
    paths: Sequence[Sequence[str]],
    entering: list[Activations],
    done: Callable[[int], None],
) -> list[LayerCosts]:
    """Carry the gradients back from the logits through every layer, and turn those of outputs into costs."""
    model = setup.model
    gradients = at_the_end(setup, numbers, entering.pop())
    costs: list[LayerCosts] = []
    for number in reversed(range(model.count)):
        gradients, cost = backwards_through(number, setup, numbers, paths[number], entering[number], gradients)
        costs.insert(0, cost)
        entering[number].path.unlink()
        done(1)
    return costs


def backwards_through(
    number: int,
    setup: Setup,
    numbers: Sequence[int],
    paths: Sequence[str],
    entering: Activations,
    gradients: Sequence[States],
) -> tuple[list[States], LayerCosts]:
    """Carry the gradients of the samples `numbers` back through a layer: those before it, and its costs."""
    samples = zip(setup.calls(number, entering, numbers), gradients, strict=True)
    with setup.model.layer(number) as layer, setup.hands.placed(layer, samples) as placed:
        watched = [*dict.fromkeys([*map(place_of, paths), *paths])]
        made = [*chain.from_iterable(placed.each(_backward_block, watched))]
    return [gradient for gradient, _ in made], Cost.by_path([squared for _, squared in made], paths)


def _backward_block(
    layer: nn.Module, block: Iterable[tuple[Call, States]], paths: Sequence[str]
) -> list[tuple[States, Mapping[str, tuple[Tensor, Tensor]]]]:
    """Carry gradients back through a layer: of each sample, those by its states, and the squares of those by outputs.

    Gradients have the form of the states that they are by.
    """
    made: list[tuple[States, Mapping[str, tuple[Tensor, Tensor]]]] = []
    for call, gradient in block:
        hidden, left = call.states.hidden, call.states.left
        by_states, outputs, by_left = backwards(layer, paths, hidden, call.kwargs, gradient.hidden, left, gradient.left)
        made.append((States(by_states, by_left), {path: squares(each) for path, each in outputs.items()}))
    return made


def at_the_end(setup: Setup, numbers: Sequence[int], leaving: Activations) -> list[States]:
    """The gradients of a random direction of the logits, by the states after the last layer."""
    model = setup.model
    states = [each.hidden.requires_grad_() for each in leaving.states(model.device)]
    samples = [setup.samples[number] for number in numbers]
    scale = model.logit_scale(samples[0])
    with torch.enable_grad():
        read = scale * torch.cat([model.read_by_head(ids, own) for ids, own in zip(samples, states, strict=True)])
    cap = getattr(model.model.config.get_text_config(decoder=True), "final_logit_softcapping", None)
    generator = torch.Generator().manual_seed(0)
    head = model.head_rows(max(1, VALUES // read[..., 0].numel()))
    by_read = direction(read.detach().flatten(0, -2), head, cap, generator)
    gradients = torch.autograd.grad(read, states, by_read.view_as(read))
    leaving.path.unlink()
    return [*map(States, gradients)]


def _store(costs: Sequence[LayerCosts], path: Path, job: Job) -> None:
    """Write the costs to the file at `path`, whole or not at all."""
    tensors = {}
    for number, layer in enumerate(costs):
        for name, cost in layer.items():
            tensors[f"{number}.{place_of(name)}.token"] = cost.token.cpu()
            tensors[f"{number}.{name}.row"] = cost.row.cpu()
    write_whole(path, save(tensors, _about(tensors, job)), resumable=True)


def _load(path: Path, paths: Sequence[Sequence[str]], job: Job) -> list[LayerCosts] | None:
    """Read the costs that `_store` wrote; None if they are another job's, or not what was written."""
    if not path.is_file():
        return None
    with suppress(OSError, SafetensorError), safe_open(path, "pt") as file:
        names = file.keys()
        tensors = {name: file.get_tensor(name) for name in names}
        if file.metadata() == _about(tensors, job):
            return [
                {
                    each: Cost(tensors[f"{number}.{place_of(each)}.token"], tensors[f"{number}.{each}.row"])
                    for each in layer
                }
                for number, layer in enumerate(paths)
            ]
    return None


def _about(tensors: Mapping[str, Tensor], job: Job) -> dict[str, str]:
    """The metadata of the file: what the costs were measured for, and the hash of all that is in it."""
    return {"job": json.dumps(to_builtins(job)), "sha256": hashlib.sha256(save(dict(tensors))).hexdigest()}
