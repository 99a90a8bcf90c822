"""Finds a checkpoint that need not be here: a folder, a GGUF file, a model on the Hub, a folder in an object store."""

from dataclasses import replace
from pathlib import Path

from w8a8.checkpoint.ggufs import is_gguf
from w8a8.checkpoint.hub import HubFolder
from w8a8.checkpoint.reader import Checkpoint
from w8a8.checkpoint.remote import Remote, Scratch, called, lay_out
from w8a8.checkpoint.source import cached, hub_id, in_store
from w8a8.checkpoint.stores import StoreFolder
from w8a8.errors import W8A8Error
from w8a8.reading import reading


def remote(source: str | Path) -> Remote | None:
    """What `source` names, unless it is a folder or a file here, or whole in the Hub's cache.

    Raises `SourceNotFoundError` where it is none of these, and what `HubFolder.find` and `StoreFolder.find` raise.
    """
    if in_store(source):
        return StoreFolder.find(str(source))
    path = Path(source)
    with reading(path):
        if path.exists():
            return None
    repo, revision = hub_id(source)
    return None if _cached(repo, revision) else HubFolder.find(repo, revision)


def open_headers(source: str | Path) -> Checkpoint:
    """Open a folder or a GGUF file; or a Hub id `org/name[@revision]`, from the cache or by its headers; or an address.

    The `path` of a checkpoint from the Hub is its id, from a store its name: there may be no folder. Raises what
    `Checkpoint.open` and `remote` raise.
    """
    if in_store(source):
        folder = StoreFolder.find(str(source))
        return replace(_open_remote(folder), path=Path(folder.name))
    path = Path(source)
    with reading(path):
        if path.is_dir() or (is_gguf(path) and path.is_file()):
            return Checkpoint.open(path)
    repo, revision = hub_id(source)
    found = _cached(repo, revision) or _open_remote(HubFolder.find(repo, revision))
    return replace(found, path=Path(repo))


def _cached(repo: str, revision: str | None) -> Checkpoint | None:
    """Open a repository in the cache; None where it is not there, or not whole."""
    folder = cached(repo, revision)
    try:
        return Checkpoint.open(folder) if folder else None
    except W8A8Error:
        return None


def _open_remote(remote: Remote) -> Checkpoint:
    with Scratch() as folder, called(remote.label, folder), reading(Path(folder)):
        lay_out(remote, Path(folder))
        return Checkpoint.open(folder)
