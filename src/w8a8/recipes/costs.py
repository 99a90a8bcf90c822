"""How much an error costs: of a token, of an output channel, for what the next layer reads.

A massive token may have a thousand times the magnitude of the others, and massive channels a hundred times; the norm of
the layer behind takes both away again, by the token's own magnitude and by a small weight. That norm is not at hand
where layers are streamed one by one, but the layer's own first norm is, and much like it. With g its weight, h the
states that leave the decoder layer and a random direction v_t for each token, the gradient of
sum_t v_t · (g h_t) / |g h_t| by a linear layer's outputs y, squared, is on average what an error in y adds to the
relative squared error of what is read (Hutchinson's estimator). It is taken once, for the layer as it was, and kept as
the product of a cost per token and one per output.
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
    relative squared error of what the next layer reads; `token` is 1 on average."""

    token: Tensor
    row: Tensor


def measure(layer: nn.Module, paths: Sequence[str], batches: Iterable[Batch], gain: Tensor) -> Mapping[str, Cost]:
    """The costs of errors in the outputs of the linear layers `paths` of a decoder layer, for all tokens of `batches`.

    `gain` [hidden] is what the next norm weighs the layer's outputs with. One forward and one backward pass.
    """
    found: dict[str, list[tuple[Tensor, Tensor]]] = {path: [] for path in paths}
    generator = torch.Generator().manual_seed(0)
    for batch in batches:
        for path, gradient in _gradients(layer, paths, batch, gain, generator).items():
            squares = gradient.reshape(-1, gradient.shape[-1]).square()
            found[path].append((squares.sum(1), squares.sum(0)))
    return {path: _cost(parts) for path, parts in found.items()}


def _cost(parts: Sequence[tuple[Tensor, Tensor]]) -> Cost:
    token = torch.cat([token for token, _ in parts])
    row = torch.stack([row for _, row in parts]).sum(0) / len(token)
    return Cost(token / token.mean().clamp_min(torch.finfo(torch.float32).tiny), row)


def _gradients(
    layer: nn.Module, paths: Sequence[str], batch: Batch, gain: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = {}
    with torch.enable_grad(), ExitStack() as stack:
        for path in paths:

            def keep(_module: nn.Module, _inputs: Any, output: Tensor, path: str = path) -> None:
                outputs[path] = output

            stack.callback(layer.get_submodule(path).register_forward_hook(keep).remove)
        states = states_of(layer(batch.hidden.detach().clone().requires_grad_(), **batch.kwargs))
        direction = torch.randn(states.shape, generator=generator).to(states.device)
        read = (states.detach() * gain).norm(dim=-1, keepdim=True)
        direction *= gain / read.clamp_min(torch.finfo(torch.float32).tiny)
        return dict(zip(paths, torch.autograd.grad(states, [outputs[path] for path in paths], direction), strict=True))


def states_of(output: Any) -> Tensor:
    """The states that a decoder layer gives: some give them in a tuple."""
    return output[0] if isinstance(output, tuple) else output
