"""Where the source's files come from: a folder here, or the Hub, file by file while they are needed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

from w8a8.checkpoint import Checkpoint
from w8a8.checkpoint.stream import Feed, Identity, known_sha256


class Supply(Protocol):
    """Source files that may have to arrive first; `w8a8.storage.arrivals.Arrivals` brings them from the Hub."""

    @property
    def room(self) -> int:
        """The bytes that arriving files take at most."""

    def checkpoint(self) -> Checkpoint:
        """The source, by its headers, in the folder where the files will be."""

    def identity(self, name: str) -> Identity:
        """What tells a file from another one, or another state of it."""

    def sha256(self, name: str) -> str:
        """The SHA-256 of a file, where it is known without reading it; else ""."""

    def running(self, names: Sequence[str], workers: int) -> AbstractContextManager[None]:
        """Bring the files `names`, in order, while the context lasts; a name may come several times, once per use."""

    def hold(self, name: str, stopped: Callable[[], bool]) -> AbstractContextManager[None]:
        """Wait until a file is there; it stays while the context lasts. Raises `Stopped` once `stopped()` holds."""

    def feed(self, name: str, stopped: Callable[[], bool]) -> AbstractContextManager[Feed]:
        """Read a file while it arrives; it stays while the context lasts, or raises `ArrivedWrong`."""


@dataclass(frozen=True, slots=True)
class Local:
    """The files of a checkpoint that is here."""

    opened: Checkpoint

    @property
    def room(self) -> int:
        """None: they are here."""
        return 0

    def checkpoint(self) -> Checkpoint:
        """The checkpoint as it was opened."""
        return self.opened

    def identity(self, name: str) -> Identity:
        """The file as it is now. Raises `UnreadableError`."""
        return Identity.of(self.opened.path / name)

    def sha256(self, name: str) -> str:
        """What the Hub's cache calls a file in it."""
        return known_sha256(self.opened.path / name)

    @contextmanager
    def running(self, _names: Sequence[str], _workers: int) -> Iterator[None]:
        """Nothing has to be brought."""
        yield

    @contextmanager
    def hold(self, _name: str, _stopped: Callable[[], bool]) -> Iterator[None]:
        """The file is there."""
        yield

    @contextmanager
    def feed(self, name: str, stopped: Callable[[], bool]) -> Iterator[Feed]:
        """The file is there."""
        yield Feed(self.opened.path / name, stopped=stopped)
