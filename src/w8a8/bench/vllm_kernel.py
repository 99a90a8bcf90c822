"""vLLM's Triton kernel for INT8, loaded alone from a vLLM that is installed here or elsewhere."""

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from w8a8.errors import UsageError

_KERNEL = "model_executor/layers/quantization/compressed_tensors/triton_scaled_mm.py"


@dataclass(frozen=True, slots=True)
class Vllm:
    """An installed vLLM: its version, and the module that holds its `triton_scaled_mm`."""

    version: str
    module: ModuleType


def find_vllm(where: Path | None, notice: Callable[[str], None] = lambda _: None) -> Vllm | None:
    """Load the kernel from the folder or Python `where`, by default from this environment.

    Returns None, and says so by `notice`, if this environment has no vLLM. Only the kernel's file is loaded, with
    stand-ins for the two helpers it imports: importing vLLM takes many seconds, and chooses a platform. Raises
    UsageError where `where` has no such file.
    """
    folder = _folder(where)
    if folder is None:
        notice("no vLLM here: its kernel is left out; --vllm names a folder or a Python that has one")
        return None
    version = re.search(r"__version__ = version = '([^']+)'", (folder / "_version.py").read_text(encoding="utf-8"))
    return Vllm(version[1] if version else "?", _load_alone(folder / _KERNEL))


def _folder(where: Path | None) -> Path | None:
    """Return the package's folder."""
    if where is None:
        found = importlib.util.find_spec("vllm")
        return Path(found.origin).parent if found and found.origin else None
    if where.is_file():
        script = "import importlib.util as i; print(getattr(i.find_spec('vllm'), 'origin', ''))"
        done = subprocess.run([str(where), "-c", script], capture_output=True, text=True)
        folder = Path(done.stdout.strip()).parent
    else:
        folder = where if where.name == "vllm" else where / "vllm"
    if not (folder / _KERNEL).is_file():
        raise UsageError(f"{where} is neither a Python nor a folder with a vLLM that has {_KERNEL}")
    return folder


def _load_alone(path: Path) -> ModuleType:
    """Load the module at `path`, with stand-ins for its imports from vLLM."""
    import triton
    import triton.language

    # 1) The stand-ins, and the module.
    helpers = ModuleType("vllm.triton_utils")
    vars(helpers).update(tl=triton.language, triton=triton, use_tensor_descriptor=lambda *_: False)  # as on AMD, NVIDIA
    allocation = ModuleType("vllm.triton_utils.allocation")
    vars(allocation).update(set_triton_allocator=lambda _: None)
    stand_ins = {"vllm": ModuleType("vllm"), helpers.__name__: helpers, allocation.__name__: allocation}
    spec = importlib.util.spec_from_file_location("vllm_triton_scaled_mm", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)

    # 2) Load it while the stand-ins go by vLLM's names; then put back the modules that had these names.
    before = {name: sys.modules.get(name) for name in stand_ins}
    sys.modules.update(stand_ins)
    try:
        spec.loader.exec_module(module)
    finally:
        for name, old in before.items():
            if old is None:
                del sys.modules[name]
            else:
                sys.modules[name] = old
    return module
