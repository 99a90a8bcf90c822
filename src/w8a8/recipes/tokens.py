"""Which tokens a linear layer reads: all of them, or, as one of a mixture of experts, those that the router sends it.

For token t, the router's weight r and an expert's output f, errors in f cost r^2 times what errors in the sum of all
experts' outputs cost. So the costs of tokens are known for all experts together (`costs.py`), and each one's own follow
from the router's weights, whichever tokens it is sent once the layers before are quantized.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from w8a8.recipes.batches import JUDGING, SEARCHING, TRAINING, Batch, Known, Use
from w8a8.recipes.costs import TINY, Cost
from w8a8.recipes.gptq import hessian_of
from w8a8.recipes.state import LayerState, read_by

CHUNK = 2048
"""Number of tokens computed at once."""
FEW = 32
"""With fewer tokens to learn from, or fewer to judge by, an expert is rounded to nearest."""


class Tokens(Protocol):
    """What the linear layers `paths` read, which is the same for all of them."""

    @property
    def paths(self) -> Sequence[str]:
        """The layers."""

    @property
    def few(self) -> bool | None:
        """Whether a router sends too few tokens to learn from; None where there is no router."""

    def inputs(self, use: Use) -> Tensor:
        """The inputs [tokens, in] that have this use."""

    def costs(self, use: Use) -> Mapping[str, Cost]:
        """What errors in the layers' outputs cost for these tokens, by path."""

    def hessian(self, by_channel: Tensor | float) -> Tensor:
        """The Hessian [in, in] (`gptq.py`) of the inputs to learn from, divided by `by_channel` [in]."""


@dataclass(frozen=True, slots=True)
class AllTokens:
    """All tokens, as they reach the module `at`."""

    state: LayerState
    at: str
    paths: Sequence[str]
    known: Known
    few: bool | None = None

    def inputs(self, use: Use) -> Tensor:
        """The inputs of the module."""
        return self.state.inputs(self.at, use)

    def costs(self, use: Use) -> Mapping[str, Cost]:
        """The costs as they were measured."""
        return {path: self.known[use][path] for path in self.paths}

    def hessian(self, by_channel: Tensor | float) -> Tensor:
        """The Hessian over all batches that are not held out."""
        return self.state.hessian(self.at, by_channel)


@dataclass(slots=True)
class Routed:
    """What all experts of a layer read, and which of them each token is sent to, in the batches' order.

    `inputs` [tokens, hidden] are in the checkpoint's dtype, and as they were before anything was folded: they are yet
    to be divided by `by_channel` [hidden]. `chosen` [tokens, k] are experts' numbers, `weights` [tokens, k] theirs.
    `cost` [tokens] is what errors in the sum of the experts' outputs cost, where that is known; `uses` says which
    tokens [tokens] those are that have a use.
    """

    inputs: Tensor
    chosen: Tensor
    weights: Tensor
    cost: Tensor
    uses: Mapping[Use, Tensor]
    by_channel: Tensor | float = 1.0
    _sent: dict[int, Mapping[Use, tuple[Tensor, Tensor]]] = field(init=False, default_factory=dict)

    @classmethod
    def of(cls, state: LayerState, place: str, path: str) -> "Routed":
        """What the experts at `place` of a layer read; `path` is one of their layers."""
        found = [each for part in state.placed.each(_routed_of_block, place, path, state.dtype) for each in part]
        inputs, chosen, weights = (torch.cat([each[i] for each in found]) for i in range(3))
        known = [weights.new_zeros(len(own)) if cost is None else cost for own, _, _, cost, _ in found]
        uses = {}
        for use in (TRAINING, SEARCHING, JUDGING):
            has = [
                torch.full((len(own),), use.has(held_out=held_out, costed=cost is not None))
                for own, _, _, cost, held_out in found
            ]
            uses[use] = torch.cat(has).to(inputs.device)
        return cls(inputs, chosen, weights, torch.cat(known), uses)

    def sent_to(self, number: int) -> Mapping[Use, tuple[Tensor, Tensor]]:
        """By use, the numbers of the tokens that an expert is sent, and the router's weights; found once."""
        if number not in self._sent:
            own = self.chosen == number
            places = {use: own & has[:, None] for use, has in self.uses.items()}
            self._sent[number] = {use: (at.nonzero(as_tuple=True)[0], self.weights[at]) for use, at in places.items()}
        return self._sent[number]


@dataclass(frozen=True, slots=True)
class ExpertTokens:
    """The tokens that the router sends one expert, as they reach its first layers, or (`inner`) its `down_proj`."""

    state: LayerState
    place: str
    number: int
    paths: Sequence[str]
    known: Known
    routed: Routed
    inner: bool

    @property
    def few(self) -> bool | None:
        """Whether they are fewer than `FEW`."""
        return min(len(self._chosen(use)[0]) for use in self.routed.uses) < FEW

    def inputs(self, use: Use) -> Tensor:
        """The inputs of the expert, or what it makes of them in front of its `down_proj`."""
        tokens, _ = self._chosen(use)
        return torch.cat([*self._read(tokens)]) if len(tokens) else self.routed.inputs[:0]

    def costs(self, use: Use) -> Mapping[str, Cost]:
        """Those of all experts' outputs times the square of the router's weight, in the same sum."""
        both = torch.cat([self._cost(each) for each in (SEARCHING, JUDGING)])
        text = sum(int(self.routed.uses[each].sum()) for each in (SEARCHING, JUDGING))
        token = self._cost(use) / (both.sum() / text).clamp_min(TINY)
        return {path: Cost(token, self.known[use][path].row) for path in self.paths}

    def hessian(self, by_channel: Tensor | float) -> Tensor:
        """The Hessian over this expert's own tokens, weighed by the router."""
        tokens, shares = self._chosen(TRAINING)
        found = hessian_of(self._read(tokens), by_channel, shares[:, None].split(CHUNK))
        assert found is not None
        return found

    def _chosen(self, use: Use) -> tuple[Tensor, Tensor]:
        """The numbers of its tokens that have this use, and the router's weights."""
        return self.routed.sent_to(self.number)[use]

    def _cost(self, use: Use) -> Tensor:
        tokens, shares = self._chosen(use)
        return self.routed.cost[tokens] * shares.square()

    def _read(self, tokens: Tensor) -> Iterator[Tensor]:
        """What the layers read for `tokens`, some at a time, in the checkpoint's dtype."""
        for some in tokens.split(CHUNK):
            inputs = self.routed.inputs[some]
            if self.inner:
                experts = self.state.layer.get_submodule(self.place)
                inputs = experts.inner(self.number, inputs.float() / self.routed.by_channel).to(inputs.dtype)
            yield inputs


def _routed_of_block(
    layer: nn.Module, block: Iterable[Batch], place: str, path: str, dtype: torch.dtype
) -> list[tuple[Tensor, Tensor, Tensor, Tensor | None, bool]]:
    """For each batch: what the experts at `place` read, the numbers of those chosen, their weights, the costs, and
    whether it is held out."""
    found = []
    for batch in block:
        inputs, chosen, weights = read_by(layer, place, batch)
        known = batch.token_costs[path] if batch.token_costs is not None else None
        found.append((inputs.detach().to(dtype), chosen.to(torch.int16), weights.float(), known, batch.held_out))
    return found
