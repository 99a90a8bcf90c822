"""What a recipe sees of a layer's inputs."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor


class Batch(Protocol):
    """Inputs of a decoder layer: `hidden` float32 [samples, tokens, hidden] as the quantized layers before produce it,
    and what else the layer's forward takes. A `held_out` batch judges, and chooses nothing.

    `token_costs` [samples * tokens] say what errors of its tokens cost in the outputs of each linear layer, by its path
    in the decoder layer (`costs.py`); None where that is not known.
    """

    @property
    def hidden(self) -> Tensor: ...  # noqa: D102 - see above
    @property
    def kwargs(self) -> Mapping[str, Any]: ...  # noqa: D102
    @property
    def held_out(self) -> bool: ...  # noqa: D102
    @property
    def token_costs(self) -> Mapping[str, Tensor] | None: ...  # noqa: D102
