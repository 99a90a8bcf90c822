"""One decoder layer, calibrated: which codes its weights get, and what is folded into its norms.

The groups of `groups.py` are done in the order they run, each on the inputs that the layers and groups before it give
once they are quantized. For each there are up to three candidates:

    rtn          nothing folded, weights rounded to nearest
    smooth       channels rescaled (`smooth.py`), the scales folded into the producer
    smooth+gptq  and the weights rounded with compensation (`gptq.py`)

and the one with the smallest error on held-out batches is taken, so that no group comes out worse there than rounded to
nearest. The error is what quantizing the group costs, in nats of KL divergence per token (`costs.py`): it can be
compared between groups, and between layers, and the errors of all add up to about the whole model's.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from w8a8.recipes import folding, smooth
from w8a8.recipes.batches import Batch
from w8a8.recipes.costs import Cost
from w8a8.recipes.folding import Heads, expand, heads_of
from w8a8.recipes.gptq import Compensation, compensation, round_with
from w8a8.recipes.groups import Group
from w8a8.runtime.linear import W8A8Linear, frozen, quantize_tokens

RecipeName = Literal["rtn", "smooth", "smooth+gptq", "auto"]
CANDIDATES: Mapping[RecipeName, tuple[str, ...]] = {
    "rtn": ("rtn",),
    "smooth": ("rtn", "smooth"),
    "smooth+gptq": ("rtn", "smooth+gptq"),
    "auto": ("rtn", "smooth", "smooth+gptq"),
}
SAMPLED = 2048
"""So many of the tokens whose costs are known, spread evenly, are what scales are searched on."""
CHUNK = 2048
"""Tokens that are worked on at once."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a layer is quantized."""

    name: RecipeName = "auto"


@dataclass(frozen=True, slots=True)
class Codes:
    """A quantized weight: int8 [out, in], and float32 [out] scales."""

    codes: Tensor
    scale: Tensor


@dataclass(frozen=True, slots=True)
class Gain:
    """Of one group: its error on held-out batches, in nats per token, rounded to nearest, and as `chosen`."""

    group: str
    rtn: float
    error: float
    chosen: str


@dataclass(frozen=True, slots=True)
class LayerResult:
    """What became of a layer: `tensors` by their names inside it, and what each group gained.

    A weight of a linear layer that has no entry is to be rounded to nearest, and any other tensor to be copied.
    """

    tensors: Mapping[str, Codes | Tensor]
    gains: tuple[Gain, ...]


def calibrate_layer(
    layer: nn.Module,
    groups: Sequence[Group],
    batches: Iterable[Batch],
    row_costs: Mapping[str, Tensor],
    recipe: Recipe,
    dtype: torch.dtype,
) -> LayerResult:
    """Choose foldings and codes for `layer`, a decoder layer with float32 weights, which is left as it is.

    `batches` can be gone through any number of times; some are held out, and of some of either kind the costs of tokens
    are known. `row_costs` [out] are those of the outputs of the groups' consumers. Norms and biases are folded as they
    can be stored in `dtype`, the checkpoint's, and come out in it.
    """
    if not groups:
        return LayerResult({}, ())
    seen = _Seen.of(groups, batches, row_costs)
    work = _Work(layer, dtype)
    gains = [_calibrate_group(work, group, recipe, seen) for group in groups]
    return LayerResult(work.tensors, tuple(gains))


def quantized(layer: nn.Module, result: LayerResult) -> nn.Module:
    """The layer as it will run: all its linear layers in INT8, norms folded. Shares with `layer` what is the same."""
    made = _shared_copy(layer)
    for path in [path for path, module in layer.named_modules() if isinstance(module, nn.Linear)]:
        _run_as(made, path, result.tensors.get(f"{path}.weight"))
    for name, value in result.tensors.items():
        if isinstance(value, Tensor):
            _set(made, name, value)
    return made


# --- one group ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Candidate:
    """What a group may become: the scales of its producer's channels (None: 1), and its consumers' weights."""

    name: str
    scales: Tensor | None
    weights: tuple[Codes, ...]


def _calibrate_group(work: "_Work", group: Group, recipe: Recipe, seen: "_Seen") -> Gain:
    """Choose for one group, and make it so in `work`."""
    held = torch.cat([*work.inputs(group, seen.judging)])
    weights = [work.weight(path) for path in group.consumers]
    cost = [seen.judging_cost[path] for path in group.consumers]
    heads = heads_of(work.layer, group)
    found = [
        (_error(candidate, held, weights, cost, heads), candidate)
        for candidate in _candidates(work, group, recipe, seen, weights)
    ]
    error, best = min(found, key=lambda each: each[0])
    work.take(group, best)
    return Gain(group.name, found[0][0], error, best.name)


def _candidates(
    work: "_Work", group: Group, recipe: Recipe, seen: "_Seen", weights: Sequence[Tensor]
) -> Iterator[_Candidate]:
    """The candidates of the recipe, rounding to nearest first."""
    yield _Candidate("rtn", None, tuple(map(nearest, weights)))
    names = CANDIDATES[recipe.name][1:]
    scales, by_channel = None, 1.0
    if names and group.producer is not None:
        scales = folding.storable(work.layer, group, smooth.search(_problem(work, group, seen, weights)), work.dtype)
        by_channel = expand(scales, heads_of(work.layer, group))
    if "smooth" in names:
        yield _Candidate("smooth", scales, tuple(nearest(weight * by_channel) for weight in weights))
    if "smooth+gptq" in names:
        by = compensation(_hessian(work.inputs(group, seen.training), by_channel))
        yield _Candidate("smooth+gptq", scales, tuple(compensated(weight * by_channel, by) for weight in weights))


def _problem(work: "_Work", group: Group, seen: "_Seen", weights: Sequence[Tensor]) -> smooth.Problem:
    """What the scales are to be good for: a sample of the tokens whose costs are known."""
    inputs = torch.cat([*work.inputs(group, seen.searching)])
    cost = _together([seen.searching_cost[path] for path in group.consumers])
    sample = torch.linspace(0, len(inputs) - 1, min(len(inputs), SAMPLED)).round().long()
    return smooth.Problem(
        inputs[sample].float(), torch.cat([*weights]), cost.token[sample], cost.row, heads_of(work.layer, group)
    )


def _error(
    candidate: _Candidate, held: Tensor, weights: Sequence[Tensor], cost: Sequence[Cost], heads: Heads | None
) -> float:
    """What the candidate costs, in nats per token."""
    by_channel = 1.0 if candidate.scales is None else expand(candidate.scales, heads)
    total = 0.0
    for codes, weight, each in zip(candidate.weights, weights, cost, strict=True):
        linear = int8_linear(codes, None)
        for inputs, token in zip(held.split(CHUNK), each.token.split(CHUNK), strict=True):
            inputs = inputs.float()
            missed = linear(inputs / by_channel) - inputs @ weight.T
            total += float(token @ (missed.square() @ each.row))
    return total / len(held)


def _together(cost: Sequence[Cost]) -> Cost:
    """The costs of several layers' outputs as of one layer's: the token costs are averaged by what they stand for."""
    rows = torch.cat([each.row for each in cost])
    share = torch.stack([each.row.sum() for each in cost])
    token = (torch.stack([each.token for each in cost]) * share[:, None]).sum(0) / share.sum().clamp_min(smooth.TINY)
    return Cost(token, rows)


def _hessian(inputs: Iterable[Tensor], by_channel: Tensor | float) -> Tensor:
    """The sum of x xᵀ [in, in] over tokens x [in] divided `by_channel` [in], as the engine will round them."""
    total: Tensor | None = None
    for chunk in inputs:
        codes, scale = quantize_tokens(chunk.float() / by_channel)
        seen = codes.float().mul_(scale)
        total = seen.T @ seen if total is None else total.addmm_(seen.T, seen)
    return total


def nearest(weight: Tensor) -> Codes:
    """`weight` [out, in] rounded to nearest, with the row's largest weight as code 127."""
    scale = _row_scale(weight)
    return Codes((weight / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale)


def compensated(weight: Tensor, by: Compensation) -> Codes:
    """`weight` [out, in] rounded with compensation, with the scales that rounding to nearest has."""
    scale = _row_scale(weight)
    return Codes(round_with(weight, scale, by), scale)


def _row_scale(weight: Tensor) -> Tensor:
    amax = weight.abs().amax(1)
    return torch.where(amax > 0, (amax / 127).clamp_min(torch.finfo(torch.float32).tiny), 1)


# --- the layer as it is made --------------------------------------------------------------------------------------


class _Work:
    """A layer on its way: the groups that are done run as they will, the others as they were."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        self.layer = _shared_copy(layer)
        self.dtype = dtype
        self.tensors: dict[str, Codes | Tensor] = {}

    def inputs(self, group: Group, batches: Iterable[Batch]) -> Iterator[Tensor]:
        """What the group's consumers read [tokens, in] of each batch, in the checkpoint's dtype."""
        found: list[Tensor] = []

        def keep(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            found.append(arguments[0].detach().reshape(-1, arguments[0].shape[-1]).to(self.dtype))
            raise _SeenError

        for batch in batches:
            hook = self.layer.get_submodule(group.consumers[0]).register_forward_pre_hook(keep)
            with hook, suppress(_SeenError):
                self.layer(batch.hidden.clone(), **batch.kwargs)
            yield found.pop()

    def weight(self, path: str) -> Tensor:
        """A weight that is not quantized yet, float32 [out, in]."""
        return self.layer.get_submodule(path).weight.detach().float()

    def take(self, group: Group, candidate: _Candidate) -> None:
        """Make a candidate part of the layer."""
        if candidate.scales is not None:
            for name, value in folding.divide(self.layer, group, candidate.scales, self.dtype).items():
                if name.endswith(".weight_scale"):
                    name = name.removesuffix("_scale")
                    codes = self.layer.get_submodule(name.removesuffix(".weight")).weight.data
                    self.tensors[name] = Codes(codes, value)
                else:
                    self.tensors[name] = value.to(self.dtype)
        for path, codes in zip(group.consumers, candidate.weights, strict=True):
            _run_as(self.layer, path, codes)
            if candidate.name != "rtn":
                self.tensors[f"{path}.weight"] = codes


class _SeenError(Exception):
    """Ends a forward pass: what was looked for has been seen."""


def int8_linear(weight: Codes, bias: Tensor | None) -> W8A8Linear:
    """The layer that runs `weight`."""
    rows, columns = weight.codes.shape
    made = W8A8Linear(columns, rows, bias=False, device="meta")
    made.weight = frozen(weight.codes)
    made.weight_scale = frozen(weight.scale)
    made.bias = None if bias is None else frozen(bias)
    return made


def _run_as(layer: nn.Module, path: str, weight: Codes | Tensor | None) -> None:
    """Put an INT8 layer in the place of the linear layer `path`, rounded to nearest if no weight is given."""
    linear = layer.get_submodule(path)
    codes = weight if isinstance(weight, Codes) else nearest(linear.weight.detach().float())
    layer.set_submodule(path, int8_linear(codes, linear.bias))


def _set(layer: nn.Module, name: str, value: Tensor) -> None:
    path, _, parameter = name.rpartition(".")
    setattr(layer.get_submodule(path), parameter, frozen(value.to(torch.float32)))


def _shared_copy(layer: nn.Module) -> nn.Module:
    """A copy whose modules can be replaced, with the same parameters and buffers."""
    tensors = [*layer.parameters(), *layer.buffers()]
    return copy.deepcopy(layer, {id(tensor): tensor for tensor in tensors})


# --- which batches are for what -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Some:
    """Those of `batches` that are held out or not, as `apart` says; if `probed`, those whose costs are known alone."""

    batches: Iterable[Batch]
    apart: bool
    probed: bool

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            if batch.held_out is self.apart and (batch.token_costs is not None or not self.probed):
                yield batch

    def costs(self, paths: Iterable[str], row_costs: Mapping[str, Tensor]) -> Mapping[str, Cost]:
        """The costs of errors in the outputs of the linear layers `paths`, for all tokens."""
        known = [batch.token_costs for batch in self if batch.token_costs is not None]
        return {path: Cost(torch.cat([each[path] for each in known]), row_costs[path]) for path in paths}


@dataclass(frozen=True, slots=True)
class _Seen:
    """The batches to choose by, those of them that costs are known for, and those to judge by; and the costs."""

    training: _Some
    searching: _Some
    judging: _Some
    searching_cost: Mapping[str, Cost]
    judging_cost: Mapping[str, Cost]

    @classmethod
    def of(cls, groups: Sequence[Group], batches: Iterable[Batch], row_costs: Mapping[str, Tensor]) -> "_Seen":
        paths = [path for group in groups for path in group.consumers]
        searching, judging = (_Some(batches, apart, probed=True) for apart in (False, True))
        costs = (some.costs(paths, row_costs) for some in (searching, judging))
        return cls(_Some(batches, apart=False, probed=False), searching, judging, *costs)
