"""A prompt is tokenized in a process of its own before it is in the server's.

A checkpoint's tokenizer has patterns, and tables of strings, that one hostile text may keep busy for ever, or that make
gigabytes of it. What ends in time in a process that can be ended does so in the server, too.
"""

import signal
from tempfile import TemporaryFile
from typing import Any

from w8a8.serve.embedded.worker import Worker, answer_all, limit_memory

LOAD_SECONDS = 120
"""The time to load a tokenizer: the largest published ones take two seconds."""

LOAD_BYTES = 8 * 2**30
"""The memory that loading it may take."""


class Rehearsal:
    """The process; for one caller at a time."""

    def __init__(self, tokenizer: Any) -> None:
        """Start it with a copy of `tokenizer`, one of the `tokenizers` library."""
        self._file = TemporaryFile()  # noqa: SIM115 - a worker that starts again reads it again
        self._file.write(tokenizer.to_str().encode())
        self._file.flush()
        self._worker = Worker("rehearsing", self._file.fileno(), files=[self._file.fileno()])

    @property
    def closed(self) -> bool:
        """Whether it was ended for good."""
        return self._worker.closed

    def tokenize(self, text: str) -> int:
        """Return the number of tokens. Raises RefusedError if it takes too much time or memory."""
        return int(self._worker.ask({"text": text})["tokens"])

    def close(self) -> None:
        """End the process."""
        self._worker.close()
        self._file.close()


def work(file: int) -> None:
    """Load the tokenizer in the open `file`, and count the tokens of texts."""
    from tokenizers import Tokenizer

    limit_memory(LOAD_BYTES)
    signal.alarm(LOAD_SECONDS)
    tokenizer = Tokenizer.from_file(f"/proc/self/fd/{file}")
    signal.alarm(0)
    answer_all(lambda asked: ({"tokens": len(tokenizer.encode(asked["text"]))}, b""))
