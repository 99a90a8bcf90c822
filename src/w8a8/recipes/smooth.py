"""Search scales for a group's channels: its activations are divided by them, and its weights multiplied.

A token x [in] divided by s has the step d(s) = max_j |x_j / s_j| / 127, and rounding makes an error in channel j that
the consumers multiply by s_j w_ij. With independent errors of different channels, the error of the outputs costs

    sum_t cost_t d_t(s)^2  sum_j r(x_tj / (s_j d_t)) s_j^2 C_j          C_j = sum_i cost_i w_ij^2
    + sum_i cost_i e_i(s)^2 / 12  sum_j mean_t(cost_t x_tj^2) / s_j^2   e_i = max_j |w_ij s_j| / 127

The first line is the activations' part, the second the weights'. r(z) = (1 - exp(-12 z^2)) / 12 is a smooth form of the
mean squared error of rounding z: z^2 where z rounds to zero, 1/12 where it does not. Costs weigh the errors of a token
and of an output (`costs.py`). The sum needs no matrix products, only products with vectors, and has a gradient: Adam
minimizes it from the best of SmoothQuant's max|x|^a / max|w|^(1-a) (Xiao et al. 2023, arXiv 2211.10438) over a grid.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from w8a8.recipes.folding import Heads, expand, largest

GRID = tuple(i / 8 for i in range(1, 9))
STEPS = 40
RATE = 0.05
ROWS = 2048
"""Number of rows of the weights whose steps are computed; they stand for all rows."""
CHUNK = 128
"""Number of tokens computed at once, so that they stay in the caches."""
TINY = 1e-30


@dataclass(frozen=True, slots=True)
class Weights:
    """What a search needs of weights [out, in] one below the other: C_j [in] and max|w| [in] of their columns, and the
    squares of some `rows` [rows, in] with the costs [rows] of errors in as many outputs as they stand for."""

    energy: Tensor
    loudest: Tensor
    rows: Tensor
    row_cost: Tensor

    @classmethod
    def of(cls, weights: Iterable[tuple[Tensor, Tensor]], count: int) -> "Weights":
        """Take it from each of `weights` float32 [out, in] with the costs [out] of its outputs, `count` in all.

        Each is looked at once, and let go.
        """
        step, at = -(-count // ROWS), 0
        energy, loudest, whole = torch.zeros(()), torch.zeros(()), torch.zeros(())
        rows, costs = [], []
        for weight, cost in weights:
            chosen = torch.arange(-at % step, len(weight), step, device=weight.device)
            rows.append(weight[chosen].square())
            costs.append(cost[chosen])
            energy = energy.to(weight) + (weight.square() * cost[:, None]).sum(0)
            loudest = torch.maximum(loudest.to(weight), weight.abs().amax(0))
            whole = whole.to(weight) + cost.sum()
            at += len(weight)
        row_cost = torch.cat(costs)
        return cls(energy, loudest, torch.cat(rows), row_cost * (whole / row_cost.sum().clamp_min(TINY)))


@dataclass(frozen=True, slots=True)
class Problem:
    """A search: `inputs` float32 [tokens, in] of a group's consumers, their `weights`, and the costs [tokens] of errors
    in a token. With `heads`, the query heads that share a key-value head share its scales."""

    inputs: Tensor
    weights: Weights
    token_cost: Tensor
    heads: Heads | None = None


def search(problem: Problem) -> Tensor:
    """Find scales for the producer's channels: positive, float32, with a geometric mean of 1."""
    objective = _Objective(problem)
    with torch.no_grad():
        start = min(_starts(problem), key=lambda log: sum(part.item() for part in objective.parts(log)))
    log = start.clone().requires_grad_()
    adam = torch.optim.Adam([log], lr=RATE, betas=(0.9, 0.95))
    best, lowest = start, math.inf
    for step in range(STEPS):
        adam.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        adam.zero_grad()
        value = 0.0
        with torch.enable_grad():
            for part in objective.parts(log):
                part.backward()
                value += part.item()
        if value < lowest:
            best, lowest = log.detach().clone(), value
        adam.step()
    return (best - best.mean()).exp()


def _starts(problem: Problem) -> list[Tensor]:
    """Logarithms of the scales to start from: all 1, and SmoothQuant's over a grid."""
    weighted = problem.inputs.abs() * problem.token_cost.sqrt()[:, None]
    active = largest(weighted.amax(0), problem.heads).clamp_min(TINY).log()
    loud = largest(problem.weights.loudest, problem.heads).clamp_min(TINY).log()
    starts = [a * active - (1 - a) * loud for a in GRID]
    return [torch.zeros_like(active), *(start - start.mean() for start in starts)]


class _Objective:
    """The error per token as a function of the scales' logarithms; the formula is in the head of this file."""

    def __init__(self, problem: Problem) -> None:
        self.heads = problem.heads
        self.squares, self.token_cost = problem.inputs.square(), problem.token_cost / len(problem.inputs)
        self.energy, self.rows = problem.weights.energy, problem.weights.rows
        self.row_cost = problem.weights.row_cost
        self.power = self.token_cost @ self.squares

    def parts(self, log: Tensor) -> Iterator[Tensor]:
        """The terms of the sum: the weights', then the activations', a chunk of tokens at a time."""
        squared = expand(log, self.heads).exp().square()
        row_step = (self.rows * squared).amax(1) / 127**2
        yield (self.row_cost @ row_step) / 12 * (self.power / squared).sum()
        for squares, cost in zip(self.squares.split(CHUNK), self.token_cost.split(CHUNK), strict=True):
            squared = expand(log, self.heads).exp().square()
            scaled = squares / squared
            step = scaled.amax(1).clamp_min(TINY) / 127**2
            kept = torch.expm1(scaled * (-12 / step)[:, None])
            yield -(cost * step) @ (kept @ (squared * self.energy)) / 12
