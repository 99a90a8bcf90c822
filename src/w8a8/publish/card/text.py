"""The text of a card: the template, escaping, and what a person wrote into the card before.

Every name may hold anything, so all values in the template are escaped unless they are `Verbatim`.
"""

import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from w8a8.errors import MissingExtraError, UsageError, first_line
from w8a8.reading import MAX_TEXT_BYTES, read_bytes, reading
from w8a8.terminal.wording import count, plural, printable, size

README = "README.md"
STAMP = "<!-- Written by `w8a8 card`, and written anew by it: only what stands between `yours` lines is kept. -->"

_MARKER = re.compile(r"<!-- yours: (?P<what>begin|end) (?P<place>[a-z]+) -->")
_MEND = "mend the marked lines; the file was not changed"


class Verbatim(str):
    """Text that is Markdown already, and not escaped."""

    __slots__ = ()


def _escaped(value: Any) -> str:
    """Return a value as Markdown that shows it literally, in a table too."""
    if isinstance(value, Verbatim):
        return value
    text = printable(str(value)).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_{}\[\]|~$])", r"\\\1", text)
    return re.sub(r"^(\s*)(\d*)([#+=.)-])(?=\s|\3|$)", r"\1\2\\\3", text)  # or a heading or a list would begin


def _code(text: str, language: str) -> str:
    """Return a fenced block that nothing in `text` can close."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return Verbatim(f"{fence}{language}\n{text}\n{fence}")


def render(context: Mapping[str, Any]) -> str:
    """Fill in the template; a name that `context` lacks is an error. Raises `MissingExtraError`."""
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise MissingExtraError("`w8a8 card` needs Jinja: pip install 'w8a8[publish]'") from error
    environment = Environment(
        undefined=StrictUndefined,
        finalize=_escaped,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals.update(code=_code)
    environment.filters.update(size=size, count=count, plural=plural, printable=printable)
    template = files("w8a8.publish.card").joinpath("card.md.jinja").read_text(encoding="utf-8")
    return environment.from_string(template).render(context)


# --- the card that is there ---------------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    """Read a README as it stands, with its line ends; empty where there is none. Raises `UsageError` if it is none."""
    try:
        with reading(path):
            return read_bytes(path, MAX_TEXT_BYTES).decode("utf-8-sig") if path.exists() else ""
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text ({first_line(error)}); move the file away") from error


def is_ours(text: str) -> bool:
    """True if `w8a8 card` wrote this README."""
    return STAMP in text.splitlines()


def kept(text: str) -> dict[str, str]:
    """Return what a person wrote, by place. Raises `UsageError` where the marked lines do not come in pairs."""
    kept: dict[str, str] = {}
    place, lines = "", list[str]()
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        marker = _MARKER.fullmatch(line.strip())
        if marker is None and not line.strip().startswith("<!-- yours:"):
            lines.append(line)
            continue
        beginning = marker is not None and marker["what"] == "begin" and not place and marker["place"] not in kept
        ending = marker is not None and marker["what"] == "end" and place == marker["place"]
        if marker is None or not (beginning or ending):
            raise UsageError(f"{README}: line {number}, {line.strip()[:80]!r}, has no partner; {_MEND}")
        if ending:
            kept[place] = "".join(lines)
        place, lines = (marker["place"] if beginning else ""), []
    if place:
        raise UsageError(f"{README}: `yours: begin {place}` has no end; {_MEND}")
    return kept


class Places:
    """The places for a person's text, which the template fills one by one."""

    def __init__(self, kept: Mapping[str, str]) -> None:
        self._kept = dict(kept)

    def __call__(self, place: str) -> str:
        """Return a place's marked lines, with the text kept between them."""
        return Verbatim(f"<!-- yours: begin {place} -->\n{self._kept.pop(place, '')}<!-- yours: end {place} -->")

    @property
    def unused(self) -> list[str]:
        """Places with text that the template does not have."""
        return [place for place, text in self._kept.items() if text.strip()]
