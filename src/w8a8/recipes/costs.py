"""How much an error costs: of a token, of an output channel, for what leaves the decoder layer.

A massive token may have a thousand times the magnitude of the others, and the norms behind it take that away again; an
output that a later norm or gate quiets can be as wrong as it likes. Both are known from the layer itself: with a random
direction v_t for each token, the gradient of sum_t v_t h_t / |h_t| by a layer's outputs y, squared, is on average what
an error in y adds to the relative squared error of the layer's outputs h (Hutchinson's estimator). It is taken once,
for the layer as it was, and kept as the product of a cost per token and one per output.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from w8a8.recipes.batches import Batch


@dataclass(frozen=True, slots=True)
class Cost:
    """Of a linear layer's outputs: `token` [tokens] times `row` [out] is what a squared error of 1 there adds to the
    relative squared error of the decoder layer's outputs, the mean over tokens."""

    token: Tensor
    row: Tensor


def measure(layer: nn.Module, paths: Sequence[str], batches: Iterable[Batch]) -> Mapping[str, Cost]:
    """The costs of errors in the outputs of the linear layers `paths` of a decoder layer, for all tokens of `batches`.

    One forward and one backward pass.
    """
    found: dict[str, list[tuple[Tensor, Tensor]]] = {path: [] for path in paths}
    generator = torch.Generator().manual_seed(0)
    for batch in batches:
        for path, gradient in _gradients(layer, paths, batch, generator).items():
            squares = gradient.reshape(-1, gradient.shape[-1]).square()
            found[path].append((squares.sum(1), squares.sum(0)))
    return {path: _cost(parts) for path, parts in found.items()}


def _cost(parts: Sequence[tuple[Tensor, Tensor]]) -> Cost:
    token = torch.cat([token for token, _ in parts])
    row = torch.stack([row for _, row in parts]).sum(0) / len(token)
    return Cost(token / token.mean().clamp_min(torch.finfo(torch.float32).tiny), row)


def _gradients(layer: nn.Module, paths: Sequence[str], batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = {}
    with torch.enable_grad(), ExitStack() as stack:
        for path in paths:

            def keep(_module: nn.Module, _inputs: Any, output: Tensor, path: str = path) -> None:
                outputs[path] = output

            stack.callback(layer.get_submodule(path).register_forward_hook(keep).remove)
        states = states_of(layer(batch.hidden.detach().clone().requires_grad_(), **batch.kwargs))
        direction = torch.randn(states.shape, generator=generator).to(states.device)
        direction /= states.detach().norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return dict(zip(paths, torch.autograd.grad(states, [outputs[path] for path in paths], direction), strict=True))


def states_of(output: Any) -> Tensor:
    """The states that a decoder layer gives: some give them in a tuple."""
    return output[0] if isinstance(output, tuple) else output
