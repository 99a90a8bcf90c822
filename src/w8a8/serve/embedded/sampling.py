"""Choose a token by temperature, top-k, top-p and min-p, in this order and with the meaning of transformers' warpers.

Those sort the whole vocabulary for top-p, a quarter of a million numbers for each token of each request, of which few
have a chance. Here only the likeliest are sorted, as many as the settings let through.
"""

import math
from typing import Any

import torch
from torch import Tensor

FEW = 1024
"""Likeliest tokens that are looked at where there is no top-k; if the settings let more through, all are."""


def likeliest(scores: Tensor) -> int:
    """Return the first token with the highest of `scores` [vocabulary], or the first whose score is NaN.

    This is `scores.argmax()`, by NumPy, which is several times as fast on a CPU.
    """
    return int(scores.numpy(force=True).argmax())


def sample(scores: Tensor, config: Any, generator: torch.Generator | None = None) -> int:
    """Draw a token by float32 `scores` [vocabulary] and the settings of `config`, a `GenerationConfig`.

    Raises RuntimeError for scores that hold NaN.
    """
    weights, tokens = let_through(scores, config)
    drawn = torch.multinomial(weights, 1, generator=generator)
    return int(drawn if tokens is None else tokens[drawn])


def let_through(scores: Tensor, config: Any) -> tuple[Tensor, Tensor | None]:
    """Return the weights by which tokens are drawn, 0 for some, and the tokens (None: all, in their order)."""
    top_p = math.inf if config.top_p is None or config.top_p >= 1 else config.top_p
    min_p = config.min_p or 0.0
    if config.temperature is not None:
        scores = scores / config.temperature
    # 1) The tokens in question, the likeliest first, and their chances.
    if config.top_k:
        best, tokens = scores.topk(min(config.top_k, len(scores)))
        chances = best.softmax(-1)
    else:
        of_all = scores.softmax(-1)
        if top_p == math.inf and not min_p:
            return of_all, None
        chances, tokens = of_all.topk(min(FEW, len(scores)))
        if chances.sum() < top_p and chances[-1] >= min_p * chances[0]:
            chances, tokens = of_all.sort(descending=True)
    # 2) Those that are let through: all before them have less than top-p together.
    through = (chances.cumsum(-1) - chances < top_p) & (chances >= min_p * chances[0])
    through[0] = True
    return chances * through, tokens
