"""The result of `w8a8 eval lm`, and its file, which is a user's: everything in it is checked before it is used."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from w8a8.errors import InvalidResultError, UnreadableError
from w8a8.reading import Count, Number, UnfitError, convert, parse_json, read_bytes
from w8a8.version import __version__

KIND = "w8a8.lm"
MAX_RESULT_BYTES = 100_000_000
MAX_RESULT_VALUES = 10_000_000
"""The harness's largest groups have a hundred thousand documents, each with a hash and a few scores."""


@dataclass(frozen=True, slots=True)
class Protocol:
    """How the tasks are asked; results are comparable if all fields but `concurrency` are equal."""

    tasks: tuple[str, ...]
    shots: Count | None
    limit: Count | None
    chat: bool
    tokenized: bool
    """Whether prompts went as tokens, cut here, or as texts."""
    context: Count
    concurrency: Count

    @property
    def identity(self) -> Mapping[str, Any]:
        """The fields that answers depend on, as plain JSON."""
        return {**asdict(self), "tasks": list(self.tasks), "concurrency": None}


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric as the harness computes it; `filter` is how answers were read for it ("none": as they are)."""

    metric: str
    filter: str
    value: Number
    stderr: Number | None
    higher_is_better: bool

    @property
    def name(self) -> str:
        """Its name, with the filter if there is one."""
        return self.metric if self.filter == "none" else f"{self.metric},{self.filter}"


@dataclass(frozen=True, slots=True)
class Task:
    """A task's metrics; for each document asked, of all `of`, the hash of what was asked, and its score by metric.

    A metric is among `scores` if it has a number for each document.
    """

    name: str
    version: str
    shots: Count
    of: Count
    metrics: tuple[Metric, ...]
    documents: tuple[str, ...]
    scores: dict[str, tuple[Number, ...]]


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the table: a group with its tasks and the metrics it aggregates, or one task."""

    name: str
    tasks: tuple[str, ...]
    metrics: tuple[Metric, ...]


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a run of lm-evaluation-harness; `to_dict` is the content of its file."""

    model: str
    base_url: str
    protocol: Protocol
    versions: dict[str, str]
    started: str
    seconds: Number
    rows: Annotated[tuple[Row, ...], Meta(min_length=1)]
    tasks: Annotated[tuple[Task, ...], Meta(min_length=1)]
    path: Path | None = None
    """Where it was written, for the run that wrote it."""

    def __post_init__(self) -> None:
        """Raise `ValueError` where parts contradict each other, which the reader of a file reports like the rest."""
        names = [task.name for task in self.tasks]
        if len({*names}) < len(names) or len({row.name for row in self.rows}) < len(self.rows):
            raise ValueError("two tasks of one name")
        for row in self.rows:
            if not row.tasks or not {*row.tasks} <= {*names} or len({*row.tasks}) < len(row.tasks):
                raise ValueError(f"{row.name} has tasks that are not there, or none")
        for task in self.tasks:
            if not task.documents or any(len(scores) != len(task.documents) for scores in task.scores.values()):
                raise ValueError(f"{task.name} has no documents, or not a score for each")

    def of(self, row: Row) -> Iterator[Task]:
        """Yield the tasks of a row."""
        return (task for task in self.tasks if task.name in row.tasks)

    def asked(self, row: Row) -> tuple[str, int]:
        """The number of examples that a row's tasks were asked with, in words, and how many documents they have."""
        tasks = list(self.of(row))
        shots = sorted({task.shots for task in tasks})
        which = str(shots[0]) if len(shots) == 1 else f"{shots[0]} to {shots[-1]}"
        return which, sum(len(task.documents) for task in tasks)

    def to_dict(self) -> dict[str, Any]:
        """The result as plain JSON values."""
        about = {name: value for name, value in asdict(self).items() if name != "path"}
        return {"kind": KIND, "schema": 1, "w8a8": __version__, **about, "seconds": round(self.seconds, 3)}


@dataclass(frozen=True, slots=True)
class _Head:
    """What tells the file from others."""

    kind: Literal["w8a8.lm"]
    schema: Literal[1]


def is_lm(path: Path) -> bool:
    """Say whether a file looks like a result of `w8a8 eval lm`; `read` says what is wrong with one that does."""
    try:
        return b'"w8a8.lm"' in read_bytes(path, MAX_RESULT_BYTES)[:200]
    except (UnreadableError, UnfitError):
        return False


def read(path: Path) -> Result:
    """Read a result. Raises InvalidResultError naming the first problem."""
    try:
        found = parse_json(read_bytes(path, MAX_RESULT_BYTES), values=MAX_RESULT_VALUES)
        convert(found, _Head)
        return convert(found, Result)
    except UnreadableError as error:
        raise InvalidResultError(f"{error}; give a result of `w8a8 eval lm`") from error
    except UnfitError as error:
        raise InvalidResultError(
            f"{path}: not a result of `w8a8 eval lm` that this version reads ({error}); give another file, or run it "
            "again with --out"
        ) from error
