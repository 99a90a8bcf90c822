"""How likely a model finds tokens: those of a prompt that is echoed, and those of an answer.

The log-probabilities are of the model's own distribution: the logits as they are, before temperature and penalties.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

VALUES = 2**22
"""Logits of a prompt that exist at once: 16 positions of a vocabulary of 262,144."""

MAX_LIKELIEST = 20
"""Likeliest tokens that a request may ask for at each position."""

LEAST = -9999.0
"""What is told of a token that is ruled out, whose logarithm JSON cannot spell; vLLM tells the same."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A token, its log-probability in nats, and the likeliest tokens there, each with its own, the likeliest first."""

    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...]


def positions(model: Any) -> int:
    """Return the number of positions whose logits exist at once."""
    return max(1, VALUES // int(model.config.get_text_config(decoder=True).vocab_size))


def score(logits: Tensor, tokens: Sequence[int], likeliest: int) -> list[Scored]:
    """Score `tokens` by the logits [tokens, vocabulary] that predict them. Raises ValueError for logits with NaN."""
    logprobs = logits.float().log_softmax(-1).clamp(min=LEAST)
    own = logprobs.gather(-1, torch.tensor(tokens, dtype=torch.long, device=logits.device)[:, None])[:, 0]
    if own.isnan().any():
        raise ValueError("the model's logits hold NaN")
    best, ids = logprobs.topk(min(likeliest, logprobs.shape[-1]))
    tops = (tuple(zip(*row, strict=True)) for row in zip(ids.tolist(), best.tolist(), strict=True))
    return [Scored(*found) for found in zip(tokens, own.tolist(), tops, strict=True)]
