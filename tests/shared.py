"""What takes long to make, made once for all processes of a test run."""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The path `name`, beside others: `make(path)` writes it for the first of this run that asks, others wait."""
    base = factory.getbasetemp()
    run = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # a worker's folder lies in the run's
    path, made = run / "shared" / name, run / "shared-made"
    for folder in (path.parent, made):
        folder.mkdir(exist_ok=True)
    with (made / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (made / name).exists():
            shutil.rmtree(path, ignore_errors=True)
            make(path)
            (made / name).touch()
    return path
