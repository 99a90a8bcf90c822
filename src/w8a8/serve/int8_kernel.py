"""Say what an engine will multiply with, before anything is loaded; of vLLM by the plugin's own rules."""

import os
from collections.abc import Mapping, Sequence

from w8a8 import machine
from w8a8.kernels.cpu.instructions import instruction_set, multiplies_bf16
from w8a8.machine import Gpu
from w8a8.serve.installed import Installed
from w8a8.vllm_plugin.rule import CPU, CUTLASS, NAMES, OURS, SWITCH, aiter_asked_for, chosen, cutlass_fails, known

INEXACT = ", inexact on a processor without VNNI (docs/serve.md); --engine transformers is exact"
INSTALL = "pip install 'w8a8[vllm]' in vLLM's environment"


def notice(gpus: Sequence[Gpu], found: Installed | None, backend: str) -> str | None:
    """Name the kernel of INT8 layers on `gpus` (none: on a CPU); None if they are not all of one known kind.

    `found` is the vLLM that will run, None where GPUs are only described; `backend` is its `--linear-backend`.
    """
    if not gpus:
        exact = machine.cpu().multiplies_bytes
        return f"INT8 kernel: {NAMES[CPU]}{'' if exact else INEXACT}"
    arch, *others = {gpu.arch for gpu in gpus}
    if others or not arch:
        return None
    hindrance = _hindrance(found, os.environ) if found else ""
    faster = found is not None and not hindrance and not cutlass_fails(arch) and _measured_faster(arch)
    with_plugin, without = (
        chosen(arch, ours=ours, backend=backend, with_aiter=aiter_asked_for(arch, os.environ), faster=faster)
        for ours in (True, False)
    )
    kernel = without if hindrance else with_plugin
    if kernel == CUTLASS and cutlass_fails(arch):
        return f"INT8 kernel: {NAMES[CUTLASS]}, which has none for {arch}: vLLM will die; try --linear-backend triton"
    if with_plugin == without:
        return f"INT8 kernel: {NAMES[kernel]}"
    if found is None:
        return f"INT8 kernel: {NAMES[OURS]} where its plugin is ({INSTALL}), else {_with_warning(without, arch)}"
    if hindrance:
        return f"INT8 kernel: {_with_warning(without, arch)}; {NAMES[OURS]} would run, but its plugin {hindrance}"
    return f"INT8 kernel: {NAMES[OURS]}, by the plugin in this vLLM"


def embedded(gpus: Sequence[Gpu], *, triton: bool, int8: bool, dtype: str = "auto") -> str | None:
    """Say what the embedded engine multiplies with, on `gpus` that torch can use (none: on the CPU).

    `int8`: whether the model has INT8 layers; `dtype` is that of the option. Raises UsageError if `W8A8_CPU` names what
    this CPU lacks.
    """
    if gpus:
        kernel = NAMES[OURS] if triton else "torch's own operators, for want of Triton"
        return f"INT8 kernel: {kernel}" if int8 else None
    chosen_set = instruction_set()
    by = f"{chosen_set.products} ({chosen_set.name})"
    kernel = f"INT8 kernel: w8a8's for the CPU, {by}, exact; " if int8 else ""
    others = "BF16" if dtype != "float32" and multiplies_bf16() else "float32"
    return f"{kernel}BF16 layers are computed in {others}"


def _hindrance(found: Installed, environment: Mapping[str, str]) -> str:
    """Say why the plugin will not be active in `found`; empty if it will."""
    if not found.plugin:
        return f"is not installed: {INSTALL}"
    if not known(found.version):
        return f"knows vLLM 0.32 alone, and this is {found.version}"
    if environment.get(SWITCH) == "0":
        return f"is switched off by {SWITCH}=0"
    if "w8a8" not in environment.get("VLLM_PLUGINS", "w8a8").split(","):
        return "is not among VLLM_PLUGINS"
    return ""


def _with_warning(kernel: str, arch: str) -> str:
    """Name vLLM's own `kernel`, and warn where vLLM dies without the flag for it, which `serve` adds."""
    if not cutlass_fails(arch):
        return NAMES[kernel]
    return (
        f"{NAMES[kernel]} (without --linear-backend triton vLLM takes CUTLASS, which has no INT8 for {arch}, and dies)"
    )


def _measured_faster(arch: str) -> bool:
    try:
        from w8a8.kernels.gpu.tiles import faster
    except ModuleNotFoundError as missing:
        if missing.name != "torch":
            raise
        return False  # no torch in this environment, so nothing was measured with it
    return faster(arch)
