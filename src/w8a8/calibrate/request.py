"""A user's request for calibration: the recipe, how much of which text, and what may stay in BF16."""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import cast

from w8a8.errors import UsageError
from w8a8.recipes import RECIPES, RecipeName

SAMPLES, TOKENS = 64, 512
"""The default number of samples, and of tokens in each."""

Progress = Callable[[int], AbstractContextManager[Callable[[int], None]]]
"""Shows progress over a number of layers: a context whose value is called with the number of layers just finished."""


@dataclass(frozen=True, slots=True)
class Request:
    """`text` is a file or a data set, None for the built-in one; `keep_bf16` the share by which OUT may grow."""

    recipe: RecipeName
    text: str | None
    samples: int
    tokens: int
    keep_bf16: float


def request(
    recipe: str | None, text: str | None, samples: int, tokens: int, keep_bf16: str | None, compat: str | None
) -> Request | None:
    """Check the options and make the request; None for `rtn`, which needs no calibration.

    The default recipe is `auto` with a text, else `rtn`. Raises UsageError.
    """
    name = recipe or ("rtn" if text is None else "auto")
    if name not in RECIPES:
        raise UsageError(f"unknown recipe {name!r}; there are {', '.join(RECIPES)}")
    keep = _share(keep_bf16) if keep_bf16 is not None else 0.0
    if samples < 2 or tokens < 2:
        raise UsageError("--samples and --tokens must be at least 2")
    if name == "rtn":
        if text is not None or keep_bf16 is not None:
            given = "--calibration" if text is not None else "--keep-bf16"
            raise UsageError(f"{given} needs a recipe that calibrates (--recipe auto); rtn rounds to nearest")
        return None
    if compat is not None:
        raise UsageError(
            f"--compat {compat} reproduces another tool, which rounds to nearest: leave out --recipe and --calibration"
        )
    return Request(cast(RecipeName, name), text, samples, tokens, keep)


def _share(text: str) -> float:
    """Read `2%` or `0.02` as 0.02."""
    match = re.fullmatch(r"(\d{1,4}(?:\.\d{1,6})?)(%?)", text.strip())
    share = float(match[1]) / (100 if match[2] else 1) if match else -1
    if not 0 < share <= 1:
        raise UsageError(f"--keep-bf16 {text!r}: give a share of the result, such as 2%, over 0% and up to 100%")
    return share
