"""The inputs of a decoder layer, batch by batch, and which of them serve which purpose."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, cat

from w8a8.recipes.costs import Cost, place_of
from w8a8.recipes.groups import Group


@dataclass(frozen=True, slots=True)
class Batch:
    """Inputs of a decoder layer: the states as the quantized layers before produce them, and the other arguments.

    `hidden` is float32 [samples, tokens, hidden]; `kwargs` are the other arguments of the layer's `forward`. A
    `held_out` batch judges candidates and must not be used to make them. `token_costs` [samples * tokens], by the path
    of a linear layer, says what errors in its outputs cost for each token (`costs.py`); None where that is not known.
    For the layers of experts, it says what errors in what all experts together give cost.
    """

    hidden: Tensor
    kwargs: Mapping[str, Any]
    held_out: bool
    token_costs: Mapping[str, Tensor] | None


@dataclass(frozen=True, slots=True)
class Use:
    """The batches that are held out, or those that are not; only those with known token costs, if `costed`."""

    held_out: bool
    costed: bool

    def has(self, *, held_out: bool, costed: bool) -> bool:
        """Say whether a batch that is `held_out`, and one whose token costs are known, has this use."""
        return held_out is self.held_out and (costed or not self.costed)

    def of(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Those of `batches`."""
        for batch in batches:
            if self.has(held_out=batch.held_out, costed=batch.token_costs is not None):
                yield batch

    def costs(
        self, batches: Iterable[Batch], paths: Sequence[str], row_costs: Mapping[str, Tensor]
    ) -> Mapping[str, Cost]:
        """The costs of errors in the outputs of the linear layers `paths`, for all tokens."""
        known = [batch.token_costs for batch in self.of(batches) if batch.token_costs is not None]
        one = {place_of(path): path for path in paths}  # all experts of a place have the same tokens' costs
        tokens = {place: cat([each[path] for each in known]) for place, path in one.items()}
        return {path: Cost(tokens[place_of(path)], row_costs[path]) for path in paths}


TRAINING = Use(held_out=False, costed=False)
SEARCHING = Use(held_out=False, costed=True)
JUDGING = Use(held_out=True, costed=True)
"""The batches to compensate by, to search scales on, and to judge candidates on."""


Known = Mapping[Use, Mapping[str, Cost]]
"""The costs of errors for the tokens that scales are searched on, and candidates judged on, by path."""


def known_costs(groups: Sequence[Group], batches: Iterable[Batch], row_costs: Mapping[str, Tensor]) -> Known:
    """The costs of errors in the outputs of the groups' consumers."""
    paths = [path for group in groups for path in group.consumers]
    return {use: use.costs(batches, paths, row_costs) for use in (SEARCHING, JUDGING)}
