"""Sends files to a folder in a store: whole, by parts where they are large, or not at all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from w8a8.checkpoint.remote import RemoteFile, insisted
from w8a8.checkpoint.stores import EXTRAS, Store
from w8a8.checkpoint.stream import Stopped
from w8a8.errors import StoreError
from w8a8.storage.download import ATTEMPTS

T = TypeVar("T")

PART_BYTES = 16 << 20
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {"chunksize": PART_BYTES, "max_concurrency": 4},
    "gs": {"chunksize": PART_BYTES},
    "az": {"max_concurrency": 4},
}
"""Extra -> what keeps its parts in memory few. By default some hold 500 MB."""


def upload(store: Store, path: Path, name: str, stopped: Callable[[], bool] = lambda: False) -> RemoteFile:
    """Send the file at `path` as `name`, and return it as the store has it; the parts of one that fails are aborted.

    Raises `StoreError`, `SourceNotFoundError` where there is no such bucket, and `Stopped` once `stopped()` holds.
    """
    from fsspec.callbacks import Callback

    class Watching(Callback):  # type: ignore[misc]
        """Is called behind each part."""

        def call(self, *_args: Any, **_kwargs: Any) -> None:
            if stopped():
                raise Stopped

    options = _OPTIONS.get(EXTRAS.get(store.protocol, ""), {})

    def put() -> RemoteFile:
        store.system.put_file(str(path), store.path(name), callback=Watching(), **options)
        return store.info(name)

    return insist(store, name, put, stopped)


def insist(store: Store, name: str, ask: Callable[[], T], stopped: Callable[[], bool] = lambda: False) -> T:
    """Ask something of a store about the file `name`, or, with "", about the folder; again where that may help.

    Raises `StoreError`, `SourceNotFoundError`, `Stopped`, `FileExistsError`.
    """

    def asked() -> T:
        with store.asking(name):
            return ask()

    return insisted(
        asked,
        ATTEMPTS,
        lambda failure: StoreError(
            f"{store.where(name)}: the store did not take it ({failure}); what was sent is kept, and the same command "
            "goes on"
        ),
        stopped,
    )
