"""What errors cost, measured layer by layer: one reading of some samples forwards, and one backwards.

Forwards, the states that enter each layer are kept in files; backwards, each layer's weights are read again, and its
file is read once and removed. Of the head, some rows of the vocabulary are in memory at a time. What was found lies in
a file from then on, for a run that goes on after an interruption.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from w8a8.calibrate.activations import Activations, spread
from w8a8.recipes.costs import Cost, backwards, direction
from w8a8.runtime.streamed import StreamedModel, forward
from w8a8.storage.writer import disk_errors

SEARCHED, JUDGED = 6144, 4096
"""Of so many tokens that choose, and so many that judge, it is known what their errors cost."""
VALUES = 2**22
"""Logits that exist at once."""


@dataclass(frozen=True, slots=True)
class Probe:
    """The samples whose errors' costs are measured: their numbers, their ids, what each layer's forward takes besides,
    and the consumers of each layer's groups."""

    numbers: Sequence[int]
    samples: Sequence[Sequence[int]]
    kwargs: Sequence[Mapping[str, Any]]
    paths: Sequence[Sequence[str]]


def probed(samples: int, tokens: int) -> list[int]:
    """The numbers of the samples whose costs are measured: evenly spread, of those that choose and those that judge."""
    return sorted([*spread(samples, SEARCHED // tokens, apart=False), *spread(samples, JUDGED // tokens, apart=True)])


@torch.no_grad()  # type: ignore[untyped-decorator]
def measure(model: StreamedModel, probe: Probe, folder: Path, done: Callable[[int], None]) -> list[Mapping[str, Cost]]:
    """The costs of errors in the outputs of each layer's consumers, for the tokens of all probed samples, in order.

    `done(1)` is called for every layer, forwards and backwards. Raises the errors of a full disk.
    """
    scratch = folder / "costs"
    with disk_errors(scratch):
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    entering = _forwards(model, probe, scratch, done)
    costs = _backwards(model, probe, entering, done)
    scratch.rmdir()
    return costs


def _forwards(model: StreamedModel, probe: Probe, folder: Path, done: Callable[[int], None]) -> list[Activations]:
    """The states that enter every layer, and those that leave the last."""
    size = model.model.config.get_text_config(decoder=True).hidden_size
    entering = [
        Activations(folder / f"states-{number:05}.bin", len(probe.samples), len(probe.samples[0]), size)
        for number in range(model.count + 1)
    ]
    entering[0].write(model.embed_all(probe.samples, probe.kwargs))
    for number in range(model.count):
        with model.layer(number) as layer:
            states = entering[number].states(model.device)
            entering[number + 1].write(forward(layer, each, probe.kwargs[number]) for each in states)
        done(1)
    return entering


def _backwards(
    model: StreamedModel, probe: Probe, entering: list[Activations], done: Callable[[int], None]
) -> list[Mapping[str, Cost]]:
    gradients = _at_the_end(model, entering.pop())
    costs: list[Mapping[str, Cost]] = []
    for number in reversed(range(model.count)):
        found: dict[str, list[Tensor]] = {path: [] for path in probe.paths[number]}
        with model.layer(number) as layer:
            for i, states in enumerate(entering[number].states(model.device)):
                gradients[i], outputs = backwards(
                    layer, probe.paths[number], states, probe.kwargs[number], gradients[i]
                )
                for path, gradient in outputs.items():
                    found[path].append(gradient)
        costs.insert(0, {path: Cost.of(parts) for path, parts in found.items()})
        entering[number].path.unlink()
        done(1)
    return costs


def _at_the_end(model: StreamedModel, leaving: Activations) -> list[Tensor]:
    """The gradients [1, tokens, hidden], by the states that leave the last layer, of a direction of the logits."""
    states = torch.cat([*leaving.states(model.device)]).requires_grad_()
    with torch.enable_grad():
        read = model.model.get_decoder().norm(states)
    cap = getattr(model.model.config.get_text_config(decoder=True), "final_logit_softcapping", None)
    generator = torch.Generator().manual_seed(0)
    head = model.head_rows(max(1, VALUES // read[..., 0].numel()))
    by_read = direction(read.detach().flatten(0, 1), head, cap, generator)
    (gradient,) = torch.autograd.grad(read, states, by_read.view_as(read))
    leaving.path.unlink()
    return [*gradient.split(1)]


def store(costs: Sequence[Mapping[str, Cost]], path: Path, job: Mapping[str, Any]) -> None:
    """Write them to the file at `path`, whole or not at all. Raises the errors of a full disk."""
    tensors = {}
    for number, layer in enumerate(costs):
        for name, cost in layer.items():
            tensors[f"{number}.{name}.token"], tensors[f"{number}.{name}.row"] = cost.token.cpu(), cost.row.cpu()
    unfinished = path.with_suffix(".tmp")
    with disk_errors(path):
        save_file(tensors, unfinished, {"job": json.dumps(job)})
        unfinished.replace(path)


def load(path: Path, probe: Probe, job: Mapping[str, Any]) -> list[Mapping[str, Cost]] | None:
    """Those stored, unless they are another job's, or not whole."""
    with suppress(OSError, SafetensorError, ValueError), safe_open(path, "pt") as file:
        if json.loads((file.metadata() or {}).get("job", "null")) == job:
            return [
                {
                    name: Cost(*(file.get_tensor(f"{number}.{name}.{part}") for part in ("token", "row")))
                    for name in paths
                }
                for number, paths in enumerate(probe.paths)
            ]
    return None
