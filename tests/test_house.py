"""The house: rooms in one order, imports that only go down it, no circles, and files that fit in the head.

The order is written once, in CONTRIBUTING.md, top to bottom. Imports are read from the source, those inside functions
and those for type checkers included.
"""

import ast
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "w8a8"
LINES = 400
"""The most that a file of code may have."""


@cache
def floors() -> Mapping[str, int]:
    """Room -> its floor, 0 at the top, from CONTRIBUTING's list of rooms; rooms on one line share a floor."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = text.split("## The rooms", 1)[1].split("## ", 1)[0]
    lines = re.findall(r"^ {6}(\w[\w/., ]*?)(?: {2,}.*)?$", listed, re.MULTILINE)
    names = [re.findall(r"\w+", line.replace(".py", "")) for line in lines]
    return {name: floor for floor, rooms in enumerate(names) for name in rooms}


@cache
def modules() -> Mapping[str, Path]:
    """Dotted name below w8a8 -> file; the package itself and `python -m` stand above all rooms."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {name: path for name, path in found.items() if name not in {"", "__main__"}}


def files() -> Iterator[Path]:
    """Every file of code: the package, its tests and the scripts."""
    for folder in (PACKAGE, ROOT / "tests", ROOT / "scripts"):
        yield from folder.rglob("*.py")


@cache
def imports(module: str) -> frozenset[str]:
    """The modules of w8a8 that `module` imports, anywhere in its file."""
    return frozenset(_imports(module))


def _imports(module: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(modules()[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.split(".")[0] == "w8a8":
            below = node.module.removeprefix("w8a8").lstrip(".")
            for alias in node.names:
                name = f"{below}.{alias.name}".lstrip(".")
                yield name if name in modules() else below
        elif isinstance(node, ast.Import):
            yield from (a.name.removeprefix("w8a8").lstrip(".") for a in node.names if a.name.split(".")[0] == "w8a8")


def room(module: str) -> str:
    return module.split(".")[0]


def test_every_module_has_a_room_and_every_room_is_there() -> None:
    assert {room(module) for module in modules()} == set(floors())


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_go_down(module: str) -> None:
    up = [n for n in imports(module) if not _below(n, module)]
    assert up == [], f"{module} imports from above; CONTRIBUTING.md has the order of the rooms"


def _below(imported: str, module: str) -> bool:
    """Whether `imported` lies in the room of `module` or further down; rooms that share a floor stay apart."""
    if imported == "":  # the package as a whole: its public names
        return room(module) in {"bench", "cli"}
    return room(imported) == room(module) or floors()[room(imported)] > floors()[room(module)]


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {m: {n for n in imports(m) if n != m and n in modules() and not _packs(n, m)} for m in modules()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


def _packs(package: str, module: str) -> bool:
    """Whether `package` is the folder that `module` lies in."""
    return module.startswith(f"{package}.")


@pytest.mark.parametrize("file", sorted(str(path.relative_to(ROOT)) for path in files()))
def test_a_file_fits_in_the_head(file: str) -> None:
    lines = len((ROOT / file).read_text(encoding="utf-8").splitlines())
    assert lines <= LINES, f"{file} has {lines} lines; split it by what it does"


def test_a_prefix_that_is_a_room_is_a_folder() -> None:
    for folder in [PACKAGE, *(path for path in PACKAGE.rglob("*") if path.is_dir())]:
        prefixes = Counter(path.stem.split("_")[0] for path in folder.glob("*_*.py") if not path.stem.startswith("_"))
        assert [prefix for prefix, count in prefixes.items() if count > 1] == [], folder


def test_links_are_followed_by_os_alone() -> None:
    """By `reading.real`: `Path.resolve` raises RuntimeError for a link to itself, below Python 3.13."""
    calls = [str(path) for path in PACKAGE.rglob("*.py") if ".resolve()" in path.read_text(encoding="utf-8")]

    assert not calls
