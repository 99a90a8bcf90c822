"""What an idea would change in some layers of a model: `python scripts/try_ideas.py MODEL WORK --layers 8,16`.

A recipe takes long to try on a whole model, and most ideas change one kind of group. So only the layers asked for are
looked at, on the states that layers rounded to nearest before them produce. Each idea's error is that of `quantize`,
the expected KL divergence on held-out text. Its two parts are shown as well, of the activations' rounding (with exact
weights) and of the weights' (with exact activations). What pays here is worth trying on a model; what does not is
written down in docs/recipes.md. What errors cost is kept beside WORK for the next run with the same options.

    rtn             rounded to nearest
    smooth+gptq     the recipe
    rotated         the recipe behind a rotation: of what flows from layer to layer (q/k/v, gate/up), of each head (o)
    online          the recipe behind a rotation that an engine would have to compute (down)
    split           1%, 3% and 10% more channels: those that decide most tokens' steps stored twice, at half size (down)
    corrected       the recipe, for the weight that is best behind rounded activations: W E[x x̂ᵀ] (H + damping)⁻¹
"""

import argparse
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from w8a8.plan.rotation import Rotation
from w8a8.quantization import Options, calibrated, prepare
from w8a8.recipes import layer as recipes
from w8a8.recipes import smooth
from w8a8.recipes.batches import JUDGING, SEARCHING, TRAINING, Known, Use
from w8a8.recipes.costs import Cost
from w8a8.recipes.folding import Heads, expand, heads_of
from w8a8.recipes.gptq import Codes, compensated, compensation, hessian_of, nearest
from w8a8.recipes.groups import Group
from w8a8.recipes.layer import Gain
from w8a8.recipes.state import LayerState
from w8a8.recipes.tokens import Tokens
from w8a8.runtime.linear import quantize_tokens

CHUNK = 1024
SAMPLED = 2048
SPLIT = (0.01, 0.03, 0.1)
DAMPING = 0.3
ROUNDS = 16
"""Turns in which channels to split are chosen."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A group's weights [out, in], inputs [tokens, in] by use, and costs by use; `heads` share scales."""

    weights: Sequence[Tensor]
    inputs: Mapping[Use, Tensor]
    costs: Mapping[Use, Sequence[Cost]]
    heads: Heads | None

    def seen(self, inputs: Callable[[Tensor], Tensor], weights: Callable[[Tensor], Tensor]) -> "Problem":
        """The same problem in other coordinates."""
        made = {use: inputs(each) for use, each in self.inputs.items()}
        return Problem([*map(weights, self.weights)], made, self.costs, self.heads)

    def scales(self) -> Tensor:
        """The scales that the recipe finds [in]."""
        costs, inputs = self.costs[SEARCHING], self.inputs[SEARCHING]
        sample = torch.linspace(0, len(inputs) - 1, min(len(inputs), SAMPLED)).round().long()
        pairs = ((weight, cost.row) for weight, cost in zip(self.weights, costs, strict=True))
        weights = smooth.Weights.of(pairs, sum(len(cost.row) for cost in costs))
        found = smooth.search(smooth.Problem(inputs[sample], weights, Cost.joined(costs).token[sample], self.heads))
        return expand(found, self.heads)

    def recipe(self, scales: Tensor | None = None) -> tuple[float, float, float]:
        """The errors of smooth+gptq."""
        by = self.scales() if scales is None else scales
        hessian = hessian_of(self.inputs[TRAINING].split(CHUNK), by)
        assert hessian is not None
        how = compensation(hessian)
        return self.errors([compensated(weight * by, how) for weight in self.weights], by)

    def errors(self, codes: Sequence[Codes], by: Tensor) -> tuple[float, float, float]:
        """The error of quantized weights, and its parts by activations and by weights, in nats per token."""
        whole = of_inputs = of_weights = 0.0
        inputs = self.inputs[JUDGING]
        for own, weight, cost in zip(codes, self.weights, self.costs[JUDGING], strict=True):
            exact, made = weight * by, own.codes.float() * own.scale[:, None]
            for x, token in zip((inputs / by).split(CHUNK), cost.token.split(CHUNK), strict=True):
                rounded, right = _rounded(x), x @ exact.T
                for_all = (rounded @ made.T - right, rounded @ exact.T - right, x @ made.T - right)
                a, b, c = (float(token @ (missed.square() @ cost.row)) for missed in for_all)
                whole, of_inputs, of_weights = whole + a, of_inputs + b, of_weights + c
        return whole / len(inputs), of_inputs / len(inputs), of_weights / len(inputs)


def ideas(problem: Problem, group: Group, gain: Tensor | None) -> Iterator[tuple[str, tuple[float, float, float]]]:
    """Yield the errors of each idea that fits the group; `gain` [in] is the weight of the norm before it."""
    size = problem.weights[0].shape[1]
    one = torch.ones(size)
    yield "rtn", problem.errors([*map(nearest, problem.weights)], one)
    by = problem.scales() if group.producer is not None else one
    yield "smooth+gptq", problem.recipe(by)
    if gain is not None:
        q = _rotation(size)
        yield "rotated", problem.seen(lambda x: x / gain @ q, lambda w: w * gain @ q).recipe()
    elif problem.heads:
        q = torch.block_diag(*[_rotation(problem.heads[2])] * (size // problem.heads[2]))
        yield "rotated", problem.seen(lambda x: x @ q, lambda w: w @ q).recipe()
    else:
        q = _rotation(size)
        yield "online", problem.seen(lambda x: x @ q, lambda w: w @ q).recipe()
        for share in SPLIT:
            copies = _copies(problem, by, int(share * size))
            index = torch.arange(size).repeat_interleave(copies)
            split = problem.seen(lambda x, i=index, n=copies: (x / n)[:, i], lambda w, i=index: w[:, i])  # type: ignore[misc]
            yield f"split {share:.0%}", split.recipe()
    yield "corrected", problem.errors(*_corrected(problem, by))


def _copies(problem: Problem, by: Tensor, more: int) -> Tensor:
    """How often to store each channel [in], `more` in all than once: those whose values decide most tokens' steps."""
    copies = torch.ones(len(by), dtype=torch.long)
    cost, size = Cost.joined(problem.costs[SEARCHING]).token, (problem.inputs[SEARCHING] / by).abs()
    while (left := more - int(copies.sum()) + len(by)) > 0:
        now = size / copies
        decides = torch.zeros(len(by)).index_add_(0, now.argmax(1), cost * now.amax(1).square())
        copies[decides.topk(min(left, -(-more // ROUNDS))).indices] += 1
    return copies


def _corrected(problem: Problem, by: Tensor) -> tuple[list[Codes], Tensor]:
    x = problem.inputs[TRAINING] / by
    rounded = _rounded(x)
    hessian, cross = rounded.T @ rounded, x.T @ rounded
    how, damping = compensation(hessian), DAMPING * hessian.diagonal().mean() * torch.eye(len(by))
    made = [torch.linalg.solve(hessian + damping, (weight * by @ (cross + damping)).T).T for weight in problem.weights]
    return [compensated(weight.contiguous(), how) for weight in made], by


def _rotation(size: int) -> Tensor:
    return torch.from_numpy(Rotation(size).along(np.eye(size, dtype=np.float32)))


def _rounded(x: Tensor) -> Tensor:
    codes, scale = quantize_tokens(x)
    return codes.float() * scale


def main() -> None:
    """Try all ideas on the layers that were asked for, and print a line for each group and idea."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("work", type=Path)
    parser.add_argument("--layers", default="0", help="their numbers, with commas")
    parser.add_argument("--calibration", help="as of `w8a8 quantize`")
    parser.add_argument("--samples", type=int, default=24)
    given = parser.parse_args()
    wanted, done = [int(each) for each in given.layers.split(",")], [0]
    calibrate, begin = recipes._calibrate_group, recipes.calibrate_layer

    def group_(state: LayerState, group: Group, _recipe: str, known: Known, parts: Sequence[Tokens]) -> list[Gain]:
        if done[0] - 1 in wanted and len(parts) == 1:
            part, norm = parts[0], group.producer if group.kind == "norm" else None
            uses = (TRAINING, SEARCHING, JUDGING)
            costs = {use: [part.costs(use)[path] for path in part.paths] for use in uses[1:]}
            inputs = {use: state.inputs(part.paths[0], use).float() for use in uses}
            problem = Problem([*map(state.weight, part.paths)], inputs, costs, heads_of(state.layer, group))
            gain = state.layer.get_submodule(norm).weight.detach().float() + group.offset if norm else None
            for name, parts_ in ideas(problem, group, gain):
                words = "  ".join(f"{1e6 * each:9.2f}" for each in parts_)
                print(f"layer {done[0] - 1:3}  {group.name:10} {name:12} {words}", flush=True)
        return calibrate(state, group, "rtn", known, parts)

    def layer_(*args: object, **kwargs: object) -> object:
        if done[0] > max(wanted):
            raise KeyboardInterrupt
        done[0] += 1
        return begin(*args, **kwargs)  # type: ignore[arg-type]

    shutil.rmtree(given.work.absolute().parent / f".{given.work.name}.w8a8-calibration" / "first", ignore_errors=True)
    print("microNats per token: the error, by activations' rounding alone, by weights' alone")
    options = Options(recipe="smooth+gptq", calibration=given.calibration, samples=given.samples)
    with (
        suppress(KeyboardInterrupt),
        torch.no_grad(),
        mock.patch.object(recipes, "_calibrate_group", group_),
        mock.patch("w8a8.calibrate.layers.calibrate_layer", layer_),
        calibrated(prepare(given.model, options), given.work, overwrite=True),
    ):
        pass


if __name__ == "__main__":
    main()
