"""Chat templates, run in a process of their own.

A chat template is a program that comes with the checkpoint. It may loop for ever or ask for all memory, and Python
cannot stop it in the middle of a power of large numbers: the kernel can. So the process has an alarm that ends it, and
a limit of memory. It needs jinja2 and transformers' rules for templates, not torch, and so takes 75 MB.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from inspect import signature
from typing import Any

SECONDS = 5
"""The time that a template has for one request."""

MEMORY_BYTES = 512 * 2**20
"""The memory that a template may take, beside that of its interpreter."""

_SURROGATE = re.compile("[\ud800-\udfff]")
_WORKER = "from w8a8.serve.embedded.rendering import work; work()"


class TemplateRefusedError(Exception):
    """The chat template cannot be run for a request."""


class Renderer:
    """The process that runs chat templates; for one caller at a time."""

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
        TemplateRefusedError.
        """
        asked = {"template": template, "messages": messages, "tools": tools, "limit": limit}
        named = {"special": special or {}, "given": given or {}, "offered": offered or {}}
        line = json.dumps({**asked, **named}, default=str).encode() + b"\n"
        answer: dict[str, str] = json.loads(self._exchange(line))
        if "refused" in answer:
            raise TemplateRefusedError(answer["refused"])
        if _SURROGATE.search(answer["text"]):
            raise TemplateRefusedError("the prompt holds half of a surrogate pair, which is no character")
        return answer["text"]

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self.closed = True
        self._process.kill()
        self._process.wait()

    def _exchange(self, line: bytes) -> bytes:
        if self._process.poll() is not None and not self.closed:
            self._process = self._start()
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(OSError):
            process.stdin.write(line)
            process.stdin.flush()
        if answer := process.stdout.readline():
            return answer
        if process.wait() == -signal.SIGALRM:
            raise TemplateRefusedError(f"it did not end within {SECONDS} s")
        raise TemplateRefusedError("its process has ended: it needs too much memory")

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
    """Render what standard input asks for, a JSON object a line, until it ends."""
    import resource

    sys.modules["torch"] = None  # type: ignore[assignment]  # templates need none of it
    _arguments()  # loads all that rendering needs, before the limit
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY_BYTES,) * 2)
    for line in sys.stdin.buffer:
        signal.alarm(SECONDS)
        try:
            answer = {"text": _render(**json.loads(line))}
        except Exception as error:  # noqa: BLE001 - whatever the template does is the template's
            answer = {"refused": " ".join(str(error).split())[:500] or type(error).__name__}
        signal.alarm(0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


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
        raise TemplateRefusedError(f"chat_template_kwargs: it reads no {', '.join(unread)}; it reads: {known}")
    named = {name: value for name, value in offered.items() if name in readable}
    prompts, _ = render_jinja_template(
        [messages], tools, chat_template=template, add_generation_prompt=True, **{**special, **named, **given}
    )
    text: str = prompts[0]
    if len(text) > limit:
        raise TemplateRefusedError(
            f"the prompt has {len(text):,} characters, and at most {limit:,} can fit the context"
        )
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
