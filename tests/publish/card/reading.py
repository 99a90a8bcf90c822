"""Read a card as the Hub and its visitors do."""

from typing import Any

from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

SECTIONS = [
    "Model Details",
    "Quantization Scheme",
    "Accuracy",
    "How to Use",
    "Hardware Requirements",
    "Quantization Details",
    "How to Reproduce",
    "Citation",
    "License",
    "Modified Files",
]


def rows(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table under `heading`, as they are shown."""
    tokens = MarkdownIt("commonmark").enable("table").parse(ModelCard(text).text)
    at = next(i for i, t in enumerate(tokens) if t.type == "inline" and shown(t) == heading)
    table: list[list[str]] = []
    for i, token in enumerate(tokens[at:], at):
        if token.type == "tr_open":
            table.append([])
        elif token.type in {"td_open", "th_open"}:
            table[-1].append(shown(tokens[i + 1]))
        elif token.type == "table_close":
            break
    return table


def shown(inline: Any) -> str:
    """The text a reader sees of an inline token."""
    return "".join(child.content for child in inline.children)


def blocks(text: str) -> list[str]:
    """The contents of the fenced blocks."""
    return [t.content for t in MarkdownIt("commonmark").parse(text) if t.type == "fence"]


def metadata(text: str) -> dict[str, Any]:
    """What the Hub reads."""
    return dict(ModelCard(text).data.to_dict())  # type: ignore[no-untyped-call]


def details(text: str) -> dict[str, str]:
    return {row[0]: row[1] for row in rows(text, "Model Details")}
