"""What `w8a8 doctor` says of machines that are made up: one sentence a line, and what to install."""

import json
from dataclasses import replace

import pytest

from w8a8.doctor.facts import EXTRAS, Facts, Torch
from w8a8.doctor.findings import Diagnosis, Line, diagnose
from w8a8.machine import Cpu, describe
from w8a8.serve.installed import Installed

DESKTOP = Cpu("AMD Ryzen 5 5600", frozenset({"sse2", "avx2", "f16c"}), 12)
SERVER = Cpu("AMD EPYC 9755", frozenset({"sse2", "avx2", "avx512f", "avx512_vnni", "avx512_bf16"}), 64)
ARM = Cpu("aarch64", frozenset({"asimd", "asimddp"}), 4)
BARE = Facts(
    cpu=DESKTOP,
    memory=33_000_000_000,
    available=30_000_000_000,
    read=38.7e9,
    gpus=(),
    python="3.12.1",
    packages={},
    unmet=dict.fromkeys(EXTRAS, ("torch>=2.8", "openai>=2")),
    torch=None,
    vllm=None,
    environment={},
)
WHOLE = replace(
    BARE,
    packages=dict.fromkeys(("torch", "triton", "ray", "s3fs", "gcsfs", "adlfs"), "1.0"),
    unmet=dict.fromkeys(EXTRAS, ()),
    torch=Torch("2.13.0+cpu", "cpu", threads=12),
)
CUDA = Torch("2.13.0", "cuda", threads=12, device=True)
VLLM = Installed(("/opt/vllm/bin/vllm", "serve"), "0.32.0", "cuda", ray=False, plugin=False)
H100, RTX, RADEON = (describe(text) for text in ("80GiB:sm_90", "2x32GiB:sm_120", "4x24GiB:gfx1100"))


def said(found: Diagnosis, about: str) -> str:
    [text] = [line.text for line in (*found.has, *found.uses) if line.about == about]
    return text


def commands(found: Diagnosis) -> list[str]:
    return [advice.command for advice in found.faster]


@pytest.mark.parametrize("facts", [BARE, WHOLE, replace(WHOLE, gpus=RADEON, vllm=VLLM), replace(BARE, cpu=ARM)])
def test_every_line_is_one_sentence_and_all_of_it_is_json(facts: Facts) -> None:
    found = diagnose(facts)
    for line in (*found.has, *found.uses):
        assert line.text.endswith(".")
        assert "\n" not in line.text
    values = json.loads(json.dumps(found.to_dict()))
    assert values["has"]["memory"] == said(found, "memory") == "33.0 GB, 30.0 GB of it free, read at 38.7 GB/s."
    assert values["facts"]["cpu"]["features"] == sorted(facts.cpu.features)


@pytest.mark.parametrize(
    ("cpu", "sentence"),
    [
        (DESKTOP, "AMD Ryzen 5 5600, 12 cores, with AVX2, without AVX-512, VNNI, AMX and BF16 arithmetic."),
        (SERVER, "AMD EPYC 9755, 64 cores, with AVX2, AVX-512, VNNI and BF16 arithmetic, without AMX."),
        (ARM, "aarch64, 4 cores, with sdot, without smmla and BF16 arithmetic."),
    ],
)
def test_of_a_processor_it_names_what_matters_for_int8_and_bf16(cpu: Cpu, sentence: str) -> None:
    assert said(diagnose(replace(BARE, cpu=cpu)), "processor") == sentence


def test_what_is_missing_is_named_with_the_command_that_installs_it() -> None:
    found = diagnose(BARE)
    assert said(found, "serve, chat") == "Not yet, for want of torch>=2.8, openai>=2: pip install 'w8a8[serve]'."
    assert "pip install 'w8a8[eval]'" in said(found, "quantize --recipe, eval kld")
    assert "pip install 'w8a8[publish]'" in said(found, "card, report")
    assert said(found, "object stores") == "For s3://, gs:// and az://: pip install 'w8a8[s3,gs,az]'."
    some = diagnose(replace(BARE, packages={"s3fs": "2025.3"}))
    assert said(some, "object stores") == "Opens s3://; for gs:// and az://: pip install 'w8a8[gs,az]'."


def test_the_embedded_engine_serves_where_there_is_no_vllm() -> None:
    assert said(diagnose(WHOLE), "serve, chat").startswith("The embedded engine on the CPU; ")
    assert diagnose(WHOLE).faster == ()
    on_gpu = diagnose(replace(WHOLE, gpus=H100, torch=CUDA))
    assert said(on_gpu, "serve, chat").endswith(
        "on 1 x 80 GiB sm_90 (sm_90, 85.9 GB); INT8 kernel: w8a8's Triton kernel."
    )
    assert commands(on_gpu) == ["pip install vllm"]


def test_vllm_serves_where_it_has_a_device() -> None:
    found = diagnose(replace(WHOLE, gpus=H100, torch=CUDA, vllm=VLLM))
    assert said(found, "serve, chat").startswith("vLLM on 1 x 80 GiB sm_90")
    assert "CUTLASS" in said(found, "serve, chat")
    assert said(found, "vLLM") == "0.32.0, built for NVIDIA's GPUs, without our plugin, in /opt/vllm."
    assert found.faster == ()
    without = diagnose(replace(WHOLE, vllm=VLLM))
    assert said(without, "serve, chat").startswith("The embedded engine on the CPU; ")


def test_what_would_be_faster_on_gpus_has_its_exact_command() -> None:
    blackwell = replace(WHOLE, gpus=RTX, torch=CUDA, vllm=VLLM)
    assert commands(diagnose(blackwell)) == ["/opt/vllm/bin/python -m pip install 'w8a8[vllm]'"]
    assert commands(diagnose(replace(blackwell, vllm=replace(VLLM, plugin=True)))) == []
    assert "pip install --upgrade --force-reinstall torch" in commands(diagnose(replace(WHOLE, gpus=H100)))
    no_triton = replace(WHOLE, gpus=H100, torch=CUDA, vllm=VLLM, packages={})
    assert commands(diagnose(no_triton)) == ["pip install triton"]


def test_a_variable_that_holds_threads_back_is_pointed_out() -> None:
    held = replace(WHOLE, torch=Torch("2.13.0+cpu", "cpu", threads=1), environment={"OMP_NUM_THREADS": "1"})
    [advice] = diagnose(held).faster
    assert advice.why == "OMP_NUM_THREADS keeps torch to 1 thread on 12 cores."
    assert advice.command == "unset OMP_NUM_THREADS"
    assert diagnose(replace(held, environment={})).faster == ()


def test_a_torch_that_does_not_import_is_said_with_its_own_words() -> None:
    broken = Torch("2.13.0", "cuda", problem="does not import: OSError: libcudart.so.13")
    assert (
        Line("torch", "2.13.0 does not import: OSError: libcudart.so.13.") in diagnose(replace(WHOLE, torch=broken)).has
    )
