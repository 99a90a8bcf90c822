"""Looks at this machine: nothing heavy is imported, what may hang has a limit, and what is missing is no error."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

import numpy as np
from packaging.requirements import Requirement

from w8a8 import machine
from w8a8.machine import Cpu, Gpu
from w8a8.serve import installed
from w8a8.serve.installed import Installed

EXTRAS = ("serve", "gguf", "eval", "publish", "ray", "s3", "gs", "az")
"""Our extras that are looked for."""

PACKAGES = ("torch", "transformers", "numba", "triton", "ray", "s3fs", "gcsfs", "adlfs")
"""Packages whose versions are looked up."""

READ = 3 << 27
"""Bytes that are read to measure memory, 384 MiB: more than caches hold."""

READ_SECONDS = 1.0
TORCH_SECONDS = 30

_ASK_TORCH = """
import json, torch
print(json.dumps([torch.get_num_threads(), torch.version.cuda, torch.version.hip, torch.cuda.is_available()]))
"""


@dataclass(frozen=True, slots=True)
class Torch:
    """The installed torch: what it is `built_for` (`cpu`, `cuda`, `rocm`), its threads, whether it finds a GPU.

    `problem`: why it cannot be imported, empty if it can.
    """

    version: str
    built_for: str
    threads: int = 0
    device: bool = False
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """This machine: memory in bytes, `read` in bytes a second; `packages` and `unmet` are of this Python.

    `packages`: the version of each of `PACKAGES` that is here. `unmet`: for each of our extras, what it asks for and is
    not here. `environment`: the variables that change what runs.
    """

    cpu: Cpu
    memory: int
    available: int
    read: float
    gpus: Sequence[Gpu]
    python: str
    packages: Mapping[str, str]
    unmet: Mapping[str, Sequence[str]]
    torch: Torch | None
    vllm: Installed | None
    environment: Mapping[str, str]


def look() -> Facts:
    """Look at this machine, in some seconds."""
    # 1) What other programs are asked, each with a limit, at the same time.
    with ThreadPoolExecutor() as pool:
        gpus, torch, vllm = pool.submit(machine.detect), pool.submit(_torch), pool.submit(installed.find)
    # 2) What is read here, and the memory's speed, when nothing else of ours runs.
    cpu = machine.cpu()
    available = machine.available_memory()
    return Facts(
        cpu=cpu,
        memory=machine.total_memory(),
        available=available,
        read=read_speed(cpu.cores, min(READ, available // 4)),
        gpus=gpus.result(),
        python=platform.python_version(),
        packages={name: found for name in PACKAGES if (found := _version(name))},
        unmet=unmet(),
        torch=torch.result(),
        vllm=vllm.result(),
        environment={name: os.environ[name] for name in ("W8A8_CPU", "OMP_NUM_THREADS") if name in os.environ},
    )


def read_speed(threads: int, nbytes: int = READ, seconds: float = READ_SECONDS) -> float:
    """Measure how many bytes of memory `threads` threads read in a second: the best that they do in some `seconds`.

    The memory was written before, because pages never written are all one page, read from cache.
    """
    parts = np.array_split(np.ones(nbytes // 8, np.int64), threads)
    speeds: list[float] = []
    with ThreadPoolExecutor(threads) as pool:
        end = time.perf_counter() + seconds
        while len(speeds) < 3 or time.perf_counter() < end:
            start = time.perf_counter()
            list(pool.map(np.bitwise_or.reduce, parts))
            speeds.append(nbytes / (time.perf_counter() - start))
    return max(speeds)


def unmet() -> dict[str, tuple[str, ...]]:
    """Find what each of `EXTRAS` asks for and this Python's environment lacks, or has in another version."""
    try:
        stated = [Requirement(line) for line in requires("w8a8") or ()]
    except PackageNotFoundError:  # run from a folder of source code
        stated = []
    return {extra: tuple(dict.fromkeys(_unmet(extra, stated))) for extra in EXTRAS}


def _unmet(extra: str, stated: Sequence[Requirement]) -> Iterator[str]:
    for one in stated:
        if one.marker and one.marker.evaluate({"extra": extra}) and not one.marker.evaluate({"extra": ""}):
            if one.name == "w8a8":
                for inner in sorted(one.extras):
                    yield from _unmet(inner, stated)
            elif not ((found := _version(one.name)) and one.specifier.contains(found, prereleases=True)):
                yield f"{one.name}{one.specifier}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _torch() -> Torch | None:
    """Ask torch, in a process of its own: it takes seconds to import, and may be broken."""
    found = _version("torch")
    if found is None:
        return None
    build = installed.built_for(found)
    try:
        asked = subprocess.run(
            [sys.executable, "-c", _ASK_TORCH], capture_output=True, text=True, timeout=TORCH_SECONDS, check=True
        )
        threads, cuda, hip, device = json.loads(asked.stdout)
    except subprocess.TimeoutExpired:
        return Torch(found, build, problem=f"does not import within {TORCH_SECONDS} s")
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        return Torch(found, build, problem=f"does not import: {said[-1] if said else type(error).__name__}")
    build = "rocm" if hip else "cuda" if cuda else "cpu"
    return Torch(found, build, threads, device)
