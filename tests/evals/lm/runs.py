"""Runs of `eval lm` as a Python function."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from w8a8.evals.asking import Server
from w8a8.evals.lm.results import Result
from w8a8.evals.lm.run import evaluate
from w8a8.evals.lm.tasks import load, tokenizer_of


@contextmanager
def silent(_what: str, _total: int) -> Iterator[Callable[[int], None]]:
    yield lambda _: None


def run(
    server: Server,
    names: Sequence[str],
    include: Path,
    out: Path,
    *,
    words: Path | None,
    shots: int | None = None,
    **how: Any,
) -> Result:
    """Ask the tasks `names` of the folder `include`, with the tokenizer of the folder `words`."""
    return evaluate(
        server,
        load(names, include=include, shots=shots),
        asked=names,
        tokenizer=lambda _: tokenizer_of(None if words is None else str(words)),
        shots=shots,
        out=out,
        progress=how.pop("progress", silent),
        **how,
    )
