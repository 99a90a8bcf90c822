"""GPUs as they report themselves (recorded output, the amdgpu driver's files) and as users say; processors."""

import os
import platform
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from w8a8 import machine
from w8a8.errors import UsageError
from w8a8.machine import (
    Gpu,
    amd_gpus,
    available_memory,
    cpu,
    describe,
    detect,
    find,
    parse_nvidia_smi,
    total_memory,
    usable_cores,
)

NVIDIA_SMI = """\
NVIDIA H200, 143771, 9.0
NVIDIA GeForce RTX 4090, 24564, 8.9
NVIDIA RTX PRO 6000 Blackwell Workstation Edition, 97887, 12.0
"""

KFD_CPU = """\
cpu_cores_count 24
simd_count 0
mem_banks_count 1
caches_count 0
gfx_target_version 0
vendor_id 0
device_id 0
drm_render_minor 0
"""

KFD_GPU = """\
cpu_cores_count 0
simd_count 192
mem_banks_count 1
caches_count 206
io_links_count 1
lds_size_in_kb 64
wave_front_size 32
array_count 12
simd_per_cu 2
gfx_target_version {version}
vendor_id 4098
device_id 29772
location_id 768
drm_render_minor {minor}
hive_id 0
num_sdma_engines 2
max_engine_clk_fcompute 2526
unique_id 11245120419827142655
"""


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def amdgpu(root: Path, *gpus: tuple[int, int, str]) -> None:
    """The driver's files for a CPU and GPUs of (gfx_target_version, bytes, product name)."""
    nodes = root / "sys/class/kfd/kfd/topology/nodes"
    write(nodes / "0/properties", KFD_CPU)
    for i, (version, memory, name) in enumerate(gpus):
        minor = 128 + i
        write(nodes / f"{i + 1}/properties", KFD_GPU.format(version=version, minor=minor))
        write(root / f"sys/class/drm/renderD{minor}/device/mem_info_vram_total", f"{memory}\n")
        write(root / f"sys/class/drm/renderD{minor}/device/product_name", f"{name}\n")
        write(root / f"dev/dri/renderD{minor}", "")


XTX = (110000, 25753026560, "Navi 31 [Radeon RX 7900 XTX]")


def nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put an executable of that name first on PATH."""
    tool = folder / "nvidia-smi"
    tool.write_text("#!/bin/sh\n" + script)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    for variable in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        monkeypatch.delenv(variable, raising=False)


def test_nvidia_smi_is_read() -> None:
    assert parse_nvidia_smi(NVIDIA_SMI) == (
        Gpu("NVIDIA H200", 143771 * 2**20, "sm_90", "nvidia"),
        Gpu("NVIDIA GeForce RTX 4090", 24564 * 2**20, "sm_89", "nvidia"),
        Gpu("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 97887 * 2**20, "sm_120", "nvidia"),
    )


@pytest.mark.parametrize("text", ["", "No devices were found\n", "NVIDIA GB10, [N/A], 12.1\n", "a,b,c\n,,\n"])
def test_what_nvidia_smi_prints_instead_of_gpus_is_none(text: str) -> None:
    assert parse_nvidia_smi(text) == ()


@given(st.text())
def test_no_output_of_a_tool_breaks_the_parser(text: str) -> None:
    parse_nvidia_smi(text)


def test_nvidia_smi_is_asked_for_the_visible_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(
        tmp_path,
        monkeypatch,
        'case "$1" in --id=1) echo "NVIDIA B, 24564, 8.9";; *) echo "NVIDIA A, 24564, 8.9";; esac',
    )
    assert [gpu.name for gpu in detect(tmp_path)] == ["NVIDIA A"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert [gpu.name for gpu in detect(tmp_path)] == ["NVIDIA B"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert detect(tmp_path) == ()


@pytest.mark.parametrize(
    "script", ['echo "NVIDIA-SMI has failed because it could not communicate with the driver"; exit 9', "kill -9 $$"]
)
def test_a_driver_that_does_not_answer_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    nvidia_smi(tmp_path, monkeypatch, script)
    assert detect(tmp_path) == ()


def test_an_nvidia_smi_that_hangs_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, monkeypatch, "exec sleep 20")
    monkeypatch.setattr(machine, "_NVIDIA_SECONDS", 0.2)
    assert detect(tmp_path) == ()


def test_amd_gpus_are_read_from_the_drivers_files(tmp_path: Path) -> None:
    amdgpu(tmp_path, XTX, XTX)
    assert amd_gpus(tmp_path, {}) == (Gpu("Navi 31 [Radeon RX 7900 XTX]", 25753026560, "gfx1100", "amd"),) * 2


@pytest.mark.parametrize(
    ("version", "arch", "rdna"),
    [
        (90010, "gfx90a", False),
        (90402, "gfx942", False),
        (90500, "gfx950", False),
        (100300, "gfx1030", True),
        (110501, "gfx1151", True),
        (120001, "gfx1201", True),
    ],
)
def test_versions_of_the_driver_are_compilers_architectures(
    tmp_path: Path, version: int, arch: str, rdna: bool
) -> None:
    amdgpu(tmp_path, (version, 2**36, ""))
    (gpu,) = amd_gpus(tmp_path, {})
    assert (gpu.arch, gpu.name, gpu.is_rdna) == (arch, f"AMD {arch}", rdna)


def test_ten_gpus_keep_the_drivers_order(tmp_path: Path) -> None:
    amdgpu(tmp_path, *((110000, 2**34 + i, "") for i in range(12)))
    assert [gpu.memory - 2**34 for gpu in amd_gpus(tmp_path, {})] == list(range(12))


@pytest.mark.parametrize(
    ("environment", "left"),
    [
        ({"HIP_VISIBLE_DEVICES": "2,0"}, [2, 0]),
        ({"ROCR_VISIBLE_DEVICES": "1,2", "HIP_VISIBLE_DEVICES": "1"}, [2]),
        ({"CUDA_VISIBLE_DEVICES": ""}, []),
        ({"HIP_VISIBLE_DEVICES": "-1"}, []),
        ({"HIP_VISIBLE_DEVICES": "7"}, []),
        ({"ROCR_VISIBLE_DEVICES": "GPU-9c0f3a"}, [0, 1, 2]),
    ],
)
def test_gpus_that_the_environment_hides_do_not_count(
    tmp_path: Path, environment: Mapping[str, str], left: list[int]
) -> None:
    amdgpu(tmp_path, *((110000, 2**34 + i, "") for i in range(3)))
    assert [gpu.memory - 2**34 for gpu in amd_gpus(tmp_path, environment)] == left


def test_a_gpu_without_a_device_file_does_not_count(tmp_path: Path) -> None:
    amdgpu(tmp_path, XTX, XTX)
    (tmp_path / "dev/dri/renderD128").unlink()
    assert len(amd_gpus(tmp_path, {})) == 1


def test_the_gpu_inside_a_cpu_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    amdgpu(tmp_path, XTX, (100306, 512 * 2**20, ""))
    nvidia_smi(tmp_path, monkeypatch, "exit 9")
    assert [gpu.arch for gpu in detect(tmp_path)] == ["gfx1100"]


def test_a_machine_without_gpus_has_none(tmp_path: Path) -> None:
    assert amd_gpus(tmp_path, {}) == ()


@pytest.mark.parametrize(
    ("text", "count", "memory", "arch"),
    [
        ("4x24GiB:gfx1100", 4, 24 * 2**30, "gfx1100"),
        ("24GiB", 1, 24 * 2**30, ""),
        ("2x48GB", 2, 48 * 10**9, ""),
        ("1x141GiB:sm_90", 1, 141 * 2**30, "sm_90"),
        ("7.5GB:gfx90a", 1, 7_500_000_000, "gfx90a"),
    ],
)
def test_a_description_is_read(text: str, count: int, memory: int, arch: str) -> None:
    gpus = describe(text)
    assert [(gpu.memory, gpu.arch) for gpu in gpus] == [(memory, arch)] * count
    assert {gpu.vendor for gpu in gpus} == {"amd" if arch[:1] == "g" else "nvidia" if arch else ""}


@pytest.mark.parametrize(
    "text",
    ["", "4x", "24", "24G", "24 GiB", "0x24GiB", "65x24GiB", "4x0GiB", "-1x24GiB", "24GiB:", "24GiB:h100", "infGiB"],
)
def test_a_garbled_description_is_refused_with_examples(text: str) -> None:
    with pytest.raises(UsageError, match="4x24GiB:gfx1100"):
        describe(text)


def test_a_count_multiplies_what_is_described_or_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find("24GiB:gfx1100", 4) == describe("4x24GiB:gfx1100")
    assert find("2x48GB", None) == describe("2x48GB")
    with pytest.raises(UsageError, match="has a count already; leave out --count 4"):
        find("2x48GB", 4)
    nvidia_smi(tmp_path, monkeypatch, 'echo "A, 24564, 8.9"; echo "B, 16380, 8.9"')
    assert [gpu.name for gpu in find(None, None)] == ["A", "B"]
    assert [gpu.name for gpu in find(None, 4)] == ["B"] * 4


MEMINFO = "MemTotal:       32768000 kB\nMemFree:         1024000 kB\nMemAvailable:   16384000 kB\n"


def test_available_memory_is_the_kernels_figure_without_a_limit(tmp_path: Path) -> None:
    write(tmp_path / "proc/meminfo", MEMINFO)
    write(tmp_path / "proc/self/cgroup", "0::/user.slice\n")
    write(tmp_path / "sys/fs/cgroup/user.slice/memory.max", "max\n")
    assert available_memory(tmp_path) == 16384000 * 1024


@pytest.mark.parametrize(
    ("line", "folder", "limit", "usage"),
    [
        ("0::/a/b", "", "memory.max", "memory.current"),
        ("0::/", "", "memory.max", "memory.current"),
        ("5:memory:/docker/f00", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ],
)
def test_available_memory_is_what_a_cgroups_limit_leaves(
    tmp_path: Path, line: str, folder: str, limit: str, usage: str
) -> None:
    write(tmp_path / "proc/meminfo", MEMINFO)
    write(tmp_path / "proc/self/cgroup", f"7:cpuset:/\n{line}\n")
    group = tmp_path / "sys/fs/cgroup" / folder
    write(group / limit, f"{4 * 2**30}\n")
    write(group / usage, f"{3 * 2**30}\n")
    write(group / "memory.stat", f"anon {2**30}\nactive_file {2**29}\ninactive_file {2**30}\n")
    assert available_memory(tmp_path) == 2**30 + 2**30 + 2**29


def test_this_machine_has_memory_and_its_gpus_are_gpus() -> None:
    assert available_memory() > 2**20
    assert all(gpu.memory >= machine.MIN_MEMORY for gpu in detect())


def test_a_processor_is_read_as_linux_lists_it(tmp_path: Path) -> None:
    core = "processor\t: {}\nmodel name\t: AMD Ryzen 9 9950X\nflags\t\t: fpu sse2 avx2 avx_vnni\n\n"
    write(tmp_path / "proc/cpuinfo", core.format(0) + core.format(1))
    write(tmp_path / "proc/meminfo", "MemTotal:       32000000 kB\nMemAvailable:   30000000 kB\n")
    found = cpu(tmp_path)
    assert (found.name, found.features) == ("AMD Ryzen 9 9950X", frozenset({"fpu", "sse2", "avx2", "avx_vnni"}))
    assert found.cores == usable_cores() >= 1
    assert found.is_x86
    assert found.multiplies_bytes
    assert total_memory(tmp_path) == 32_000_000 * 1024


def test_a_processor_without_vnni_or_of_another_kind(tmp_path: Path) -> None:
    write(tmp_path / "proc/cpuinfo", "model name\t: Intel(R) Core(TM) i7-9700\nflags\t: sse2 avx2\n")
    assert not cpu(tmp_path).multiplies_bytes
    write(tmp_path / "proc/cpuinfo", "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\nCPU implementer\t: 0x41\n")
    arm = cpu(tmp_path)
    assert (arm.name, arm.features) == (platform.machine(), frozenset({"fp", "asimd", "asimddp", "i8mm"}))
    assert not arm.is_x86
    assert cpu(tmp_path / "nothing").features == frozenset()
