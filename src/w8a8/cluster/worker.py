"""What runs on the nodes: a task between a look at what the node has, and messages of how far it is."""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar
from uuid import uuid4

from w8a8.errors import ClusterError, UnreadableError, UnwritableError, W8A8Error
from w8a8.version import __version__

T = TypeVar("T")

MESSAGE_SECONDS = 0.5
"""How often a task says how far it is."""
GRACE_SECONDS = 5.0
"""How long a node may take to see a file that another one has just made: network file systems remember what was not."""
AGAIN_SECONDS = 1.0
"""How long a task waits before its storage is tried again."""

BOARD_SECONDS = 60.0
"""How long the board is waited for; without it, the work goes on."""

FLEETING = (ClusterError, UnreadableError, UnwritableError)
"""What a node or its storage may lack once, and another node, or the same one the next time, has."""


@dataclass(frozen=True, slots=True)
class Site:
    """What every node has to have: this version, files of these sizes, and a folder that it may write into."""

    version: str
    files: Mapping[Path, int]
    folder: Path | None = None

    def problem(self) -> str:
        """Say what this machine lacks; "" where it is nothing."""
        if self.version != __version__:
            return f"has w8a8 {__version__}, and this run is of {self.version}; install the same version everywhere"
        end = time.monotonic() + GRACE_SECONDS
        for path, size in self.files.items():
            while (found := _size(path)) != size:
                if time.monotonic() > end:
                    seen = "does not see" if found is None else "sees another"
                    return f"{seen} {path}; every node has to see the same files under the same paths"
                time.sleep(0.1)
        try:
            if self.folder:
                trial = self.folder / f".trial-{uuid4().hex}"
                trial.touch()
                trial.unlink()
        except OSError as error:
            return f"cannot write into {self.folder} ({error.strerror}); every node has to write there"
        return ""


@dataclass(frozen=True, slots=True)
class Answer(Generic[T]):
    """What a task gave, where, and from when to when by that node's clock, in seconds."""

    value: T
    node: str
    began: float
    ended: float


@dataclass(frozen=True, slots=True)
class Said:
    """How far a task is: the node it was begun on at last, by id and name, how many times it was begun, bytes done.

    `before` is the name of the node that it was begun on before.
    """

    node: str
    name: str
    times: int = 1
    before: str = ""
    done: int = 0


@dataclass
class Board:
    """What tasks say, by their labels; an actor of Ray."""

    said: dict[str, Said] = field(default_factory=dict)

    def begin(self, label: str, node: str, name: str) -> None:
        """A task begins on a node."""
        last = self.said.get(label)
        self.said[label] = Said(node, name, last.times + 1, last.name) if last else Said(node, name)

    def report(self, label: str, done: int) -> None:
        """A task has done so many bytes so far."""
        if label in self.said:
            self.said[label] = replace(self.said[label], done=done)

    def end(self, label: str) -> Said | None:
        """A task is done, and another one may have its label; return what it said at last."""
        return self.said.pop(label, None)

    def read(self) -> dict[str, Said]:
        """All that was said."""
        return self.said


def look(site: Site) -> str:
    """Say what this node lacks; see `Site.problem`."""
    return site.problem()


def perform(
    label: str, names: Mapping[str, str], site: Site, board: Any, work: Callable[..., T], *args: Any
) -> Answer[T]:
    """Do `work(*args, advance=)` on this node. Raises its errors with the task and the node before what they say."""
    import ray

    node = ray.get_runtime_context().get_node_id()
    name = names.get(node) or str(ray.util.get_node_ip_address())  # one that came later
    try:
        if problem := site.problem():
            raise ClusterError(problem)
        with suppress(ray.exceptions.RayError):  # wait for it: should this process be killed, it is known where
            ray.get(board.begin.remote(label, node, name), timeout=BOARD_SECONDS)
        began = time.time()
        value = work(*args, advance=_messages(label, board))
        return Answer(value, name, began, time.time())
    except W8A8Error as error:
        if isinstance(error, FLEETING):
            time.sleep(AGAIN_SECONDS)
        raise type(error)(f"{label} on node {name}: {error}") from error


def _messages(label: str, board: Any) -> Callable[[int], None]:
    """Make what is told of bytes, and now and then tells the board."""
    done, last = 0, time.monotonic()

    def advance(nbytes: int) -> None:
        nonlocal done, last
        done += nbytes
        if time.monotonic() - last > MESSAGE_SECONDS:
            last = time.monotonic()
            board.report.remote(label, done)

    return advance


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
