"""The terminal's side of `w8a8 chat`: read messages and commands, and show answers as they come."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from w8a8.errors import ServerError, UsageError, W8A8Error
from w8a8.serve.chat import Answer, Chat, data_url
from w8a8.terminal.output import json_text

HELP = """\
/image PATH   send an image with the next message (more than one: again)
/system TEXT  set the system prompt; without TEXT, none
/clear        forget the conversation
/exit         end, as does Ctrl-D; Ctrl-C stops an answer"""


def piped() -> str | None:
    """Return the text piped into standard input; None if that is a terminal."""
    return None if sys.stdin.isatty() else sys.stdin.read()


def once(chat: Chat, prompt: str, images: Sequence[str], *, as_json: bool) -> None:
    """Print one answer on standard output: its text as it comes, or JSON."""
    pieces = chat.ask(prompt, images)
    if as_json:
        for _ in pieces:
            pass
        print(json_text(asdict(_answered(chat))))
    else:
        _print(pieces)


def converse(chat: Chat, images: Sequence[str]) -> None:
    """Read messages and commands from the terminal until it ends."""
    import readline  # noqa: F401 - gives input() its history and its keys

    chat.notice(f"{chat.model}: /help for commands, Ctrl-D ends")
    waiting = list(images)
    while True:
        try:
            line = input("> ").strip()
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            print()
            return
        try:
            if line == "/exit":
                return
            if line.startswith("/"):
                _command(chat, line, waiting)
            elif line:
                _exchange(chat, line, waiting)
        except W8A8Error as error:
            chat.notice(f"error: {error}")


def _command(chat: Chat, line: str, waiting: list[str]) -> None:
    """Carry out a line that begins with a slash. Raises `UsageError` for one that is no command."""
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    match name:
        case "/help":
            print(HELP)
        case "/clear":
            chat.messages.clear()
            waiting.clear()
        case "/system":
            chat.system = argument or None
        case "/image" if argument:
            waiting.append(data_url(Path(argument).expanduser()))
            chat.notice(f"{len(waiting)} to send with the next message")
        case _:
            raise UsageError(f"{line}: no such command; /help lists them")


def _exchange(chat: Chat, line: str, waiting: list[str]) -> None:
    """Send a message with the images that wait for it, and show the answer, which Ctrl-C stops."""
    pieces = chat.ask(line, tuple(waiting))
    waiting.clear()  # sent, or refused: the next message starts anew
    stopped = ""
    try:
        _print(pieces)
    except KeyboardInterrupt:
        pieces.close()  # type: ignore[attr-defined]
        stopped = "stopped; "
        print()
    if chat.answer:
        chat.notice(stopped + chat.answer.speed)


def _print(pieces: Iterator[str]) -> None:
    """Show text as it comes, without characters that could move the cursor or start a control sequence."""
    for piece in pieces:
        print("".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in piece), end="", flush=True)
    print()


def _answered(chat: Chat) -> Answer:
    """Return the last answer. Raises `ServerError` if there is none."""
    if chat.answer is None:
        raise ServerError(f"{chat.client.base_url}: the server gave no answer")
    return chat.answer
