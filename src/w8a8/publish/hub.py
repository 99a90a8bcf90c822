"""Hub ids, checked before anything is asked of the Hub."""

from w8a8.errors import UsageError, first_line
from w8a8.terminal.wording import printable


def valid_id(text: str, where: str, *, expected: str = "a Hub id") -> str:
    """Return `text` if it is a Hub id. Raises `UsageError` that says `where` it stands and what was `expected`."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(text)
    except HFValidationError as error:
        raise UsageError(f"{where}: {printable(text)!r} is not {expected} ({first_line(error)})") from error
    return text
