"""The machine: its processor, its GPUs, as they report themselves or as the user describes them, and its memory.

nvidia-smi lists NVIDIA's GPUs. AMD's are read where rocm-smi reads them, from the files of the amdgpu driver: the
topology in `/sys/class/kfd` names every GPU that can compute, with its architecture and its render node, and the render
node's `mem_info_vram_total` is its memory; so ROCm's tools need not be installed. A GPU that the environment hides
(`CUDA_VISIBLE_DEVICES` and its kin) or whose device file is not here (a container's) does not count, because no engine
could use it. Neither does one with less than 4 GiB of its own: that is the GPU inside a CPU, which borrows a little
memory to draw with. An integrated GPU with a large carve-out counts with that.
"""

import os
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from w8a8.errors import UsageError

MAX_GPUS = 64
MIN_MEMORY = 4 * 2**30
"""Bytes below which a GPU counts as an integrated one that only draws."""

_DESCRIBED = re.compile(r"((?P<count>\d{1,4})x)?(?P<size>\d{1,5}(\.\d{1,3})?)(?P<unit>GiB|GB)(:(?P<arch>\S+))?")
_ARCH = re.compile(r"gfx\d{1,2}[0-9a-f]{2}|sm_\d{2,3}a?")
_NVIDIA_QUERY = ("--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits")
_NVIDIA_SECONDS = 30


@dataclass(frozen=True, slots=True)
class Cpu:
    """The processor: its name, its features as Linux spells them (`avx2`, `avx512_vnni`), the cores we may use."""

    name: str
    features: frozenset[str]
    cores: int

    @property
    def is_x86(self) -> bool:
        """Whether it is one of Intel's or AMD's."""
        return "sse2" in self.features

    @property
    def multiplies_bytes(self) -> bool:
        """Whether it multiplies bytes in one exact instruction (VNNI); of an x86 alone is that known."""
        return not self.is_x86 or bool(self.features & {"avx_vnni", "avx512_vnni"})


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU: `memory` in bytes, `arch` by its compiler name (`gfx1100`, `sm_90`; empty where unknown)."""

    name: str
    memory: int
    arch: str = ""
    vendor: str = ""

    @property
    def is_rdna(self) -> bool:
        """Whether it is one of AMD's RDNA GPUs (gfx10 to gfx12), which lack the matrix cores of the Instinct line."""
        return re.fullmatch(r"gfx1[0-2][0-9a-f]{2}", self.arch) is not None


def detect(root: Path = Path("/")) -> tuple[Gpu, ...]:
    """List the GPUs of this machine that an engine could use, perhaps none; `sys` and `dev` are read below `root`."""
    found = (*_nvidia(os.environ), *amd_gpus(root, os.environ))
    return tuple(gpu for gpu in found if gpu.memory >= MIN_MEMORY)


def describe(text: str) -> tuple[Gpu, ...]:
    """Read `[COUNTx]SIZE{GiB,GB}[:ARCH]`, such as `4x24GiB:gfx1100`, as GPUs. Raises `UsageError`."""
    match = _DESCRIBED.fullmatch(text.strip())
    count = int(match["count"] or 1) if match else 0
    memory = int(float(match["size"]) * (2**30 if match["unit"] == "GiB" else 10**9)) if match else 0
    arch = (match["arch"] or "") if match else ""
    if not 1 <= count <= MAX_GPUS or not memory or (arch and not _ARCH.fullmatch(arch)):
        raise UsageError(
            f"{text!r} describes no GPU; write [COUNTx]SIZE[:ARCH] with 1 to {MAX_GPUS} GPUs, "
            "such as 24GiB, 2x48GB, 4x24GiB:gfx1100 or 1x141GiB:sm_90"
        )
    vendor = {"g": "amd", "s": "nvidia"}.get(arch[:1], "")
    return (Gpu(" ".join(filter(None, (f"{match['size']} {match['unit']}", arch))), memory, arch, vendor),) * count  # type: ignore[index]


def find(description: str | None, count: int | None) -> tuple[Gpu, ...]:
    """Return the GPUs described, else those present; with `count`, that many like the smallest.

    Raises `UsageError` for a description that cannot be read, or that has a count of its own beside `count`.
    """
    gpus = detect() if description is None else describe(description)
    if count is None or not gpus:
        return gpus
    if description is not None and len(gpus) > 1:
        raise UsageError(f"--gpu {description} has a count already; leave out --count {count}")
    return (min(gpus, key=lambda gpu: gpu.memory),) * count


def parse_nvidia_smi(text: str) -> tuple[Gpu, ...]:
    """Read nvidia-smi's output, a line per GPU: name, MiB, compute capability."""
    rows = [[cell.strip() for cell in line.rsplit(",", 2)] for line in text.splitlines()]
    return tuple(
        Gpu(row[0], int(row[1]) * 2**20, "sm_" + row[2].replace(".", ""), "nvidia")
        for row in rows
        if len(row) == 3 and row[1].isdecimal() and re.fullmatch(r"\d+\.\d", row[2])
    )


def amd_gpus(root: Path, environment: Mapping[str, str]) -> tuple[Gpu, ...]:
    """List AMD's GPUs in the `sys` and `dev` below `root`, without those that `environment` hides."""
    nodes = (root / "sys/class/kfd/kfd/topology/nodes").glob("*/properties")
    gpus = [_amd_gpu(root, path) for path in sorted(nodes, key=lambda path: (len(path.parent.name), path))]
    found = [gpu for gpu in gpus if gpu]
    for variable in ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"):
        wanted = environment.get(variable)
        if wanted is not None and re.fullmatch(r"(-?\d+(,-?\d+)*)?", wanted):
            indices = [int(index) for index in wanted.split(",") if index]
            found = [found[i] for i in indices if 0 <= i < len(found)]
    return tuple(found)


def cpu(root: Path = Path("/")) -> Cpu:
    """Read the processor's name and features from `proc` below `root`; without it, the name is its architecture's."""
    rows = [line.partition(":") for line in _text(root / "proc/cpuinfo").splitlines()]
    values = {key.strip(): value.strip() for key, _, value in reversed(rows)}
    features = values.get("flags") or values.get("Features") or ""
    return Cpu(values.get("model name") or platform.machine(), frozenset(features.split()), usable_cores())


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def total_memory(root: Path = Path("/")) -> int:
    """Return the bytes of RAM that the machine has, by `proc` below `root`."""
    return _numbers(root / "proc/meminfo").get("MemTotal:", 0) * 1024


def available_memory(root: Path = Path("/")) -> int:
    """Return the bytes of RAM free now: the kernel's MemAvailable, within the limits of this process's cgroups.

    `proc` and `sys` are read below `root`.
    """
    meminfo = _numbers(root / "proc/meminfo")
    return max(0, min([meminfo["MemAvailable:"] * 1024, *_cgroup_rooms(root)]))


def _nvidia(environment: Mapping[str, str]) -> tuple[Gpu, ...]:
    """Ask nvidia-smi; no GPUs where it is missing, hangs or fails."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1"):
        return ()
    chosen = [f"--id={visible}"] if visible else []
    try:
        done = subprocess.run(
            ["nvidia-smi", *chosen, *_NVIDIA_QUERY], capture_output=True, text=True, timeout=_NVIDIA_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return ()
    return parse_nvidia_smi(done.stdout) if done.returncode == 0 else ()


def _amd_gpu(root: Path, properties: Path) -> Gpu | None:
    """Read the GPU of a node of the topology: none for a CPU, or where its render node is not here."""
    values = _numbers(properties)
    version, minor = values.get("gfx_target_version", 0), values.get("drm_render_minor", 0)
    device = root / f"sys/class/drm/renderD{minor}/device"
    memory = _first_number(device / "mem_info_vram_total")
    if not version or not memory or not (root / f"dev/dri/renderD{minor}").exists():
        return None
    arch = f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"
    return Gpu(_text(device / "product_name").strip() or f"AMD {arch}", memory, arch, "amd")


def _cgroup_rooms(root: Path) -> Iterator[int]:
    """Yield the bytes left under each limit of this process's cgroups (v2 and v1); page cache counts as free."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = root / "sys/fs/cgroup" / controllers
        limit, usage = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        )
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            most, used = _first_number(folder / limit), _first_number(folder / usage)
            if most is not None and used is not None:
                stat = _numbers(folder / "memory.stat")
                yield most - used + stat.get("active_file", 0) + stat.get("inactive_file", 0)
            if folder == top:
                break


def _numbers(path: Path) -> dict[str, int]:
    """Read a file of `name number` lines."""
    rows = (line.split() for line in _text(path).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) >= 2 and row[1].isdecimal()}


def _first_number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    """Read a small file; empty where it is not there or may not be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def gigabytes(nbytes: int) -> str:
    """Spell an amount of memory in GB, 10^9 bytes, to a tenth."""
    return f"{nbytes / 1e9:.1f} GB"
