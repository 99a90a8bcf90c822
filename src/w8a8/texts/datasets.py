"""Data sets on the Hub, read through the `datasets` library."""

from itertools import islice
from typing import Any

from w8a8.errors import HubError, MissingExtraError, first_line


def load(name: str, config: str | None, split: str, *, limit: int | None = None, otherwise: str) -> list[Any]:
    """Load the records of a data set's split: all, or the first `limit`, which are streamed and not cached.

    Raises MissingExtraError and HubError; both end with `otherwise`, the user's other way to give a text.
    """
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as missing:
        raise MissingExtraError(
            f"{name}: a data set needs the datasets library: pip install 'w8a8[eval]'; {otherwise}"
        ) from missing
    try:
        return list(islice(load_dataset(name, config, split=split, streaming=limit is not None), limit))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise HubError(f"{name}: the Hub could not deliver this data set ({first_line(error)}); {otherwise}") from error
