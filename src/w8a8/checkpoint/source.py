"""What a user types as SRC: a local folder, or a Hub id `org/name[@revision]`.

A folder that exists wins. A Hub id is looked up first and downloaded only if it holds safetensors; of its files, only
those the result needs are fetched. The token, `HF_ENDPOINT` and `HF_HOME` work as huggingface_hub documents them.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from w8a8.errors import HubError, PickleOnlyError, SourceNotFoundError

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^\s@]+))?")
_NOT_FETCHED = (
    "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5", "*.gguf", "*.onnx*", "*.tflite",
    "consolidated*.safetensors", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.webp", "*.mp4", "*/*.safetensors",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint's folder, the name it goes by, and its Hub commit if it has one."""

    path: Path
    name: str
    revision: str | None = None


def resolve(source: str | Path) -> Source:
    """Find `source` on disk, downloading from the Hub if it is an id.

    Raises `SourceNotFoundError`, `HubError`, or `PickleOnlyError` (before downloading anything).
    """
    path = Path(source)
    if path.is_dir():
        return _local(path)
    match = _HUB_ID.fullmatch(str(source))
    if match is None or path.exists():
        kind = "is a file; give the folder it lies in" if path.exists() else "no such folder, and not a Hub id (org/name)"
        raise SourceNotFoundError(f"{source}: {kind}")
    return _download(match["repo"], match["revision"])


def _local(path: Path) -> Source:
    """A local folder; in a Hub cache the repository and commit are read off its path."""
    folder = path.resolve()
    repo = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repo.startswith("models--"):
        return Source(folder, repo.removeprefix("models--").replace("--", "/", 1), folder.name)
    return Source(path, folder.name)


def _download(repo: str, revision: str | None) -> Source:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    label = repo + (f"@{revision}" if revision else "")
    try:
        files = HfApi().list_repo_files(repo, revision=revision)
        if not any(name.endswith(".safetensors") for name in files):
            found = next((name for name in files if name.endswith((".bin", ".pt", ".pth"))), "no weights at all")
            raise PickleOnlyError(f"{label}: the repository has no safetensors, only {found}; pickles are never opened")
        folder = snapshot_download(repo, revision=revision, ignore_patterns=list(_NOT_FETCHED))
    except GatedRepoError as error:
        raise HubError(f"{label}: gated; accept its terms on its page, then `hf auth login` or set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise SourceNotFoundError(f"{label}: the repository exists, the revision does not") from error
    except RepositoryNotFoundError as error:
        raise SourceNotFoundError(
            f"{label}: no such folder here and no such repository on the Hub (or it is private: `hf auth login`)"
        ) from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise HubError(f"{label}: no such folder here, and the Hub could not deliver it: {_first_line(error)}") from error
    return Source(Path(folder), repo, Path(folder).name)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
