"""A pass over the layers: each is calibrated on the states that the quantized layers before it produce.

For each decoder layer, its weights are read, the recipe chooses codes and foldings on the states that enter it, and the
states that leave the quantized layer are written for the next one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from w8a8.calibrate.activations import Activations, held_out
from w8a8.calibrate.costs import MeasuredCosts
from w8a8.calibrate.journal import LayerJournal
from w8a8.calibrate.setup import Setup
from w8a8.errors import NonFiniteWeightError
from w8a8.plan import Plan, module_name, scale_name
from w8a8.recipes.batches import Batch
from w8a8.recipes.gptq import Codes
from w8a8.recipes.groups import Group
from w8a8.recipes.layer import Gain, LayerResult, calibrate_layer, quantized
from w8a8.runtime.calls import filled
from w8a8.runtime.experts import LAYER
from w8a8.runtime.streamed import DTYPES, StreamedModel, forward_block
from w8a8.runtime.unread import Unread


def calibrate_layers(
    folder: Path, plan: Plan, setup: Setup, costs: MeasuredCosts, done: Callable[[int], None]
) -> LayerJournal:
    """Calibrate all layers, or those that an interrupted run left; return the journal, which then has all layers.

    `done` is called with the number of layers just finished. Raises DiskFullError, UnwritableError,
    NonFiniteWeightError.
    """
    model, every = setup.model, range(len(setup.samples))
    # 1) Go on where an interrupted run was, or begin with the embedded samples
    journal = LayerJournal(folder, setup.job(plan))
    if journal.lost:
        setup.notice(f"an interrupted calibration cannot be gone on with ({journal.lost}); starting over")
    if not journal.begun:
        Activations(journal.states(0)).write(setup.embedded(every))
        journal.begin()
    elif journal.gains:
        setup.notice(f"resuming: {len(journal.gains)} of {model.count} layers are calibrated already")
        done(len(journal.gains))
    # 2) Calibrate one layer after the other
    chosen = frozenset(module_name(d.tensor.name) for d in plan.decisions if d.quantize)
    this = Pass(setup, costs, chosen, journal)
    for number in range(len(journal.gains), model.count):
        journal.record(calibrate_one(number, this))
        done(1)
    return journal


@dataclass(frozen=True, slots=True)
class Pass:
    """What the layers of a pass share; `chosen` are the modules to quantize, by their names in the checkpoint."""

    setup: Setup
    costs: MeasuredCosts
    chosen: frozenset[str]
    journal: LayerJournal

    def states(self, number: int) -> Activations:
        """The states that enter a layer."""
        return Activations(self.journal.states(number))

    def batches(self, number: int) -> "Batches":
        """The samples as they enter a layer."""
        token_costs = self.costs.token_costs(number, self.setup.model.device)
        return Batches(self.setup, number, self.states(number), token_costs)


@dataclass(frozen=True, slots=True)
class Batches:
    """The samples as they enter a layer, one per batch; they can be read repeatedly.

    `token_costs` has the costs of errors by token for some samples, by their numbers.
    """

    setup: Setup
    layer: int
    entering: Activations
    token_costs: Mapping[int, Mapping[str, Tensor]]

    def __iter__(self) -> Iterator[Batch]:
        every = range(len(self.setup.samples))
        apart = held_out(len(every))
        for number, call in enumerate(self.setup.calls(self.layer, self.entering, every)):
            kwargs = filled(call.kwargs, call.states.left)
            yield Batch(call.states.hidden, kwargs, apart[number], self.token_costs.get(number))


@torch.no_grad()  # type: ignore[untyped-decorator]
def calibrate_one(number: int, this: Pass) -> tuple[Gain, ...]:
    """Calibrate one layer: write its finished tensors, and the states that leave it; return its groups' gains."""
    setup, model, batches = this.setup, this.setup.model, this.batches(number)
    with model.layer(number) as layer:
        # 1) Which of its linear layers are quantized
        _check_finite(number, layer, model)
        linear = {path for path, module in layer.named_modules() if isinstance(module, nn.Linear)}
        ours = {path for path in linear if this.chosen.issuperset(_names(model, number, path))}
        # 2) Choose codes and foldings
        groups = _usable(setup.groups[number], ours)
        dtype = DTYPES[setup.weight(number, groups[0].consumers[0]).dtype] if groups else torch.float32
        row_costs = this.costs.row_costs(number, model.device)
        result = calibrate_layer(layer, groups, batches, row_costs, setup.request.recipe, dtype, setup.hands)
        this.journal.store(save(_tensors(number, result, model)))
        # 3) Run the layer as it will run
        made = quantized(layer, result, ours)
        calls = setup.calls(number, this.states(number), range(len(setup.samples)))
        with setup.hands.placed(made, calls) as placed:
            this.states(number + 1).write(chain.from_iterable(placed.each(forward_block)))
    return result.gains


def _names(model: StreamedModel, number: int, path: str) -> set[str]:
    """The modules of the checkpoint that hold the weight of the linear layer `path`."""
    return {module_name(tensor.name) for tensor in model.sources(number, f"{path}.weight")}


def _check_finite(number: int, layer: nn.Module, model: StreamedModel) -> None:
    unread = ((f"{path}.weight", module) for path, module in layer.named_modules() if isinstance(module, Unread))
    weights = chain(layer.named_parameters(), ((name, module.weight) for name, module in unread))
    for name, value in weights:
        if not value.isfinite().all():
            stored = next((tensor.name for tensor in model.sources(number, name)), name)
            raise NonFiniteWeightError(f"{stored} holds NaN or infinity; repair the source")


def _usable(groups: Sequence[Group], ours: set[str]) -> tuple[Group, ...]:
    """The groups whose consumers are all quantized.

    A linear producer that is not quantized must not be rescaled, and a reader that is quantized could not be. Where a
    norm's experts are quantized, and what else it feeds is not, that is a reader.
    """
    groups = [_with_readers(group, ours) for group in groups]
    return tuple(
        group
        if (group.kind == "norm" or group.producer in ours) and ours.isdisjoint(group.readers)
        else replace(group, producer=None)
        for group in groups
        if ours.issuperset(group.consumers)
    )


def _with_readers(group: Group, ours: set[str]) -> Group:
    """A norm's group of which only others than experts are left in their dtype, with these as readers."""
    left = tuple(path for path in group.consumers if path not in ours)
    routed = any(LAYER.fullmatch(path) for path in group.consumers)
    if group.kind != "norm" or not routed or any(LAYER.fullmatch(path) for path in left):
        return group
    consumers = tuple(path for path in group.consumers if path in ours)
    return replace(group, consumers=consumers, readers=(*group.readers, *left))


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
