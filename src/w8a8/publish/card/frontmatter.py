"""The metadata of a README, the YAML block between `---` lines before its text, read and written without a change.

YAML 1.1 turns `no` into false, `0x10` into 16 and `2024-01-01` into a date. Here every value is text, and entries that
a person wrote are copied as lines: nothing is parsed and spelled anew but what `w8a8 card` owns.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from w8a8.errors import UsageError
from w8a8.publish.card.text import README

if TYPE_CHECKING:
    from yaml import MappingNode  # type: ignore[import-untyped]

MAX_CHARACTERS = 2_000_000
"""The longest real ones list thousands of results."""

_MEND = "fix them, one `key: value` a line"


def metadata_of(text: str) -> Mapping[str, str | list[str]]:
    """Return the texts and the lists of texts in a README's metadata. Raises `UsageError` where they are no YAML."""
    root = _compose(_block(text))
    found = {key.value: _plain(value) for key, value in (root.value if root else ())}
    return {key: value for key, value in found.items() if value is not None}


def entries_but(text: str, keys: Collection[str]) -> str:
    """Return the entries of a README's metadata as they stand, comments included, without those of `keys`.

    Raises `UsageError` where the block is no YAML, or where an entry means another thing without the others.
    """
    block = _block(text)
    root = _compose(block)
    if root is None:
        return _ended(block)
    kept = "".join(_spans(block, root, keys))
    if _meanings(_compose(kept)) != [(key, value) for key, value in _meanings(root) if key not in keys]:
        raise UsageError(f"{README}: the metadata between the --- lines cannot be kept as they are; {_MEND}")
    return kept


def with_metadata(text: str, metadata: Mapping[str, Any], others: str = "") -> str:
    """Return the whole README: the entries `others` as they are, `metadata`, and `text`."""
    from huggingface_hub import CardData

    return f"---\n{others}{CardData(**metadata).to_yaml()}\n---\n{text}"


def _plain(node: Any) -> str | list[str] | None:
    if isinstance(node.value, str):
        return node.value
    texts = [child.value for child in node.value if not isinstance(child, tuple) and isinstance(child.value, str)]
    return texts if len(texts) == len(node.value) else None


def _block(text: str) -> str:
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    found = REGEX_YAML_BLOCK.search(text)
    return str(found.group(2)) if found else ""


def _compose(block: str) -> "MappingNode | None":
    """Parse into nodes that know their places; None where there is nothing but comments."""
    from yaml import BaseLoader, MappingNode, YAMLError, compose

    try:
        if len(block) > MAX_CHARACTERS:
            raise YAMLError(f"more than {MAX_CHARACTERS:,} characters")
        root = compose(block, Loader=BaseLoader)
    except (YAMLError, RecursionError) as error:
        said = " ".join(str(error).split())[:200]  # its second line says where
        raise UsageError(f"{README}: the metadata between the --- lines are not YAML ({said}); {_MEND}") from error
    if root is not None and not isinstance(root, MappingNode):
        raise UsageError(f"{README}: the metadata between the --- lines are not keys and values; {_MEND}")
    return root


def _spans(block: str, root: "MappingNode", keys: Collection[str]) -> Iterator[str]:
    """Yield the text of each entry up to the next, that of `keys` left out."""
    if root.flow_style:
        for key, value in root.value:
            if key.value not in keys:
                yield block[key.start_mark.index : value.end_mark.index] + "\n"
        return
    starts = [key.start_mark.index - key.start_mark.column for key, _ in root.value]
    yield block[: starts[0]]
    for (key, _), start, end in zip(root.value, starts, [*starts[1:], len(block)], strict=True):
        if key.value not in keys:
            yield _ended(block[start:end])


def _ended(lines: str) -> str:
    return lines if not lines or lines.endswith(("\n", "\r")) else f"{lines}\n"


def _meanings(root: "MappingNode | None") -> list[tuple[str, int]]:
    """The keys with a hash of what they mean: an alias may stand for a hundred thousand values, or for itself."""
    seen: dict[int, int] = {}
    return [(key.value, _meaning(value, seen)) for key, value in (root.value if root else ())]


def _meaning(node: Any, seen: dict[int, int]) -> int:
    if isinstance(node, tuple):
        return hash(tuple(_meaning(child, seen) for child in node))
    if id(node) not in seen:
        seen[id(node)] = 0
        value = node.value if isinstance(node.value, str) else tuple(_meaning(child, seen) for child in node.value)
        seen[id(node)] = hash((node.tag, getattr(node, "style", None), value))
    return seen[id(node)]
