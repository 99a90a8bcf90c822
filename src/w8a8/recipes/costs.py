"""The cost of an error, by token and by output channel, in nats of KL divergence of the model's predictions.

Errors e in the outputs of a linear layer, one vector per token, move the predicted distributions of all tokens that
follow. To second order the divergence, summed over the text, is 1/2 E[(sum_t g_t · e_t)^2], where g are the gradients
by those outputs of a random direction of the logits whose covariance is their Fisher information, diag(p) - p pᵀ:

    u = sqrt(p) z - p (sqrt(p) · z)          z normally distributed, one vector per token

Rounding errors of different channels and tokens are nearly independent, which leaves 1/2 E[g_ti^2] for a squared error
of 1 in channel i of token t. It is measured once, on the model before quantization, by one pass forwards and one
backwards, and kept as the product of a cost per token and a cost per channel. So rounding in one layer can be weighed
against rounding in any other, and massive tokens or channels count only for what they do to the predictions.

An expert of a mixture sees only the tokens that a router sends it, and other ones once the layers before are quantized.
So the costs of tokens are those of errors in what all experts together give, and what is known of each expert's layers
are the costs of its rows: what an error in a row costs on average over all tokens of the text.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from w8a8.runtime.calls import filled, left_by
from w8a8.runtime.experts import LAYER
from w8a8.runtime.streamed import states_of

TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class Cost:
    """The costs of errors in a linear layer's outputs: `token` [tokens] times `row` [out], for a squared error of 1.

    In nats of KL divergence; `token` is 1 on average.
    """

    token: Tensor
    row: Tensor

    @classmethod
    def of(cls, gradients: Sequence[Tensor]) -> "Cost":
        """The cost from the `gradients` [tokens, out] of a random direction."""
        return cls.summed([squares(each) for each in gradients])

    @classmethod
    def summed(cls, parts: Sequence[tuple[Tensor, Tensor]]) -> "Cost":
        """The cost from the `squares` of gradients."""
        token = torch.cat([each for each, _ in parts])
        row = torch.stack([each for _, each in parts]).sum(0) / (2 * len(token))
        return cls(token / token.mean().clamp_min(TINY), row)

    @classmethod
    def by_path(cls, parts: Sequence[Mapping[str, tuple[Tensor, Tensor]]], paths: Sequence[str]) -> dict[str, "Cost"]:
        """The costs in the linear layers `paths`; `parts` have `squares` by path, and by place for experts."""
        token = {place: cls.summed([part[place] for part in parts]).token for place in {*map(place_of, paths)}}
        rows = {path: torch.stack([part[path][1] for part in parts]).sum(0) for path in paths}
        return {path: cls(token[place_of(path)], row / (2 * len(token[place_of(path)]))) for path, row in rows.items()}

    @classmethod
    def joined(cls, costs: Sequence["Cost"]) -> "Cost":
        """The costs of several layers' outputs as those of one layer: token costs are averaged by their rows' costs."""
        rows = torch.cat([each.row for each in costs])
        share = torch.stack([each.row.sum() for each in costs])
        token = (torch.stack([each.token for each in costs]) * share[:, None]).sum(0) / share.sum().clamp_min(1e-30)
        return cls(token, rows)


def place_of(path: str) -> str:
    """Where the costs of a linear layer's tokens are measured: at its own outputs, or at those of all experts."""
    expert = LAYER.fullmatch(path)
    return expert["place"] if expert else path


def squares(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The squares of a gradient [tokens, out], summed for each token [tokens], and for each output [out]."""
    squared = gradient.square()
    return squared.sum(1), squared.sum(0)


def direction(states: Tensor, head: Iterable[Tensor], cap: float | None, generator: torch.Generator) -> Tensor:
    """The gradient [tokens, hidden] of a random direction of the logits by the head's inputs, `states` of that shape.

    `head` yields its weight float32 [vocabulary, hidden] some rows at a time, and is read once: sums over the
    vocabulary are carried relative to the largest logit so far. `cap` is the model's soft cap on logits, if it has one.
    """
    top = torch.full_like(states[:, :1], -torch.inf)
    total, drawn = torch.zeros_like(top), torch.zeros_like(top)
    expected, deviating = torch.zeros_like(states), torch.zeros_like(states)
    for weight in head:
        logits = states @ weight.T
        slope: Tensor | float = 1.0
        if cap:
            logits = (logits / cap).tanh_()
            slope, logits = 1 - logits.square(), logits * cap
        before, top = top, torch.maximum(top, logits.amax(1, keepdim=True))
        shrunk, p = (before - top).exp(), (logits - top).exp()
        z = torch.randn(p.shape, generator=generator).to(p.device).mul_(p.sqrt())
        total = total * shrunk + p.sum(1, keepdim=True)
        drawn = drawn * shrunk.sqrt() + z.sum(1, keepdim=True)
        expected = expected * shrunk + (p * slope) @ weight
        deviating = deviating * shrunk.sqrt() + (z * slope) @ weight
    return deviating / total.sqrt() - drawn / total.sqrt() * (expected / total)


def backwards(
    layer: nn.Module,
    paths: Sequence[str],
    states: Tensor,
    kwargs: Mapping[str, Any],
    gradient: Tensor,
    left: Mapping[str, Tensor] | None = None,
    by_left: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Mapping[str, Tensor], Mapping[str, Tensor]]:
    """Carry a `gradient` [1, tokens, hidden] by the states that leave a decoder layer back through the layer.

    `left` is what layers before have left for it, with which `kwargs` are to be `filled` (`w8a8.runtime.calls`), and
    `by_left` are the gradients by what is left after it. Returns the gradient by the `states` [1, tokens, hidden] that
    enter it, the gradients [tokens, out] by the outputs of its linear layers, by their `paths`, and those by `left`. An
    expert's are those by its own tokens.
    """
    outputs: dict[str, Tensor] = {}
    with torch.enable_grad(), ExitStack() as stack:
        for path in paths:

            def keep(_module: nn.Module, _inputs: Any, output: Tensor, path: str = path) -> None:
                outputs[path] = output

            stack.callback(layer.get_submodule(path).register_forward_hook(keep).remove)
        entering = states.detach().clone().requires_grad_()
        before = {n: t.detach().clone().requires_grad_(t.is_floating_point()) for n, t in (left or {}).items()}
        kwargs = filled(kwargs, before)
        output = layer(entering.clone(), **kwargs)
        after = left_by(output, kwargs)
        ends = {name: each for name, each in (by_left or {}).items() if after[name].requires_grad}
        begins = {name: each for name, each in before.items() if each.requires_grad}
        reached = {path: each for path, each in outputs.items() if each.requires_grad}  # what chooses tokens is not
        inputs = [entering, *begins.values(), *reached.values()]
        leaving = [states_of(output), *(after[name] for name in ends)]
        found = torch.autograd.grad(leaving, inputs, [gradient, *ends.values()], allow_unused=True)
    made = [torch.zeros_like(of) if each is None else each for of, each in zip(inputs, found, strict=True)]
    by_outputs = {path: torch.zeros_like(each).flatten(0, -2) for path, each in outputs.items()}
    by_outputs |= zip(reached, (each.flatten(0, -2) for each in made[1 + len(begins) :]), strict=True)
    idle = {path: states.new_zeros(0, layer.get_submodule(path).out_features) for path in paths if path not in outputs}
    return made[0], by_outputs | idle, dict(zip(begins, made[1:], strict=False))
