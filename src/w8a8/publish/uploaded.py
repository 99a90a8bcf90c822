"""Which files of a checkpoint's folder are uploaded: those that `w8a8.json` knows, and those of a rule here.

Nothing else leaves the machine. A folder that people work in holds keys, notes and other weights, and what no checksum
covers is not what was verified.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from w8a8.checkpoint.reader import INDEX, inside
from w8a8.checkpoint.sidecars import LeftOut
from w8a8.checkpoint.stream import file_sha256
from w8a8.errors import W8A8Error
from w8a8.evals.lm.results import read as read_lm
from w8a8.formats.provenance import PROVENANCE
from w8a8.publish.made import UNVERIFIED, Made
from w8a8.publish.results import read_gsm8k, read_kld

_BY_RULE = re.compile(
    r"""(?x)
    w8a8\.json | README\.md
  | (?i:licen[cs]e|notice|copying|use_policy)[^/.]*(\.(md|txt))?
  | report\.html | (report|figures)/[^/.][^/]*\.(html|png)
    """
)
"""The card, licenses that a person adds, and what `w8a8 report` writes; beside `w8a8.json` itself."""


@dataclass(frozen=True, slots=True)
class Files:
    """The files to upload, with their bytes; those that stay, and why; and what is wrong with files of `w8a8.json`."""

    upload: tuple[tuple[str, int], ...]
    left: tuple[LeftOut, ...]
    problems: tuple[str, ...]


def sort_folder(made: Made) -> Files:
    """Sort what lies in the folder, small files by their SHA-256; shards are taken as they are, and not read.

    Raises `PathEscapeError` for a link out of the folder.
    """
    recorded, shards = made.provenance.files, made.provenance.shards
    # Earlier versions recorded the shards alone.
    known = set(recorded) or {"config.json", INDEX, *made.checkpoint.sidecars}
    upload: list[tuple[str, int]] = []
    left: list[LeftOut] = []
    problems = [f"{name}: missing, but {PROVENANCE} names it" for name in recorded if not (made.path / name).exists()]
    for name in sorted(_entries(made.path)):
        path = made.path / name
        if _hidden(name):
            left.append(LeftOut(name, "hidden"))
            continue
        inside(made.path, name)
        if not path.is_file():
            left.append(LeftOut(name, "a link to a folder" if path.is_dir() else "not a regular file"))
        elif name in recorded and file_sha256(path) != recorded[name].sha256:
            problems.append(f"{name}: is not the file that was written (SHA-256 differs from {PROVENANCE})")
        elif name in known or name in shards or _BY_RULE.fullmatch(name) or _is_result(path):
            upload.append((name, path.stat().st_size))
        else:
            left.append(LeftOut(name, _reason(name)))
    return Files(tuple(upload), tuple(left), tuple(problems))


def _entries(folder: Path) -> Iterator[str]:
    """Name every file under `folder`, relative to it; of a hidden folder only itself, with a slash at the end."""
    for place, folders, files in os.walk(folder):
        here = Path(place).relative_to(folder)
        for name in list(folders):
            if name.startswith(".") or (Path(place) / name).is_symlink():
                folders.remove(name)
                yield (here / name).as_posix() + ("/" if name.startswith(".") else "")
        yield from ((here / name).as_posix() for name in files)


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _is_result(path: Path) -> bool:
    """Whether the file is a result of `w8a8 eval`, by its content."""
    if path.suffix != ".json":
        return False
    for read in (read_gsm8k, read_kld, read_lm):
        try:
            read(path)
        except W8A8Error:
            continue
        return True
    return False


def _reason(name: str) -> str:
    return f"{'weights ' if name.lower().endswith(UNVERIFIED) else ''}unknown to {PROVENANCE}"
