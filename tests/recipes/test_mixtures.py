"""Mixtures of experts: folding changes nothing, an expert's costs are those of its own tokens, and few tokens round."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.runtime.moe import HIDDEN, make
from w8a8.checkpoint import Checkpoint
from w8a8.plan.viewing import view_of
from w8a8.recipes import costs
from w8a8.recipes.batches import JUDGING, SEARCHING, TRAINING, Batch, known_costs
from w8a8.recipes.costs import Cost, place_of, squares
from w8a8.recipes.folding import channels_of, divide, expand, heads_of, multiply, storable
from w8a8.recipes.groups import Group, groups_of
from w8a8.recipes.layer import Gain, LayerResult, calibrate_layer, quantized
from w8a8.recipes.state import LayerState
from w8a8.recipes.tokens import FEW, ExpertTokens, Routed
from w8a8.runtime.experts import LAYER, Experts
from w8a8.runtime.samples import HERE
from w8a8.runtime.streamed import StreamedModel, forward

pytestmark = pytest.mark.slow

FAMILIES = ("qwen3_moe", "mixtral", "qwen2_moe", "olmoe", "deepseek_v2", "deepseek_v3", "granitemoe", "gemma4")
TOKENS = 60
KWARGS: dict[int, list[dict[str, Any]]] = {}
"""What the layers of each model are called with, besides states, when it reads so many tokens."""
LAYER_NUMBER = 1
"""The layer that has experts in every family; in some the first has none."""


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> StreamedModel:
    return open_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> StreamedModel:
    return open_model("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe"))


def open_model(family: str, folder: Path) -> StreamedModel:
    model = StreamedModel(family, view_of(Checkpoint.open(make(folder, family))), torch.float32, room=2**40)
    KWARGS[id(model)] = model.embed([n * 7 % 128 for n in range(TOKENS)])[1]  # before any layer has its weights
    return model


def config_of(model: StreamedModel) -> dict[str, Any]:
    found: dict[str, Any] = model.model.config.to_dict()
    return found


def inputs_of(model: StreamedModel, number: int) -> tuple[Tensor, dict[str, Any]]:
    """Random states for a layer, one channel of them loud, and its other arguments."""
    states = torch.randn(1, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(number))
    states[..., 5] *= 20
    return states, KWARGS[id(model)][number]


def roughened(layer: nn.Module) -> nn.Module:
    """The layer with random norms, as they lie in a checkpoint."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in layer.named_parameters():
        if parameter.ndim == 1 and "norm" in name:
            drawn = parameter + torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.data = drawn.to(torch.bfloat16).float()
    return layer


def fold(layer: nn.Module, group: Group, scales: Tensor, dtype: torch.dtype, *, undone: bool = True) -> None:
    divide(layer, group, scales, dtype)
    if undone:
        by_channel = expand(scales, heads_of(layer, group))
        multiply(layer, group.readers, by_channel, dtype)
        for path in group.consumers:
            linear = layer.get_submodule(path)
            linear.weight = nn.Parameter(linear.weight * by_channel, requires_grad=False)


def in_float64(layer: nn.Module, states: Tensor, kwargs: dict[str, Any]) -> Tensor:
    def wide(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(wide, value))
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    made: nn.Module = copy.deepcopy(layer).double()
    with torch.no_grad():
        return forward(made, states.double(), {name: wide(value) for name, value in kwargs.items()})


def powers(layer: nn.Module, group: Group) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return 2.0 ** torch.randint(-3, 4, (channels_of(layer, group),), generator=generator)


def test_folding_powers_of_two_changes_nothing_in_float64(model: StreamedModel) -> None:
    for number in range(model.count):
        with model.layer(number) as layer:
            states, kwargs = inputs_of(model, number)
            roughened(layer)
            before = in_float64(layer, states, kwargs)
            groups = groups_of(config_of(model), layer)
            assert number != LAYER_NUMBER or any(LAYER.fullmatch(path) for group in groups for path in group.consumers)
            for group in groups:
                if group.producer is not None:
                    fold(layer, group, powers(layer, group), torch.bfloat16)
            after = in_float64(layer, states, kwargs)
        assert (after - before).abs().max() < 1e-9 * before.abs().max()


def test_folding_any_scales_leaves_the_states(model: StreamedModel) -> None:
    with model.layer(LAYER_NUMBER) as layer:
        states, kwargs = inputs_of(model, LAYER_NUMBER)
        before = forward(roughened(layer), states, kwargs)
        for group in groups_of(config_of(model), layer):
            if group.producer is not None:
                drawn = torch.randn(channels_of(layer, group), generator=torch.Generator().manual_seed(1)).exp()
                fold(layer, group, storable(layer, group, drawn, torch.float32), torch.float32)
        after = forward(layer, states, kwargs)
    assert (after - before).abs().max() < 1e-4 * before.abs().max()


def test_dividing_alone_changes_the_states(model: StreamedModel) -> None:
    """In every group whose experts see a token: else the tests above could not fail."""
    with model.layer(LAYER_NUMBER) as layer:
        states, kwargs = inputs_of(model, LAYER_NUMBER)
        before = forward(roughened(layer), states, kwargs)
        changing = 0
        groups = [group for group in groups_of(config_of(model), layer) if group.producer is not None]
        for group in groups:
            changed = copy.deepcopy(layer)
            fold(changed, group, powers(layer, group), torch.float32, undone=False)
            changing += bool((forward(changed, states, kwargs) - before).abs().max() > 1e-3 * before.abs().max())
        experts = sum(group.kind == "linear" and bool(LAYER.fullmatch(group.consumers[0])) for group in groups)
    assert changing > len(groups) - experts
    assert experts == 4


def test_a_router_reads_the_rounded_norm_and_chooses_as_before_but_for_rounding(qwen3: StreamedModel) -> None:
    """Where it chooses others, their scores were nearer to each other than BF16 tells apart."""
    chosen: list[Tensor] = []
    with qwen3.layer(LAYER_NUMBER) as layer:
        states, kwargs = inputs_of(qwen3, LAYER_NUMBER)
        hook = layer.mlp.experts.register_forward_pre_hook(lambda _m, given: chosen.append(given[1].sort().values))
        read: list[Tensor] = []
        seen = layer.mlp.gate.register_forward_pre_hook(lambda _m, given: read.append(given[0]))
        weight = layer.mlp.gate.weight.clone()
        with hook, seen:
            forward(roughened(layer), states, kwargs)
            group = next(g for g in groups_of(config_of(qwen3), layer) if g.name == "gate/up")
            assert group.readers == ("mlp.gate",)
            drawn = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(2)).exp()
            scales = storable(layer, group, drawn, torch.bfloat16)
            fold(layer, group, scales, torch.bfloat16)
            forward(layer, states, kwargs)
            assert torch.equal(layer.mlp.gate.weight, (weight * scales).to(torch.bfloat16).float())
    scores, noise = read[0] @ weight.T, (read[0].abs() @ weight.abs().T).amax(1) * 2**-8
    best = scores.topk(3).values
    flipped = (chosen[0] != chosen[1]).any(1)
    assert flipped.float().mean() < 0.05
    assert ((best[:, 1] - best[:, 2])[flipped] < noise[flipped]).all()


# --- what calibration knows of experts ------------------------------------------------------------------------------


def batches(model: StreamedModel, layer: nn.Module, *, count: int = 12) -> tuple[list[Batch], dict[str, Tensor]]:
    """Random inputs of the layer, every fourth held out, and the costs of rows, as if only what leaves it mattered."""
    generator = torch.Generator().manual_seed(5)
    groups = groups_of(config_of(model), layer)
    paths = [path for group in groups for path in group.consumers]
    watched = [*dict.fromkeys([*map(place_of, paths), *paths])]
    _, kwargs = inputs_of(model, LAYER_NUMBER)
    states, parts = [], []
    for _ in range(count):
        states.append(torch.randn(1, TOKENS, HIDDEN, generator=generator))
        states[-1][..., 5::16] *= 30
        direction = torch.randn(states[-1].shape, generator=generator) / forward(layer, states[-1], kwargs).norm()
        _, gradients = costs.backwards(layer, watched, states[-1], kwargs, direction)[:2]
        parts.append({path: squares(gradient) for path, gradient in gradients.items()})
    measured = Cost.by_path(parts, paths)
    tokens = {path: cost.token.split(TOKENS) for path, cost in measured.items()}
    made = [Batch(each, kwargs, n % 4 == 3, {path: tokens[path][n] for path in paths}) for n, each in enumerate(states)]
    return made, {path: cost.row for path, cost in measured.items()}


def test_an_experts_costs_are_those_of_its_own_tokens(model: StreamedModel) -> None:
    """They sum to what half the squared gradients by its outputs do, and are proportional to these, token by token."""
    with model.layer(LAYER_NUMBER) as layer:
        given, rows = batches(model, layer)
        known = known_costs(groups_of(config_of(model), layer), given, rows)
        [place] = {match["place"] for path in rows if (match := LAYER.fullmatch(path))}
        with HERE.placed(layer, given) as placed:
            state = LayerState(placed, torch.float32)
            routed = Routed.of(state, place, f"{place}.down_proj.0")
            experts = [
                ExpertTokens(state, place, number, [f"{place}.down_proj.{number}"], known, routed, inner=True)
                for number in range(4)
            ]
            text = int(routed.uses[SEARCHING].sum()) + int(routed.uses[JUDGING].sum())
            assert text == len(given) * TOKENS
            for expert in experts:
                [path] = expert.paths
                found = [expert.costs(use)[path].token for use in (SEARCHING, JUDGING)]
                assert float(torch.cat(found).detach().sum()) == pytest.approx(text, rel=1e-4)
                assert [len(each) for each in found] == [len(expert.inputs(use)) for use in (SEARCHING, JUDGING)]
            assert sum(len(expert.inputs(TRAINING)) for expert in experts) == 2 * int(routed.uses[TRAINING].sum())
            # What a layer of its own would be found to cost, with the gradients of the first batch
            direction = torch.randn(given[0].hidden.shape, generator=torch.Generator().manual_seed(6))
            paths = [place, *(f"{place}.down_proj.{number}" for number in range(4))]
            by_output = costs.backwards(layer, paths, given[0].hidden, given[0].kwargs, direction)[1]
            for number, path in enumerate(paths[1:]):
                tokens, places = (routed.chosen[:TOKENS] == number).nonzero(as_tuple=True)
                shares = routed.weights[tokens, places]
                expected = by_output[place].square().sum(1)[tokens] * shares.square()
                if not getattr(layer.get_submodule(place), "post_expert_norm", None):
                    assert torch.allclose(by_output[path].square().sum(1), expected, rtol=1e-3, atol=1e-12)


def calibrated(model: StreamedModel, layer: nn.Module, recipe: Any, given: Any) -> LayerResult:
    groups = groups_of(config_of(model), layer)
    return calibrate_layer(layer, groups, given[0], given[1], recipe, torch.bfloat16)


def error(layer: nn.Module, made: nn.Module, given: list[Batch]) -> float:
    """That of what leaves `made`, whose experts are sent the tokens that those of `layer` are: a token that is sent
    elsewhere, whatever for, is further off than any rounding takes it."""
    [place] = {path for path, module in layer.named_modules() if isinstance(module, Experts)}
    routes: list[tuple[Tensor, ...]] = []
    total = 0.0
    for batch in given:
        if batch.held_out:
            with layer.get_submodule(place).register_forward_pre_hook(lambda _m, read: routes.append(read[1:])):
                before = forward(layer, batch.hidden, batch.kwargs)
            with made.get_submodule(place).register_forward_pre_hook(lambda _m, read: (read[0], *routes.pop())):
                after = forward(made, batch.hidden, batch.kwargs)
            total += float((after - before).square().sum() / before.square().sum())
    return total


def of_experts(result: LayerResult) -> Iterator[Gain]:
    return (gain for gain in result.gains if LAYER.fullmatch(gain.paths[0]))


@torch.no_grad()  # type: ignore[untyped-decorator]
def test_recipes_lower_the_error_of_a_layer_with_outliers(model: StreamedModel) -> None:
    with model.layer(LAYER_NUMBER) as layer:
        given = batches(model, layer)
        results = {name: calibrated(model, layer, name, given) for name in ("rtn", "smooth", "smooth+gptq")}
        ours = [path for group in groups_of(config_of(model), layer) for path in group.consumers]
        errors = {name: error(layer, quantized(layer, made, ours), given[0]) for name, made in results.items()}
    assert errors["smooth+gptq"] < errors["smooth"] < errors["rtn"]
    assert errors["smooth+gptq"] < 0.7 * errors["rtn"]
    best = [*of_experts(results["smooth+gptq"])]
    assert sum(gain.error for gain in best) < 0.7 * sum(gain.rtn for gain in best)
    assert {gain.group for gain in best} == {"experts' gate/up", "experts' down"}
    assert len(best) == 8


@torch.no_grad()  # type: ignore[untyped-decorator]
def test_an_expert_that_few_tokens_reach_is_rounded_to_nearest(qwen3: StreamedModel) -> None:
    with qwen3.layer(LAYER_NUMBER) as layer:
        given = batches(qwen3, layer)
        few = calibrated(qwen3, layer, "smooth+gptq", (given[0][:4], given[1]))
        seen = calibrated(qwen3, layer, "smooth+gptq", given)
    short = [gain for gain in of_experts(few) if gain.few]
    assert short  # one of four that share two experts' worth of 60 tokens has fewer than 32
    assert {gain.chosen for gain in short} <= {"rtn", "smooth"}
    assert len(short) > sum(gain.few for gain in of_experts(seen))
    assert FEW == 32
