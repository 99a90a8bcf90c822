"""Calibrate one decoder layer: choose codes for its weights, and what is folded into its norms.

The groups of `groups.py` are done in the order they run, each on the inputs that the quantized layers and groups before
it produce. A group has up to three candidates:

    rtn          nothing folded, weights rounded to nearest
    smooth       channels rescaled (`smooth.py`), the scales folded into the producer
    smooth+gptq  the same scales, and weights rounded with compensation (`gptq.py`)

The candidate with the smallest error on held-out batches wins, so that no group is worse there than rounded to nearest.
In a mixture of experts, one norm's scales serve the first layers of all experts and those of a shared one. How weights
are rounded is decided for each expert by its own tokens (`tokens.py`); one that sees too few of them is rounded to
nearest. Weights are looked at one expert at a time.

The error is the KL divergence that quantizing the group costs, in nats per token (`costs.py`): errors can be compared
between groups and between layers, and their sum is about the error of the whole model.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor, nn

from w8a8.recipes import RecipeName, folding, smooth
from w8a8.recipes.batches import JUDGING, SEARCHING, Batch, Known, known_costs
from w8a8.recipes.costs import Cost, place_of
from w8a8.recipes.folding import expand, heads_of, shared_copy
from w8a8.recipes.gptq import Codes, compensated, compensation, nearest
from w8a8.recipes.groups import Group
from w8a8.recipes.state import LayerState, int8_linear, run_as
from w8a8.recipes.tokens import CHUNK, AllTokens, ExpertTokens, Routed, Tokens
from w8a8.runtime.experts import LAYER
from w8a8.runtime.samples import HERE, Hands

CANDIDATES: Mapping[RecipeName, tuple[str, ...]] = {
    "rtn": ("rtn",),
    "smooth": ("rtn", "smooth"),
    "smooth+gptq": ("rtn", "smooth+gptq"),
    "rotate+smooth+gptq": ("rtn", "smooth+gptq"),
    "auto": ("rtn", "smooth", "smooth+gptq"),
}
SAMPLED = 2048
"""Number of tokens that scales are searched on, spread evenly over those whose costs are known."""


@dataclass(frozen=True, slots=True)
class Gain:
    """Errors of a group, or of one expert's part, on held-out batches, in nats per token: rounded to nearest (`rtn`),
    and as `chosen`.

    `paths` are the linear layers; `few` says that this expert saw too few tokens.
    """

    group: str
    rtn: float
    error: float
    chosen: str
    paths: tuple[str, ...] = ()
    few: bool = False


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
    known, routed, gains = known_costs(groups, batches, row_costs), dict[str, Routed](), list[Gain]()
    with hands.placed(shared_copy(layer), batches) as placed:
        state = LayerState(placed, dtype)
        for group in groups:
            parts = _tokens(state, group, known, routed)
            gains += _calibrate_group(state, group, recipe, known, parts)
    return LayerResult(state.tensors, tuple(gains))


def quantized(layer: nn.Module, result: LayerResult, paths: Iterable[str] | None = None) -> nn.Module:
    """The layer as it will run: linear layers in INT8, those of `paths` or all, and what was folded into the rest.

    What is unchanged is shared with `layer`.
    """
    made = shared_copy(layer)
    every = [path for path, module in layer.named_modules() if isinstance(module, nn.Linear)]
    for path in every if paths is None else paths:
        codes = result.tensors.get(f"{path}.weight")
        run_as(made, path, codes if isinstance(codes, Codes) else None)
    folding.put(made, {name: value.float() for name, value in result.tensors.items() if isinstance(value, Tensor)})
    return made


# --- one group ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way to quantize linear layers that read the same tokens: their weights, and the error in nats per token."""

    name: str
    weights: tuple[Codes, ...]
    error: float


def _tokens(state: LayerState, group: Group, known: Known, routed: dict[str, Routed]) -> list[Tokens]:
    """What the group's consumers read, those together that read the same tokens: all others, and each expert's."""
    others: list[str] = []
    experts: dict[tuple[str, int, bool], list[str]] = defaultdict(list)
    for path in group.consumers:
        if found := LAYER.fullmatch(path):
            experts[found["place"], int(found["number"]), found["part"] == "down_proj"].append(path)
        else:
            others.append(path)
    made: list[Tokens] = [AllTokens(state, others[0], others, known)] if others else []
    for (place, number, inner), paths in experts.items():
        if place not in routed:
            routed[place] = Routed.of(state, place, paths[0])
        made.append(ExpertTokens(state, place, number, paths, known, routed[place], inner))
    return made


def _calibrate_group(
    state: LayerState, group: Group, recipe: RecipeName, known: Known, parts: Sequence[Tokens]
) -> list[Gain]:
    """Choose scales for a group, and for each of its parts the best candidate; make them part of `state`."""
    names, scales, by_channel = CANDIDATES[recipe][1:], None, None
    if names and group.producer is not None and not all(part.few for part in parts):
        scales = _scales(state, group, known, parts)
        by_channel = expand(scales, heads_of(state.layer, group))
    # 1) Each part rounded to nearest, and as well as it can be with the scales that all share
    rtn, best = [], []
    for part in parts:
        first, *others = _candidates(state, part, names, by_channel, len(known[JUDGING][part.paths[0]].token))
        rtn.append(first.error)
        best.append(min(others if scales is not None else [first, *others], key=attrgetter("error")))
    # 2) With the scales, or without
    better = sum(each.error for each in best) < sum(rtn)
    chosen = best if better else [Candidate("rtn", (), error) for error in rtn]
    weights = {
        path: codes
        for part, each in zip(parts, chosen, strict=True)
        if each.name != "rtn"
        for path, codes in zip(part.paths, each.weights, strict=True)
    }
    state.take(group, scales if better else None, weights)
    gains = []
    for part, error, each in zip(parts, rtn, chosen, strict=True):
        name = group.name
        if isinstance(part, ExpertTokens):
            name = f"experts' {name}"
            if better and by_channel is not None and not part.inner:
                part.routed.by_channel = by_channel
        gains.append(Gain(name, error, each.error, each.name, tuple(part.paths), bool(part.few)))
    return gains


def _candidates(
    state: LayerState, part: Tokens, names: Sequence[str], by_channel: Tensor | None, text: int
) -> Iterator[Candidate]:
    """Make the candidates of the recipe, rounding to nearest first; their errors are sums over `text` tokens."""
    weights = [state.weight(path) for path in part.paths]
    inputs, known = part.inputs(JUDGING), part.costs(JUDGING)
    costs = [known[path] for path in part.paths]

    def candidate(name: str, codes: Iterable[Codes], scales: Tensor | float) -> Candidate:
        made = tuple(codes)
        return Candidate(name, made, _error(made, scales, inputs, weights, costs) / text)

    yield candidate("rtn", map(nearest, weights), 1.0)
    scales = 1.0 if by_channel is None else by_channel
    if by_channel is not None and ("smooth" in names or part.few is not None):
        yield candidate("smooth", (nearest(weight * scales) for weight in weights), scales)
    if "smooth+gptq" in names and not part.few:
        by = compensation(part.hessian(scales))
        yield candidate("smooth+gptq", (compensated(weight * scales, by) for weight in weights), scales)


def _scales(state: LayerState, group: Group, known: Known, parts: Sequence[Tokens]) -> Tensor:
    """Search a group's scales on a sample of the tokens whose costs are known."""
    place = next((place_of(path) for path in group.consumers if LAYER.fullmatch(path)), group.consumers[0])
    together = parts[0] if len(parts) == 1 else AllTokens(state, place, group.consumers, known)
    inputs, costs = together.inputs(SEARCHING), together.costs(SEARCHING)
    token_cost = Cost.joined([costs[path] for path in group.consumers]).token
    weights = smooth.Weights.of(
        ((state.weight(path), costs[path].row) for path in group.consumers),
        sum(len(costs[path].row) for path in group.consumers),
    )
    sample = torch.linspace(0, len(inputs) - 1, min(len(inputs), SAMPLED)).round().long()
    problem = smooth.Problem(inputs[sample].float(), weights, token_cost[sample], heads_of(state.layer, group))
    return folding.storable(state.layer, group, smooth.search(problem), state.dtype)


def _error(
    codes: Sequence[Codes],
    by_channel: Tensor | float,
    held_out: Tensor,
    weights: Sequence[Tensor],
    costs: Sequence[Cost],
) -> float:
    """The error of quantized weights on the inputs `held_out` [tokens, in], divided by `by_channel`, in nats."""
    total = 0.0
    if not len(held_out):  # none of them reached this expert
        return total
    for own, weight, cost in zip(codes, weights, costs, strict=True):
        linear = int8_linear(own, None)
        for inputs, token in zip(held_out.split(CHUNK), cost.token.split(CHUNK), strict=True):
            inputs = inputs.float()
            missed = linear(inputs / by_channel) - inputs @ weight.T
            total += float(token @ (missed.square() @ cost.row))
    return total
