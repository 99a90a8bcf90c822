"""Pages of the documentation that are made while it is built, so that they cannot go stale.

mkdocs calls `on_files` (see `hooks` in mkdocs.yml): a page for every command, from its own help; the front page, from
README.md; and the page for contributors, from CONTRIBUTING.md.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages that are made here."""
    pages = {
        "index.md": front_page((ROOT / "README.md").read_text(encoding="utf-8")),
        "tasks/contribute.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
        **{f"commands/{name}.md": text for name, text in command_pages().items()},
    }
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def front_page(readme: str) -> str:
    """README.md with its links as they are from within docs/."""
    inside = re.sub(r"\]\(docs/", "](", readme)
    inside = re.sub(r'(src|srcset)="docs/', r'\1="', inside)
    return inside.replace("](CONTRIBUTING.md", "](tasks/contribute.md")


def command_pages() -> dict[str, str]:
    """The help of every command as Markdown, by the command's name; groups have one page with all their commands."""
    import typer
    from typer.cli import get_docs_for_click

    from w8a8.cli import app

    group: Any = typer.main.get_command(app)
    context = typer.Context(group, info_name="w8a8")
    return {
        name: get_docs_for_click(obj=command, ctx=context, name=name, call_prefix="w8a8")
        for name, command in group.commands.items()
    }
