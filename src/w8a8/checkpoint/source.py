"""Finds SRC as a user types it: a local folder, a GGUF file, or a Hub id `org/name[@revision]`, also as `hf://` it.

A folder that exists wins. A Hub id is looked up first and downloaded only if it holds safetensors; of its files, only
those the result needs are fetched. Where the Hub cannot be reached, what an earlier run fetched serves. The token,
`HF_ENDPOINT` and `HF_HOME` work as huggingface_hub documents them.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w8a8.checkpoint.ggufs import is_gguf
from w8a8.checkpoint.kinds import instead
from w8a8.checkpoint.session import bound
from w8a8.errors import HubError, NoWeightsError, PickleOnlyError, SourceNotFoundError, UsageError, W8A8Error
from w8a8.reading import reading, real

_HUB_ID = re.compile(r"(hf://(?!(datasets|spaces|buckets)/))?(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^\s@/]+))?")
_URL = re.compile(r"(?!https?:)[a-z][a-z0-9+.:-]*://.*", re.DOTALL)
_NOT_FETCHED = (
    "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack", "*.h5", "*.ot", "*.nemo",
    "*.gguf", "*.ggml", "*.llamafile", "*.onnx*", "*.tflite", "*.mlmodel", "*.engine",
    "[!0-9]*/*.safetensors", "[0-9][!_]*/*.safetensors",  # but those of modules.json: 2_Dense/model.safetensors
    "consolidated*.safetensors", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.webp", "*.svg", "*.pdf", "*.mp4",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint's folder or GGUF file, its name, and its Hub commit if it has one."""

    path: Path
    name: str
    revision: str | None = None


def resolve(source: str | Path) -> Source:
    """Find `source` on disk, downloading from the Hub if it is an id.

    Raises `SourceNotFoundError`, `UnreadableError`, `HubError`, or `PickleOnlyError` (before downloading anything);
    `UsageError` for a folder in a store.
    """
    if in_store(source):
        raise UsageError(f"{source}: this command reads files here; copy the folder first")
    path = Path(source)
    with reading(path):
        if path.is_dir():
            return _local(path)
        if is_gguf(path) and path.is_file():
            return Source(path, path.name)
        exists = path.exists()
    repo, revision = hub_id(source, exists=exists)
    return _download(repo, revision)


def is_on_hub(address: str) -> bool:
    """Whether `address` is `hf://org/name`."""
    return address.startswith("hf://") and _HUB_ID.fullmatch(address) is not None


def is_address(place: str | Path) -> bool:
    """Whether `place` is an address, as `s3://bucket/folder`."""
    return _URL.fullmatch(str(place)) is not None


def in_store(source: str | Path) -> bool:
    """Whether `source` is the address of a folder that fsspec opens, and no model on the Hub."""
    return is_address(source) and _HUB_ID.fullmatch(str(source)) is None


def hub_id(source: str | Path, *, exists: bool | None = None) -> tuple[str, str | None]:
    """Split a Hub id into repository and revision. Raises `SourceNotFoundError` if `source` is none, or a file."""
    match = _HUB_ID.fullmatch(str(source))
    exists = Path(source).exists() if exists is None else exists
    if match is None or exists:
        is_file = f"is a file{instead([Path(source).name]) or '; give the folder it lies in'}"
        raise SourceNotFoundError(f"{source}: {is_file if exists else 'no such folder, and not a Hub id (org/name)'}")
    return match["repo"], match["revision"]


def cached(repo: str, revision: str | None) -> Path | None:
    """Find a repository in the cache, where files may be missing; None if it is not there."""
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return _fetch(repo, revision, cached=True)
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def refused(label: str, error: Exception) -> W8A8Error:
    """Translate an error of huggingface_hub for the user."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    match error:
        case HFValidationError():
            return SourceNotFoundError(f"{label}: no such folder, and not a Hub id ({_one_line(error)})")
        case GatedRepoError():
            return HubError(f"{label}: gated; accept its terms on its page, then `hf auth login` or set HF_TOKEN")
        case RevisionNotFoundError():
            return SourceNotFoundError(f"{label}: the repository exists, the revision does not")
        case RepositoryNotFoundError():
            return SourceNotFoundError(
                f"{label}: no such folder here and no such repository on the Hub (or it is private: `hf auth login`)"
            )
    return HubError(f"{label}: the Hub could not deliver it: {_one_line(error)}")


def unreachable(label: str, error: Exception) -> HubError:
    """Say that the Hub cannot be asked for what is not here."""
    return HubError(
        f"{label}: no such folder, not (or not whole) in the cache, "
        f"and the Hub could not deliver it: {_one_line(error)}"
    )


def _local(path: Path) -> Source:
    """Describe a local folder; in a Hub cache its path tells repository and commit."""
    folder = real(path)
    repo = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repo.startswith("models--"):
        return Source(folder, repo.removeprefix("models--").replace("--", "/", 1), folder.name)
    return Source(path, os.fsencode(folder.name).decode(errors="replace"))


def _download(repo: str, revision: str | None) -> Source:
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        HFValidationError,
        HTTPError,  # of whichever HTTP library this version of huggingface_hub is built on
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    label = repo + (f"@{revision}" if revision else "")
    try:
        look_up(label, repo, revision)
        folder = _fetch(repo, revision)
    except (HFValidationError, RevisionNotFoundError, RepositoryNotFoundError) as error:
        raise refused(label, error) from error
    except (OfflineModeIsEnabled, HTTPError) as reason:
        try:
            folder = _fetch(repo, revision, cached=True)
        except LocalEntryNotFoundError as error:
            raise unreachable(label, reason) from error
        if not (folder / "config.json").exists():  # what was kept of it is its README
            raise unreachable(label, reason) from reason
    except (OSError, ValueError, RuntimeError) as error:
        raise refused(label, error) from error
    return Source(folder, repo, folder.name)


def _fetch(repo: str, revision: str | None, *, cached: bool = False) -> Path:
    """Download the snapshot, or find it in the cache; return its folder."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import tqdm

    class Bars(tqdm):
        """Progress bars where there is a terminal; on their own, some would show everywhere."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": kwargs.get("disable") or None})  # type: ignore[no-untyped-call]

    bound()
    ignored = list(_NOT_FETCHED)
    folder = snapshot_download(
        repo, revision=revision, ignore_patterns=ignored, local_files_only=cached, tqdm_class=Bars
    )
    return Path(folder)


def needed(names: Iterable[str]) -> list[str]:
    """Those of a repository's files that a result may need, shards among them."""
    from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

    return list(filter_repo_objects(names, ignore_patterns=list(_NOT_FETCHED)))


def look_up(label: str, repo: str, revision: str | None, *, sizes: bool = False) -> Any:
    """Ask the Hub for a model's commit and files, with their `sizes` and hashes if these are asked for.

    Raises what `refuse_pickles` raises, and errors of huggingface_hub.
    """
    from huggingface_hub import HfApi, constants

    bound()
    timeout = constants.HF_HUB_ETAG_TIMEOUT
    try:
        # The one request that does not retry for half a minute before it says that there is no network.
        info = HfApi().model_info(repo, revision=revision, files_metadata=sizes, timeout=timeout)
        refuse_pickles(label, [file.rfilename for file in info.siblings or ()])
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"its answer makes no sense: {error!r}") from error
    return info


def refuse_pickles(label: str, files: Iterable[str]) -> None:
    """Raise if none of a repository's `files` is safetensors: `NoWeightsError` if it is known what else they are."""
    names = list(files)
    if any(name.endswith(".safetensors") for name in names):
        return
    pickle = next((name for name in names if name.endswith((".bin", ".pt", ".pth"))), None)
    if pickle is None and (known := instead(names)):
        raise NoWeightsError(f"{label}: the repository has no safetensors{known}")
    raise PickleOnlyError(
        f"{label}: the repository has no safetensors, only {pickle or 'no weights at all'}; pickles are never opened"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
