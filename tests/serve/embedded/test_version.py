"""The embedded engine runs with the transformers it was made for, and says so of any other."""

import tomllib
from pathlib import Path

import pytest

from tests.command import python
from w8a8.serve.embedded import TRANSFORMERS

pytestmark = pytest.mark.slow

PROJECT = Path(__file__).parents[3] / "pyproject.toml"


def pretend(folder: Path, version: str) -> dict[str, str]:
    """An environment in which transformers is of `version`, as far as its metadata tell."""
    metadata = folder / f"transformers-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: transformers\nVersion: {version}\n")
    return {"PYTHONPATH": f"{folder}:{PROJECT.parent / 'src'}"}


@pytest.mark.parametrize("version", ["5.24.0", "5.22.2", "6.0.0.dev0", "5"])
def test_another_version_is_refused_with_what_to_install(version: str, tmp_path: Path) -> None:
    done = python("-c", "import w8a8.serve.embedded.server", env=pretend(tmp_path, version))
    assert f"MissingExtraError: transformers {version} is installed" in done.stderr
    assert "pip install 'transformers[serving]==5.23.*'" in done.stderr


@pytest.mark.parametrize("version", ["5.23.0", "5.23.7"])
def test_its_own_version_is_accepted(version: str, tmp_path: Path) -> None:
    done = python("-c", "import w8a8.serve.embedded", env=pretend(tmp_path, version))
    assert done.returncode == 0, done.stderr


def test_the_extra_asks_for_the_version_that_is_accepted() -> None:
    extra = tomllib.loads(PROJECT.read_text())["project"]["optional-dependencies"]["serve"]
    major, minor = map(int, TRANSFORMERS.split("."))
    assert f"transformers[serving]>={major}.{minor},<{major}.{minor + 1}" in extra
