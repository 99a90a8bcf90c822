"""What takes long to make, made once for all processes of a test run."""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The path `name`, alone in a folder of this run: `make(path)` writes it for the first that asks, others wait."""
    base = factory.getbasetemp()
    run = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # a worker's folder lies in the run's
    home = run / "shared" / name
    home.mkdir(parents=True, exist_ok=True)
    path, whole = home / name, home / "whole"
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not whole.exists():
            shutil.rmtree(path, ignore_errors=True)
            make(path)
            whole.touch()
    return path
