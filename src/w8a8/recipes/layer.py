"""Calibrate one decoder layer: choose codes for its weights, and what is folded into its norms.

The groups of `groups.py` are done in the order they run, each on the inputs that the quantized layers and groups before
it produce. A group has up to three candidates:

    rtn          nothing folded, weights rounded to nearest
    smooth       channels rescaled (`smooth.py`), the scales folded into the producer
    smooth+gptq  the same scales, and weights rounded with compensation (`gptq.py`)

The candidate with the smallest error on held-out batches wins, so that no group is worse there than rounded to nearest.
The error is the KL divergence that quantizing the group costs, in nats per token (`costs.py`): errors can be compared
between groups and between layers, and their sum is about the error of the whole model.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from w8a8.recipes import RecipeName, folding, smooth
from w8a8.recipes.costs import Cost
from w8a8.recipes.folding import Heads, expand, heads_of, shared_copy
from w8a8.recipes.gptq import Codes, compensated, compensation, hessian_of, nearest
from w8a8.recipes.groups import Group
from w8a8.runtime.linear import W8A8Linear, frozen
from w8a8.runtime.samples import HERE, Hands, Placed
from w8a8.runtime.streamed import StopForward

CANDIDATES: Mapping[RecipeName, tuple[str, ...]] = {
    "rtn": ("rtn",),
    "smooth": ("rtn", "smooth"),
    "smooth+gptq": ("rtn", "smooth+gptq"),
    "auto": ("rtn", "smooth", "smooth+gptq"),
}
SAMPLED = 2048
"""Number of tokens that scales are searched on, spread evenly over those whose costs are known."""
CHUNK = 2048
"""Number of tokens whose error is computed at once."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Inputs of a decoder layer: the states as the quantized layers before produce them, and the other arguments.

    `hidden` is float32 [samples, tokens, hidden]; `kwargs` are the other arguments of the layer's `forward`. A
    `held_out` batch judges candidates and must not be used to make them. `token_costs` [samples * tokens], by the path
    of a linear layer, says what errors in its outputs cost for each token (`costs.py`); None where that is not known.
    """

    hidden: Tensor
    kwargs: Mapping[str, Any]
    held_out: bool
    token_costs: Mapping[str, Tensor] | None


@dataclass(frozen=True, slots=True)
class Gain:
    """Errors of one group on held-out batches, in nats per token: rounded to nearest (`rtn`), and as `chosen`."""

    group: str
    rtn: float
    error: float
    chosen: str


@dataclass(frozen=True, slots=True)
class LayerResult:
    """A calibrated layer: the tensors that calibration made, by their names inside the layer, and each group's gain.

    A weight of a linear layer without an entry is to be rounded to nearest; any other tensor without one, copied.
    """

    tensors: Mapping[str, Codes | Tensor]
    gains: tuple[Gain, ...]


def calibrate_layer(
    layer: nn.Module,
    groups: Sequence[Group],
    batches: Iterable[Batch],
    row_costs: Mapping[str, Tensor],
    recipe: RecipeName,
    dtype: torch.dtype,
    hands: Hands = HERE,
) -> LayerResult:
    """Choose foldings and codes for `layer`, a decoder layer with float32 weights, and leave the layer as it is.

    `batches` are read several times; some are held out, and for some of either kind the costs of tokens are known.
    `row_costs` [out] are the costs of the outputs of the groups' consumers, by path. `dtype` is the checkpoint's: norms
    and biases are folded to values that it can store, and are returned in it. `hands` run the samples.
    """
    if not groups:
        return LayerResult({}, ())
    costs = ErrorCosts.of(groups, batches, row_costs)
    with hands.placed(shared_copy(layer), batches) as placed:
        state = LayerState(placed, dtype)
        gains = [_calibrate_group(state, group, recipe, costs) for group in groups]
    return LayerResult(state.tensors, tuple(gains))


def quantized(layer: nn.Module, result: LayerResult, paths: Iterable[str] | None = None) -> nn.Module:
    """The layer as it will run: linear layers in INT8, those of `paths` or all, and what was folded into the rest.

    What is unchanged is shared with `layer`.
    """
    made = shared_copy(layer)
    every = [path for path, module in layer.named_modules() if isinstance(module, nn.Linear)]
    for path in every if paths is None else paths:
        _run_as(made, path, result.tensors.get(f"{path}.weight"))
    for name, value in result.tensors.items():
        if isinstance(value, Tensor):
            path, _, parameter = name.rpartition(".")
            setattr(made.get_submodule(path), parameter, frozen(value.float()))
    return made


# --- one group ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way to quantize a group: the scales of its producer's channels (None: all 1), and its consumers' weights."""

    name: str
    scales: Tensor | None
    weights: tuple[Codes, ...]


def _calibrate_group(state: "LayerState", group: Group, recipe: RecipeName, known: "ErrorCosts") -> Gain:
    """Choose the best candidate for one group, and make it part of `state`."""
    weights = [state.weight(path) for path in group.consumers]
    held_out = state.inputs(group, JUDGING)
    costs = [known.judging[path] for path in group.consumers]
    heads = heads_of(state.layer, group)
    found = [
        (_error(candidate, held_out, weights, costs, heads), candidate)
        for candidate in _candidates(state, group, recipe, known, weights)
    ]
    error, best = min(found, key=itemgetter(0))
    state.take(group, best)
    return Gain(group.name, found[0][0], error, best.name)


def _candidates(
    state: "LayerState", group: Group, recipe: RecipeName, known: "ErrorCosts", weights: Sequence[Tensor]
) -> Iterator[Candidate]:
    """Make the candidates of the recipe, rounding to nearest first."""
    yield Candidate("rtn", None, tuple(map(nearest, weights)))
    names = CANDIDATES[recipe][1:]
    scales, by_channel = None, 1.0
    if names and group.producer is not None:
        found = smooth.search(_problem(state, group, known, weights))
        scales = folding.storable(state.layer, group, found, state.dtype)
        by_channel = expand(scales, heads_of(state.layer, group))
    if "smooth" in names:
        yield Candidate("smooth", scales, tuple(nearest(weight * by_channel) for weight in weights))
    if "smooth+gptq" in names:
        by = compensation(state.hessian(group, by_channel))
        yield Candidate("smooth+gptq", scales, tuple(compensated(weight * by_channel, by) for weight in weights))


def _problem(state: "LayerState", group: Group, known: "ErrorCosts", weights: Sequence[Tensor]) -> smooth.Problem:
    """The search for a group's scales, on a sample of the tokens whose costs are known."""
    inputs = state.inputs(group, SEARCHING)
    cost = Cost.joined([known.searching[path] for path in group.consumers])
    sample = torch.linspace(0, len(inputs) - 1, min(len(inputs), SAMPLED)).round().long()
    return smooth.Problem(
        inputs[sample].float(), torch.cat([*weights]), cost.token[sample], cost.row, heads_of(state.layer, group)
    )


def _error(
    candidate: Candidate, held_out: Tensor, weights: Sequence[Tensor], costs: Sequence[Cost], heads: Heads | None
) -> float:
    """The error of a candidate on the inputs `held_out` [tokens, in], in nats per token."""
    by_channel = 1.0 if candidate.scales is None else expand(candidate.scales, heads)
    total = 0.0
    for codes, weight, cost in zip(candidate.weights, weights, costs, strict=True):
        linear = _int8_linear(codes, None)
        for inputs, token in zip(held_out.split(CHUNK), cost.token.split(CHUNK), strict=True):
            inputs = inputs.float()
            missed = linear(inputs / by_channel) - inputs @ weight.T
            total += float(token @ (missed.square() @ cost.row))
    return total / len(held_out)


# --- the layer while it is calibrated -----------------------------------------------------------------------------


class LayerState:
    """A layer in the middle of calibration: finished groups run in INT8, the others as they were.

    `tensors` holds what the finished groups have changed, by the names inside the layer.
    """

    def __init__(self, placed: Placed, dtype: torch.dtype) -> None:
        self.placed, self.layer = placed, placed.layer
        self.dtype = dtype
        self.tensors: dict[str, Codes | Tensor] = {}

    def inputs(self, group: Group, use: "Use") -> Tensor:
        """The inputs [tokens, in] of the group's consumers for the batches of this use, in the checkpoint's dtype."""
        parts = self.placed.each(inputs_of_block, group.consumers[0], self.dtype, use)
        return torch.cat([each for part in parts for each in part])

    def hessian(self, group: Group, by_channel: Tensor | float) -> Tensor:
        """The Hessian [in, in] of the group's consumers (`gptq.py`), over the batches to compensate by."""
        total: Tensor | None = None
        for part in self.placed.each(hessian_of_block, group.consumers[0], self.dtype, by_channel):
            if part is not None:
                total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def weight(self, path: str) -> Tensor:
        """A weight that is not quantized yet, float32 [out, in]."""
        return self.layer.get_submodule(path).weight.detach().float()

    def take(self, group: Group, candidate: Candidate) -> None:
        """Make a candidate part of the layer."""
        if candidate.scales is not None:
            for name, value in folding.divide(self.layer, group, candidate.scales, self.dtype).items():
                path, _, parameter = name.rpartition(".")
                if parameter == "weight_scale":
                    self.tensors[f"{path}.weight"] = Codes(self.layer.get_submodule(path).weight.data, value)
                else:
                    self.tensors[name] = value.to(self.dtype)
            by_channel = expand(candidate.scales, heads_of(self.layer, group))
            for name, value in folding.multiply(self.layer, group.readers, by_channel, self.dtype).items():
                self.tensors[name] = value.to(self.dtype)
        for path, codes in zip(group.consumers, candidate.weights, strict=True):
            _run_as(self.layer, path, codes)
            if candidate.name != "rtn":
                self.tensors[f"{path}.weight"] = codes
        self.placed.changed([*group.consumers, *group.readers, *filter(None, [group.producer])])


def _run_as(layer: nn.Module, path: str, weight: Codes | Tensor | None) -> None:
    """Replace the linear layer `path` by an INT8 one; without `weight`, its own is rounded to nearest."""
    linear = layer.get_submodule(path)
    codes = weight if isinstance(weight, Codes) else nearest(linear.weight.detach().float())
    layer.set_submodule(path, _int8_linear(codes, linear.bias))


def _int8_linear(weight: Codes, bias: Tensor | None) -> W8A8Linear:
    """The INT8 layer that computes with `weight`."""
    rows, columns = weight.codes.shape
    made = W8A8Linear(columns, rows, bias=False, device="meta")
    made.weight = frozen(weight.codes)
    made.weight_scale = frozen(weight.scale)
    made.bias = None if bias is None else frozen(bias)
    return made


# --- which batches serve which purpose ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Use:
    """The batches that are held out, or those that are not; only those with known token costs, if `costed`."""

    held_out: bool
    costed: bool

    def of(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Those of `batches`."""
        for batch in batches:
            if batch.held_out is self.held_out and (batch.token_costs is not None or not self.costed):
                yield batch

    def costs(
        self, batches: Iterable[Batch], paths: Iterable[str], row_costs: Mapping[str, Tensor]
    ) -> Mapping[str, Cost]:
        """The costs of errors in the outputs of the linear layers `paths`, for all tokens."""
        known = [batch.token_costs for batch in self.of(batches) if batch.token_costs is not None]
        return {path: Cost(torch.cat([each[path] for each in known]), row_costs[path]) for path in paths}


TRAINING = Use(held_out=False, costed=False)
SEARCHING = Use(held_out=False, costed=True)
JUDGING = Use(held_out=True, costed=True)
"""The batches to compensate by, to search scales on, and to judge candidates on."""


@dataclass(frozen=True, slots=True)
class ErrorCosts:
    """The costs of errors for the tokens that scales are searched on, and candidates judged on, by path."""

    searching: Mapping[str, Cost]
    judging: Mapping[str, Cost]

    @classmethod
    def of(cls, groups: Sequence[Group], batches: Iterable[Batch], row_costs: Mapping[str, Tensor]) -> "ErrorCosts":
        """The costs are those of the groups' consumers."""
        paths = [path for group in groups for path in group.consumers]
        return cls(*(use.costs(batches, paths, row_costs) for use in (SEARCHING, JUDGING)))


# --- a block of them ----------------------------------------------------------------------------------------------


def _inputs(layer: nn.Module, batches: Iterable[Batch], path: str, dtype: torch.dtype) -> Iterator[Tensor]:
    """The inputs [tokens, in] of the linear layer `path` for each batch, as `dtype`."""
    found: list[Tensor] = []

    def keep(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        found.append(arguments[0].detach().reshape(-1, arguments[0].shape[-1]).to(dtype))
        raise StopForward

    for batch in batches:
        hook = layer.get_submodule(path).register_forward_pre_hook(keep)
        with hook, suppress(StopForward):
            layer(batch.hidden.clone(), **batch.kwargs)
        yield found.pop()


def inputs_of_block(layer: nn.Module, block: Iterable[Batch], path: str, dtype: torch.dtype, use: Use) -> list[Tensor]:
    """The inputs of the linear layer `path` for the batches of a block that have this use."""
    return [*_inputs(layer, use.of(block), path, dtype)]


def hessian_of_block(
    layer: nn.Module, block: Iterable[Batch], path: str, dtype: torch.dtype, by_channel: Tensor | float
) -> Tensor | None:
    """The Hessian by the inputs of the linear layer `path` for the batches of a block; None where none are for it."""
    return hessian_of(_inputs(layer, TRAINING.of(block), path, dtype), by_channel)
