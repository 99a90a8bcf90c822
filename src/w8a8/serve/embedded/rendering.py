"""Chat templates and images, run and decoded in a process of their own (`worker`).

A chat template is a program that comes with the checkpoint. It may loop for ever or ask for all memory, and Python
cannot stop it in the middle of a power of large numbers. The same holds for an image: a JPEG of 100 kB may ask for
minutes. The process needs jinja2, transformers' rules for templates and Pillow, not torch, and so takes 80 MB.
"""

import base64
import math
import re
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from inspect import signature
from typing import TYPE_CHECKING, Any

from w8a8.serve.embedded.images import pixels_of
from w8a8.serve.embedded.worker import SECONDS, RefusedError, Worker, answer_all

if TYPE_CHECKING:
    from PIL.Image import Image

_SURROGATE = re.compile("[\ud800-\udfff]")


class Renderer:
    """The process; for one caller at a time."""

    def __init__(self) -> None:
        """Start it."""
        self._worker = Worker("rendering")

    @property
    def closed(self) -> bool:
        """Whether it was ended for good."""
        return self._worker.closed

    def render(
        self,
        template: str,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        special: Mapping[str, str] | None = None,
        given: Mapping[str, Any] | None = None,
        offered: Mapping[str, Any] | None = None,
        limit: int = 2**20,
    ) -> str:
        """Return the prompt, of at most `limit` characters. `special`: the tokens that templates know by name.

        Values that are `given` by name must be ones that the template reads; those only `offered` may be. Raises
        RefusedError.
        """
        asked = {"template": template, "messages": messages, "tools": tools, "limit": limit}
        named = {"special": special or {}, "given": given or {}, "offered": offered or {}}
        answer = self._worker.ask({**asked, **named})
        if _SURROGATE.search(answer["text"]):
            raise RefusedError("the prompt holds half of a surrogate pair, which is no character")
        text: str = answer["text"]
        return text

    def decode(self, urls: Sequence[str]) -> "list[Image]":
        """Decode the images in `data:` URLs that `images.check` has let pass. Raises RefusedError."""
        from PIL import Image

        found, end = [], time.monotonic() + SECONDS
        for url in urls:
            asked = {"image": url.partition(",")[2], "seconds": max(1, math.ceil(end - time.monotonic()))}
            decoded = self._worker.ask(asked)
            found.append(Image.frombytes(decoded["mode"], decoded["size"], self._worker.read(decoded["bytes"])))
        return found

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._worker.close()


def work() -> None:
    """Render templates and decode images."""
    sys.modules["torch"] = None  # type: ignore[assignment]  # templates need none of it
    from PIL import Image

    _arguments()  # this and the next load all that is needed, before the limit
    Image.init()
    answer_all(_answer)


def _answer(asked: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    if "image" not in asked:
        return {"text": _render(**asked)}, b""
    signal.alarm(asked["seconds"])
    image = pixels_of(base64.b64decode(asked["image"]))
    pixels = image.tobytes()
    return {"mode": image.mode, "size": image.size, "bytes": len(pixels)}, pixels


def _render(
    template: str,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    special: dict[str, str],
    given: dict[str, Any],
    offered: dict[str, Any],
    limit: int,
) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    readable = _readable(template) - special.keys()
    if unread := sorted(given.keys() - readable):
        known = ", ".join(sorted(readable)) or "none"
        raise RefusedError(f"chat_template_kwargs: it reads no {', '.join(unread)}; it reads: {known}")
    named = {name: value for name, value in offered.items() if name in readable}
    prompts, _ = render_jinja_template(
        [messages], tools, chat_template=template, add_generation_prompt=True, **{**special, **named, **given}
    )
    text: str = prompts[0]
    if len(text) > limit:
        raise RefusedError(f"the prompt has {len(text):,} characters, and at most {limit:,} can fit the context")
    return text


def _readable(template: str) -> set[str]:
    """The names that a request may give to a template: those that it reads, less those that others give."""
    from transformers.utils.chat_template_utils import _compile_jinja_template, _get_template_variables

    return (
        set(_get_template_variables(template))
        - _arguments()
        - set(_compile_jinja_template(template).environment.globals)
    )


@cache
def _arguments() -> frozenset[str]:
    """The names of transformers' own arguments where it applies a template."""
    from transformers.processing_utils import ProcessorMixin
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    kinds = (PreTrainedTokenizerBase, ProcessorMixin)
    return frozenset({"messages"}.union(*(signature(kind.apply_chat_template).parameters for kind in kinds)))
