"""Real models, made once per test session; tests must not write to them."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

import w8a8
from w8a8.formats import FORMATS

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_gemma.py"


@pytest.fixture(scope="session")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real Gemma 3 270M, BF16, four shards."""
    folder = tmp_path_factory.mktemp("real") / "gemma-3-270m"
    subprocess.run([sys.executable, str(SCRIPT), str(folder)], check=True)
    return folder


@pytest.fixture(scope="session")
def gemma3_formats(gemma3: Path) -> Mapping[str, Path]:
    """The real Gemma 3 270M quantized, by format."""
    outs = {name: gemma3.with_name(f"gemma-3-270m-{name}") for name in FORMATS}
    for name, out in outs.items():
        w8a8.quantize(gemma3, out, format=name)
    return outs


@pytest.fixture(scope="session", params=FORMATS)
def gemma3_w8a8(request: pytest.FixtureRequest, gemma3_formats: Mapping[str, Path]) -> Path:
    """The real Gemma 3 270M quantized, in each format."""
    return gemma3_formats[request.param]
