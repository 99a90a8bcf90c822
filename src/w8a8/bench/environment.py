"""Virtual environments of this tool's peers: built once, each in a folder of its own."""

import subprocess
import venv
from collections.abc import Sequence
from pathlib import Path

from w8a8.bench.process import last_line
from w8a8.errors import W8A8Error

TORCH = "torch==2.13.0"
"""Installed first, and pinned in every later step: an unpinned one would bring the newest CUDA build."""


def built(home: Path, *steps: Sequence[str]) -> Path:
    """Return the Python of the environment `home`, after building it if needed: the packages of each step in turn.

    Raises W8A8Error with pip's reason if it cannot be built.
    """
    python = home / "bin" / "python"
    if not (home / "ready").exists():
        venv.create(home, with_pip=True, clear=True)
        for packages in steps:
            pip = [str(python), "-m", "pip", "install", "--quiet", *packages]
            try:
                subprocess.run(pip, check=True, capture_output=True, text=True)
            except subprocess.CalledProcessError as error:
                raise W8A8Error(f"its environment could not be built: {last_line(error.stderr or '')}") from error
        (home / "ready").touch()
    return python
