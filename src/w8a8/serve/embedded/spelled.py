"""Single tokens as text and as bytes, for log-probabilities: what several spell together is an answer's text."""

import re
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

BYTES = {character: byte for byte, character in bytes_to_unicode().items()}
"""Characters that stand for bytes in the names of a byte-level vocabulary's tokens."""

CUT = "\N{REPLACEMENT CHARACTER}"
"""Stands in a text for bytes that are a part of a character."""

_BYTE = re.compile("<0x([0-9A-F]{2})>")


def spell(tokenizer: Any, token: int) -> str:
    """Spell a token as it stands behind another: some decoders drop the space before a first one.

    `tokenizer` is that of the `tokenizers` library.
    """
    once, twice = (str(tokenizer.decode([token] * n, skip_special_tokens=False)) for n in (1, 2))
    return twice.removeprefix(once) if twice.startswith(once) else once


def spell_bytes(tokenizer: Any, token: int) -> list[int]:
    """Spell a token as bytes of UTF-8, also one that is a part of a character."""
    text = spell(tokenizer, token)
    name = tokenizer.id_to_token(token) or ""
    if CUT not in text:
        return list(text.encode())
    if found := _BYTE.fullmatch(name):
        return [int(found[1], 16)]
    return [BYTES[character] for character in name] if BYTES.keys() >= {*name} else list(text.encode())
