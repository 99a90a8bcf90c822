"""The real engines: stock vLLM in an environment of its own, built by scripts/make_vllm.py, and the embedded one."""

import warnings
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.engines.int8 import Int8Kernel
from tests.engines.layers import LARGEST, MODULES, Tried, relative_error, tried_in_vllm

ENVIRONMENT = Path(__file__).parents[2] / ".venv-vllm"


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """The Python of the environment that has vLLM for the CPU."""
    if not (ENVIRONMENT / "ready").is_file():
        pytest.skip("there is no environment with vLLM; python scripts/make_vllm.py .venv-vllm builds one")
    return ENVIRONMENT / "bin" / "python"


@pytest.fixture(scope="session")
def vllm_layers(
    gemma3_formats: Mapping[str, Path], vllm_python: Path, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Tried]:
    """Layers of the real model and two of our own, tried on vLLM's INT8 kernel."""
    return tried_in_vllm(gemma3_formats["quark"], vllm_python, tmp_path_factory)


@pytest.fixture(scope="session")
def vllm_int8(vllm_layers: Mapping[str, Tried]) -> Int8Kernel:
    """What vLLM's INT8 kernel computes on this CPU; a warning at the end of the test run says it too."""
    kernel = Int8Kernel(
        on_real_codes=max(relative_error(vllm_layers[name]) for name in MODULES),
        on_largest_codes=relative_error(vllm_layers[LARGEST]),
    )
    warnings.warn(str(kernel), stacklevel=1)
    return kernel
