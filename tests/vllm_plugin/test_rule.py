"""The rule that places a kernel, and tells `serve` which one runs: it needs neither torch nor vLLM."""

import subprocess
import sys

import pytest

from w8a8.vllm_plugin.rule import AITER, CUTLASS, HUMMING, OURS, TRITON, aiter_asked_for, chosen, known


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1", "0.32.0+rocm700", "0.32.0+cu130", "0.32.0.post1", "0.32.11"])
def test_releases_of_0_32_are_known(version: str) -> None:
    assert known(version)


@pytest.mark.parametrize(
    "version", ["0.33.0", "0.31.2", "0.32", "0.32.0rc1", "0.32.1.dev7+gabc", "0.320.0", "1.0.32.0", "dev", ""]
)
def test_other_versions_are_not(version: str) -> None:
    assert not known(version)


@pytest.mark.parametrize(
    ("arch", "backend", "without", "with_ours"),
    [
        ("gfx1100", "auto", TRITON, OURS),
        ("gfx1151", "triton", TRITON, OURS),
        ("gfx942", "auto", TRITON, OURS),
        ("sm_80", "auto", CUTLASS, CUTLASS),
        ("sm_90", "auto", CUTLASS, CUTLASS),
        ("sm_90a", "triton", TRITON, OURS),
        ("sm_90", "humming", HUMMING, HUMMING),
        ("sm_90", "marlin", CUTLASS, CUTLASS),  # which has nothing for INT8
        ("sm_100", "auto", CUTLASS, OURS),
        ("sm_120", "auto", CUTLASS, OURS),
        ("sm_121", "triton", TRITON, OURS),
        ("sm_120", "cutlass", CUTLASS, CUTLASS),
        ("sm_75", "auto", CUTLASS, CUTLASS),
        ("sm_75", "triton", TRITON, TRITON),  # for which Triton does not compile
    ],
)
def test_ours_is_chosen_where_it_stands_first(arch: str, backend: str, without: str, with_ours: str) -> None:
    assert chosen(arch, ours=False, backend=backend) == without
    assert chosen(arch, ours=True, backend=backend) == with_ours


def test_a_measurement_puts_ours_first_on_nvidia() -> None:
    assert chosen("sm_90", ours=True, faster=True) == OURS
    assert chosen("sm_90", ours=False, faster=True) == CUTLASS
    assert chosen("sm_90", ours=True, faster=True, backend="cutlass") == CUTLASS
    assert chosen("sm_75", ours=True, faster=True) == CUTLASS


def test_aiter_stays_where_it_is_switched_on() -> None:
    on = {"VLLM_ROCM_USE_AITER": "1"}
    assert aiter_asked_for("gfx942", on)
    assert aiter_asked_for("gfx950", {"VLLM_ROCM_USE_AITER": "True"})
    assert not aiter_asked_for("gfx942", {})
    assert not aiter_asked_for("gfx942", on | {"VLLM_ROCM_USE_AITER_LINEAR": "0"})
    assert not aiter_asked_for("gfx1100", on)
    assert chosen("gfx942", ours=True, with_aiter=True) == AITER
    assert chosen("gfx942", ours=True, with_aiter=True, backend="triton") == OURS


def test_the_entry_point_loads_neither_torch_nor_vllm_until_it_is_called() -> None:
    code = (
        "import sys; from importlib.metadata import entry_points; "
        "(plugin,) = (p for p in entry_points(group='vllm.general_plugins') if p.name == 'w8a8'); "
        "assert callable(plugin.load()); print({'torch', 'vllm', 'triton', 'numba'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
