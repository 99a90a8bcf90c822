"""`w8a8 status`: what of a result is done and what remains, as the journal of its run has it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from w8a8.checkpoint.source import in_store
from w8a8.errors import SourceNotFoundError
from w8a8.execute.staging import Staging
from w8a8.reading import reading, real
from w8a8.storage.folders import is_locked


@dataclass(frozen=True, slots=True)
class Status:
    """How far the run is that makes `out`; bytes are of source files.

    `state` is "whole" (there is no run any more), "running", or "interrupted". `shards_sent` have gone where the result
    goes besides. `downloaded` are bytes of source files that have arrived and have not been used.
    """

    out: str
    state: str
    format: str = ""
    recipe: str = ""
    shards_done: int = 0
    shards_sent: int = 0
    shards: int = 0
    bytes_done: int = 0
    bytes: int = 0
    downloaded: int = 0
    remaining: Sequence[str] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def status(out: str | Path) -> Status:
    """Look at OUT and the folder of its unfinished run. Raises `SourceNotFoundError` where there is neither.

    Whether a run works on it is told by its lock. A run that has only begun, or that still calibrates, has no shards.
    """
    name = str(out).rstrip("/").rpartition("/")[2] if in_store(out) else out  # what it is called here
    path = real(name)
    staging = Staging.of(path)
    with reading(path):
        if not staging.home.is_dir():
            if path.is_dir() and (path / "config.json").is_file():
                return Status(str(out), "whole")
            raise SourceNotFoundError(f"{out}: no such folder, and no unfinished run of it")
    noted = staging.noted()
    state = "running" if is_locked(staging.home) else "interrupted"
    if noted.job is None:
        return Status(str(out), state)
    sizes = {name: file.size for name, file in noted.job.sources.items()}
    done = {record.name for record in noted.done} & sizes.keys()
    return Status(
        str(out),
        state,
        noted.job.format,
        noted.job.recipe,
        len(done),
        len({record.name for record in noted.done if record.receipt} & done),
        len(sizes),
        sum(sizes[name] for name in done),
        sum(sizes.values()),
        staging.arrived(),
        tuple(sorted(sizes.keys() - done)),
    )
