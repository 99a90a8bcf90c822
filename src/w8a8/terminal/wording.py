"""Words and numbers as people read them: bytes, counts, plurals, names that may hold anything."""

from collections.abc import Sequence

from rich import markup


def size(nbytes: float) -> str:
    """Write bytes for people, in powers of 1000: `33.1 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def count(number: float) -> str:
    """Write a number of parameters for people: `31.2B`."""
    for unit in ("", "K", "M"):
        if number < 1000:
            return f"{number:.0f}" if not unit else f"{number:.1f}{unit}"
        number /= 1000
    return f"{number:.2f}B"


def duration(seconds: float) -> str:
    """Write a time for people: `45 s`, `12 min`, `3 h 20 min`, `2 d 4 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def plural(number: int, what: str) -> str:
    """Write a count and its noun: `1 shard`, `2 shards`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def first_few(names: Sequence[str], shown: int = 3) -> str:
    """List the first few of many names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return clean(", ".join(names[:shown])) + more


def printable(text: str) -> str:
    """Spell out what could move the cursor or start a line: names in a checkpoint may hold anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def clean(text: str) -> str:
    """Make `text` safe to put between Rich markup."""
    return markup.escape(printable(text))
