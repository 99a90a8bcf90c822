"""Prints notices, tables and results, or JSON.

Results go to standard output; notices about the work go to standard error, so that a pipe gets the results alone.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from w8a8.terminal.wording import clean


class Terminal:
    """Prints for a person, or JSON for a machine; `quiet` leaves out all but results and errors."""

    def __init__(self, *, json: bool = False, quiet: bool = False) -> None:
        """`json` prints results as JSON; `quiet` drops notices."""
        self.json = json
        self.quiet = quiet
        self.out = Console(highlight=False)
        self._err = Console(stderr=True, highlight=False)

    def notice(self, text: str) -> None:
        """Say something about the work under way."""
        if not self.quiet:
            self._err.print(clean(text), soft_wrap=True)

    def say(self, text: str) -> None:
        """Print one paragraph of a result; `text` may hold Rich markup."""
        self.out.print(text, soft_wrap=True)

    def print(self, what: Any) -> None:
        """Print a part of a result, such as a table."""
        self.out.print(what)

    def print_json(self, value: Any) -> None:
        """Print a result for machines; dataclasses become objects."""
        print(json.dumps(value, indent=2, ensure_ascii=False, default=_plain))

    def table(self, result: Any, show: Callable[[Any, Callable[[Any], None]], None]) -> None:
        """Print a result that has a `to_dict`: as JSON, or by its own `show(result, print)`."""
        if self.json:
            self.print_json(result.to_dict())
        else:
            show(result, self.out.print)


def plain_table(*columns: str, left: int) -> Table:
    """Make a plain table whose first `left` columns are text, the others numbers; with none, the last one is text."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for i, column in enumerate(columns):
        text = i < left or (i == len(columns) - 1 and left == 0)
        table.add_column(column, justify="left" if text else "right", overflow="fold" if text else "ellipsis")
    return table


def _plain(value: Any) -> Any:
    """Turn what `json` cannot print into what it can."""
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)
