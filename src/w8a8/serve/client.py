"""The openai client, and its errors as ours: a server that cannot be asked, or that does not answer as the API does."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from w8a8.errors import ServerError

_ADDRESS = re.compile(r"(https?://.*)|((?:[\w.-]+|\[[0-9a-fA-F:.]+\]):\d{1,5}(?:/.*)?)", re.IGNORECASE | re.DOTALL)


IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""Pillow's names for the images that a request may hold."""


def address(text: str) -> str | None:
    """Return the URL that `text` spells, or means as `localhost:8000/v1` does; None if it names no server."""
    match = _ADDRESS.fullmatch(text)
    return None if match is None else match[1] or f"http://{text}"


def connect(base_url: str, api_key: str, **options: Any) -> Any:
    """Return an openai client of the server at `base_url`; to this machine it takes no proxy of the environment."""
    import openai

    direct = _directly(base_url, openai.DefaultHttpxClient)
    return openai.OpenAI(base_url=base_url, api_key=api_key, **direct, **options)


def connect_async(base_url: str, api_key: str, **options: Any) -> Any:
    """Return an asynchronous client, else as `connect`."""
    import openai

    direct = _directly(base_url, openai.DefaultAsyncHttpxClient)
    return openai.AsyncOpenAI(base_url=base_url, api_key=api_key, **direct, **options)


def _directly(base_url: str, http: Callable[..., Any]) -> dict[str, Any]:
    """The options of a client that takes no proxy of the environment, where the server is on this machine."""
    return {"http_client": http(trust_env=False)} if _is_here(base_url) else {}


def _is_here(base_url: str) -> bool:
    """Say whether a URL's host is this machine: a name or an address that no proxy could reach it by."""
    try:
        host = (urlsplit(base_url).hostname or "").rstrip(".")
        if host == "localhost" or host.endswith(".localhost"):
            return True
        return ip_address(host).is_loopback or ip_address(host).is_unspecified
    except ValueError:
        return False


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
