"""What the documents say is true."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from w8a8 import errors

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


def test_every_exit_code_is_documented_and_used_once() -> None:
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.W8A8Error)]
    codes = [c.exit_code for c in classes]
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", (ROOT / "docs/exit-codes.md").read_text(), re.M)}
    assert len(codes) == len(set(codes))
    assert set(codes) | {0} == documented


def test_every_path_the_documents_name_exists() -> None:
    for document in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")):
        for path in re.findall(r"`((?:src|tests|docs|scripts)/[\w./-]+)`", document.read_text()):
            assert (ROOT / path).exists(), f"{document.name} names {path}"


def test_the_documentation_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    quantize = (tmp_path / "site" / "commands" / "quantize" / "index.html").read_text()
    assert "--keep-bf16" in quantize
    assert "w8a8 quantize google/gemma-4-31b-it" in quantize
    assert "amax/127" in (tmp_path / "site" / "python" / "index.html").read_text()
