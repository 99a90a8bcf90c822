"""The openai client's errors as ours: a server that cannot be asked, or that does not answer as the API does."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from w8a8.errors import ServerError


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn the client's errors, and an answer that is not JSON, into `ServerError`: one line, and what to do."""
    import openai

    try:
        yield
    except openai.APIConnectionError as error:
        raise ServerError(f"{url}: not reachable; is the server running, and is that its address?") from error
    except openai.AuthenticationError as error:
        raise ServerError(f"{url}: the server wants another API key: --api-key, or OPENAI_API_KEY") from error
    except openai.OpenAIError as error:
        raise ServerError(f"{url}: {message(error)}") from error
    except json.JSONDecodeError as error:
        raise not_the_api(url) from error


def not_the_api(url: str) -> ServerError:
    """Return the error for an answer that lacks a field of the API's."""
    return ServerError(f"{url}: the answer is not the API's; is it an OpenAI-compatible server?")


def message(error: Any) -> str:
    """Put the server's message into one line."""
    body = getattr(error, "body", None)
    said = (body.get("message") or body.get("error") if isinstance(body, dict) else None) or str(error)
    return " ".join(str(said).split())[:500]
