"""Chat templates and images, run and decoded in a process of their own.

A chat template is a program that comes with the checkpoint. It may loop for ever or ask for all memory, and Python
cannot stop it in the middle of a power of large numbers: the kernel can. So the process has an alarm that ends it, and
a limit of memory. The same holds for an image: a JPEG of 100 kB may ask for minutes. The process needs jinja2,
transformers' rules for templates and Pillow, not torch, and so takes 80 MB.
"""

import base64
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from inspect import signature
from typing import TYPE_CHECKING, Any

from w8a8.serve.embedded.images import pixels_of

if TYPE_CHECKING:
    from PIL.Image import Image

SECONDS = 5
"""The time that a template, and the time that all images of a request have."""

MEMORY_BYTES = 512 * 2**20
"""The memory that a template, or an image, may take beside that of its interpreter."""

_SURROGATE = re.compile("[\ud800-\udfff]")
_WORKER = "from w8a8.serve.embedded.rendering import work; work()"


class RefusedError(Exception):
    """The template cannot be run for a request, or the image not be decoded."""


class Renderer:
    """The process; for one caller at a time."""

    def __init__(self) -> None:
        """Start it; `closed` says whether it was ended for good."""
        self.closed = False
        self._process = self._start()

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
        answer = self._exchange({**asked, **named})
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
            decoded = self._exchange(asked)
            pixels = self._process.stdout.read(decoded["bytes"]) if self._process.stdout else b""
            found.append(Image.frombytes(decoded["mode"], decoded["size"], pixels))
        return found

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self.closed = True
        self._process.kill()
        self._process.wait()

    def _exchange(self, asked: Mapping[str, Any]) -> Any:
        if self._process.poll() is not None and not self.closed:
            self._process = self._start()
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(OSError):
            process.stdin.write(json.dumps(asked, default=str).encode() + b"\n")
            process.stdin.flush()
        if line := process.stdout.readline():
            answer = json.loads(line)
            if "refused" in answer:
                raise RefusedError(answer["refused"])
            return answer
        if process.wait() == -signal.SIGALRM:
            raise RefusedError(f"it did not end within {SECONDS} s")
        raise RefusedError("its process has ended: it needs too much memory")

    @staticmethod
    def _start() -> "subprocess.Popen[bytes]":
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}
        return subprocess.Popen(
            [sys.executable, "-P", "-c", _WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **quiet},
            start_new_session=True,
        )


def work() -> None:
    """Do what standard input asks for, a JSON object a line, until it ends."""
    import resource

    sys.modules["torch"] = None  # type: ignore[assignment]  # templates need none of it
    from PIL import Image

    _arguments()  # this and the next load all that is needed, before the limit
    Image.init()
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY_BYTES,) * 2)
    for line in sys.stdin.buffer:
        signal.alarm(SECONDS)
        pixels = b""
        try:
            asked = json.loads(line)
            if "image" in asked:
                signal.alarm(asked["seconds"])
                image = pixels_of(base64.b64decode(asked["image"]))
                pixels = image.tobytes()
                answer: dict[str, Any] = {"mode": image.mode, "size": image.size, "bytes": len(pixels)}
            else:
                answer = {"text": _render(**asked)}
        except Exception as error:  # noqa: BLE001 - whatever the template does is the template's
            answer = {"refused": " ".join(str(error).split())[:500] or type(error).__name__}
        signal.alarm(0)
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.write(pixels)
        sys.stdout.buffer.flush()


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
