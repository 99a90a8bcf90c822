"""What `serve` says of the INT8 kernel that will run."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.checkpoints import llama_tensors, write_checkpoint
from tests.command import cli
from tests.serve import fake_vllm
from tests.serve.launching import CONFIG, NO_KEYS
from w8a8 import machine, quantize
from w8a8.kernels.cpu import instructions
from w8a8.serve import int8_kernel
from w8a8.serve.installed import Installed
from w8a8.serve.int8_kernel import notice

VLLM = Installed(("vllm", "serve"), "0.32.0", "cuda", ray=False, plugin=True)
STOCK = replace(VLLM, plugin=False)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("W8A8_VLLM_PLUGIN", "VLLM_PLUGINS", "VLLM_ROCM_USE_AITER"):
        monkeypatch.delenv(name, raising=False)


def said(gpus: str, found: Installed | None, backend: str = "auto") -> str:
    sentence = notice(machine.describe(gpus), found, backend)
    assert sentence is not None
    return sentence


@pytest.mark.parametrize("gpus", ["4x24GiB:gfx1100", "32GiB:sm_120"])
def test_the_plugin_s_kernel_runs_where_it_is_installed(gpus: str) -> None:
    assert said(gpus, VLLM, "triton") == "INT8 kernel: w8a8's Triton kernel, by the plugin in this vLLM"
    assert said(gpus, VLLM) == said(gpus, VLLM, "triton")


def test_without_the_plugin_it_says_what_to_install() -> None:
    sentence = said("24GiB:gfx1100", STOCK, "triton")
    assert sentence.startswith("INT8 kernel: vLLM's Triton kernel;")
    assert "pip install 'w8a8[vllm]'" in sentence


def test_on_blackwell_it_warns_that_stock_vllm_dies() -> None:
    with_flag = said("32GiB:sm_120", STOCK, "triton")
    assert with_flag.startswith("INT8 kernel: vLLM's Triton kernel (without --linear-backend triton")
    assert "CUTLASS, which has no INT8 for sm_120, and dies" in with_flag
    assert "pip install 'w8a8[vllm]'" in with_flag
    for found in (STOCK, VLLM):
        assert "none for sm_120: vLLM will die; try --linear-backend triton" in said("32GiB:sm_120", found, "cutlass")
    assert "vLLM will die" in said("32GiB:sm_121", STOCK)


@pytest.mark.parametrize("found", [VLLM, STOCK, None])
def test_hopper_keeps_cutlass(found: Installed | None) -> None:
    assert said("141GiB:sm_90", found) == "INT8 kernel: vLLM's CUTLASS kernel"


def test_gpus_that_are_only_described_leave_the_plugin_open() -> None:
    assert said("24GiB:gfx1100", None) == (
        "INT8 kernel: w8a8's Triton kernel where its plugin is (pip install 'w8a8[vllm]' in vLLM's environment), "
        "else vLLM's Triton kernel"
    )


@pytest.mark.parametrize(
    ("variable", "value", "found", "mention"),
    [
        ("W8A8_VLLM_PLUGIN", "0", VLLM, "switched off by W8A8_VLLM_PLUGIN=0"),
        ("VLLM_PLUGINS", "another", VLLM, "not among VLLM_PLUGINS"),
        ("VLLM_PLUGINS", "another,w8a8", replace(VLLM, version="0.33.0"), "knows vLLM 0.32 alone, and this is 0.33.0"),
    ],
)
def test_it_says_why_the_plugin_is_not_active(
    variable: str, value: str, found: Installed, mention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    sentence = said("24GiB:gfx1100", found)
    assert sentence.startswith("INT8 kernel: vLLM's Triton kernel")
    assert mention in sentence


def test_aiter_is_said_where_it_is_switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ROCM_USE_AITER", "1")
    assert said("192GiB:gfx942", VLLM) == "INT8 kernel: AITER's kernel"


def test_nothing_is_said_of_what_is_not_known() -> None:
    assert notice(machine.describe("24GiB"), VLLM, "auto") is None
    assert notice((*machine.describe("24GiB:gfx1100"), *machine.describe("24GiB:sm_90")), VLLM, "auto") is None


@pytest.mark.parametrize("quantized", [True, False])
def test_serve_says_it_for_int8_checkpoints(quantized: bool, tmp_path: Path) -> None:
    source, target = write_checkpoint(tmp_path / "source", llama_tensors(), config=CONFIG), tmp_path / "quantized"
    quantize(source, target)
    model = target if quantized else source
    env = NO_KEYS | fake_vllm.install(tmp_path / "vllm", "0.32.0+cpu")
    done = cli("serve", model, "--dry-run", "--json", env=env)
    sentences = [sentence for sentence in json.loads(done.stdout)["notices"] if "INT8" in sentence]
    kernel = "INT8 kernel: vLLM's kernel for the CPU"
    expected = kernel if machine.cpu().multiplies_bytes else f"{kernel}{int8_kernel.INEXACT}"
    assert sentences == ([expected] if quantized else [])


@pytest.mark.parametrize("quantized", [True, False])
def test_serve_says_what_the_embedded_engine_multiplies_with(quantized: bool, tmp_path: Path) -> None:
    source, target = write_checkpoint(tmp_path / "source", llama_tensors(), config=CONFIG), tmp_path / "quantized"
    quantize(source, target)
    env = NO_KEYS | {"PATH": "", "W8A8_CPU": "generic"}
    done = cli("serve", target if quantized else source, "--dry-run", "--json", env=env)
    [sentence] = json.loads(done.stdout)["notices"]
    assert sentence.startswith("INT8 kernel: w8a8's for the CPU, ") == quantized
    assert ("(generic), exact" in sentence) == quantized
    assert "BF16 layers are computed in " in sentence


def test_vllm_s_int8_is_said_to_be_inexact_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for features, inexact in (("sse2 avx2", True), ("sse2 avx2 avx_vnni", False), ("asimd", False)):
        cpu = machine.Cpu("some", frozenset(features.split()), 2)
        monkeypatch.setattr(machine, "cpu", lambda cpu=cpu: cpu)
        assert (notice((), VLLM, "auto") or "").endswith(int8_kernel.INEXACT) == inexact


def test_what_bf16_layers_are_computed_in_follows_cpu_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    for features, dtype, computed in (
        ("sse2 avx2", "auto", "float32"),
        ("sse2 avx512bf16", "auto", "BF16"),
        ("sse2 avx512bf16", "float32", "float32"),
    ):
        has = frozenset(features.split())
        monkeypatch.setattr(instructions, "features", lambda has=has: has)
        assert (
            int8_kernel.embedded((), triton=False, int8=False, dtype=dtype) == f"BF16 layers are computed in {computed}"
        )


def test_on_gpus_the_embedded_engine_needs_triton() -> None:
    [gpu] = machine.describe("80GiB:sm_90")
    assert int8_kernel.embedded([gpu], triton=True, int8=True) == "INT8 kernel: w8a8's Triton kernel"
    assert "for want of Triton" in str(int8_kernel.embedded([gpu], triton=False, int8=True))


def test_only_a_missing_torch_means_that_nothing_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "w8a8.kernels.gpu.tiles", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert not int8_kernel._measured_faster("sm_120")
    monkeypatch.setitem(sys.modules, "w8a8.kernels.gpu.tiles", None)
    with pytest.raises(ModuleNotFoundError, match=r"w8a8\.kernels\.gpu\.tiles"):
        int8_kernel._measured_faster("sm_120")
