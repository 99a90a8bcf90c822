"""The Hub as a place to write to: ids checked before anything is asked, the repository, errors in one line."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from w8a8.checkpoint.session import bound
from w8a8.errors import HubError, UsageError, first_line
from w8a8.terminal.wording import printable
from w8a8.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def valid_id(text: str, where: str, *, expected: str = "a Hub id") -> str:
    """Return `text` if it is a Hub id. Raises `UsageError` that says `where` it stands and what was `expected`."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(text)
    except HFValidationError as error:
        raise UsageError(f"{where}: {printable(text)!r} is not {expected} ({first_line(error)})") from error
    return text


def target_id(text: str, where: str) -> str:
    """Return `text` if it is an id with an owner, to write to. Raises `UsageError`."""
    if "/" not in valid_id(text, where):
        raise UsageError(f"{text}: the owner is missing; give it as `org/name`")
    return text


def hub_api() -> "HfApi":
    """The Hub, as this tool asks it."""
    from huggingface_hub import HfApi

    bound()
    return HfApi(library_name="w8a8", library_version=__version__)


def writable(api: "HfApi", repo: str, *, public: bool, notice: Callable[[str], None]) -> bool:
    """Find the repository, or create it; return whether it is private.

    Raises `UsageError` where it is public and `public` was not asked for, and errors of huggingface_hub.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import RepositoryNotFoundError

    api.whoami()
    try:
        private = bool(api.model_info(repo, timeout=constants.HF_HUB_ETAG_TIMEOUT).private)
    except RepositoryNotFoundError:
        api.create_repo(repo, private=not public, exist_ok=True)
        return not public
    if not private and not public:
        raise UsageError(f"{repo}: exists and is public; upload to it with --public, or choose another name")
    if private and public:
        notice(f"{repo} exists and is private, and stays so; change that in its settings on the Hub")
    return private


@contextmanager
def explained(repo: str) -> Iterator[None]:
    """Turn errors of huggingface_hub into a `HubError` that says in one line what to do."""
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        HfHubHTTPError,
        HTTPError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        yield
    except LocalTokenNotFoundError as error:
        raise HubError(f"{repo}: no token found; run `hf auth login`, or set HF_TOKEN") from error
    except (HfHubHTTPError, HTTPError, OfflineModeIsEnabled, OSError, ValueError, KeyError, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        said = " ".join(str(getattr(cause, "server_message", None) or first_line(cause)).split())
        raise HubError(f"{repo}: {_advice(cause)} ({said[:300]})") from error


def _advice(error: BaseException) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return "the Hub does not know the token; run `hf auth login`, or set HF_TOKEN"
    if status == 403:
        return "the token may not write there; run `hf auth login` with one that may"
    if status is not None:
        return f"the Hub refused ({status}); files it has are kept, the same command goes on"
    return "the upload did not finish; files the Hub has are kept, the same command goes on"
