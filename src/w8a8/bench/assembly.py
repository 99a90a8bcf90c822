"""Reading a compiled kernel's assembly: the instructions of its inner loop, its registers, its occupancy."""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from w8a8.bench.targets import machine

_MATRIX = ("v_wmma_i32_16x16x16_iu8", "v_mfma_i32_", "IMMA", "IGMMA", "UTCIMMA")
_LABEL = re.compile(r"([.\w$]+):")
_BRANCH = re.compile(r"(?:s_c?branch\w*|BRA(?:\.U)?(?:\s+!?UP\d,)?)\s+([.\w$]+)")
_SASS = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+([^;]+);")
_AMD_LOAD = re.compile(r"(?:buffer|global|flat)_load_(?:b(\d+)|dword(?:x(\d))?|[usi]\w+)")
_NVIDIA_LOAD = re.compile(r"(?:LDG|LDGSTS)\.E(?:\.(?!U8|S8|U16|S16)[A-Z]\w*)*(?:\.(U8|S8|U16|S16|64|128))?")


@dataclass(frozen=True, slots=True)
class Loop:
    """One compiled kernel's inner loop, and the resources that the kernel takes.

    `instruction` is its matrix instruction; `matrix` counts those, `instructions` counts all. `load_bits` are the bits
    per lane of the narrowest load; `registers` are per lane, `shared` is in bytes; `waves` and `spills` are those of
    `bench compile`'s table; `cycles` are those of one pass, None where no analyzer has a model of the GPU.
    """

    instruction: str
    matrix: int
    instructions: int
    load_bits: int
    registers: int
    shared: int
    waves: int
    spills: int
    cycles: float | None

    @property
    def density(self) -> float:
        """Matrix instructions per instruction."""
        return self.matrix / self.instructions


def read(arch: str, kernel: Any) -> Loop:
    """Read the assembly of a kernel that was compiled for `arch`."""
    if arch.startswith("gfx"):
        text = kernel.asm["amdgcn"]
        registers = _number(text, ".vgpr_count:")
        spills = _number(text, ".vgpr_spill_count:") + _number(text, ".sgpr_spill_count:")
        load = _AMD_LOAD
    else:
        text, usage = disassembled(kernel.asm["cubin"])
        registers, spills = _number(usage, "REG:"), (_number(usage, "STACK:") + _number(usage, "LOCAL:")) // 4
        load = _NVIDIA_LOAD
    body = inner_loop(text)
    matrix = [line for line in body if _matrix(line)]
    shared = int(kernel.metadata.shared)
    return Loop(
        instruction=next(word for word in matrix[0].split() if word.startswith(_MATRIX)),
        matrix=len(matrix),
        instructions=len(body),
        load_bits=min((_bits(found) for line in body if (found := load.search(line))), default=0),
        registers=registers,
        shared=shared,
        waves=machine(arch).occupancy(registers, shared, kernel.metadata.num_warps),
        spills=spills,
        cycles=_cycles(arch, body),
    )


def inner_loop(assembly: str) -> list[str]:
    """Return the instructions of the shortest loop with matrix instructions. Raises ValueError where there is none."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for line in assembly.splitlines():
        text = line.split(";")[0].split("//")[0].strip()
        if label := _LABEL.fullmatch(text):
            labels[label[1]] = len(instructions)
        elif text and not text.startswith("."):
            instructions.append(text)
            branch = _BRANCH.search(text)
            if branch and branch[1] in labels:
                loops.append(instructions[labels[branch[1]] :])
    loops = [loop for loop in loops if any(map(_matrix, loop))]
    if not loops:
        raise ValueError("this kernel has no loop with matrix instructions")
    return min(loops, key=len)


def _matrix(instruction: str) -> bool:
    return any(word.startswith(_MATRIX) for word in instruction.split())


def _bits(load: re.Match[str]) -> int:
    """Return the bits per lane of a load, e.g. 128 for `buffer_load_b128`, `global_load_dwordx4` and `LDG.E.128`."""
    if load.re is _NVIDIA_LOAD:
        return {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}.get(load[1] or "", 32)
    if load[1]:
        return int(load[1])
    return 32 * int(load[2] or 1) if "dword" in load[0] else 8


def _number(text: str, key: str) -> int:
    return int(re.search(rf"{re.escape(key)}\s*(\d+)", text)[1])  # type: ignore[index]


def disassembled(cubin: bytes) -> tuple[str, str]:
    """Disassemble a binary for NVIDIA by Triton's `cuobjdump`: SASS with addresses as labels, and resource usage."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        shown = [
            subprocess.run([knobs.nvidia.cuobjdump.path, what, file.name], capture_output=True, text=True, check=True)
            for what in ("-sass", "-res-usage")
        ]
    lines = (_SASS.match(line) for line in shown[0].stdout.splitlines())
    sass = "\n".join(f"0x{int(line[1], 16):x}:\n{line[2]}" for line in lines if line)
    return sass, shown[1].stdout


@cache
def find_analyzer() -> str | None:
    """Return the newest `llvm-mca` on the PATH; Debian's carry their version in the name."""
    named = [f"llvm-mca-{version}" for version in range(40, 15, -1)]
    return next((name for name in (*named, "llvm-mca") if shutil.which(name)), None)


def _cycles(arch: str, body: Sequence[str]) -> float | None:
    """Return the cycles of one pass through an inner loop; None where no analyzer has a model of `arch`."""
    analyzer = find_analyzer()
    if analyzer is None or not arch.startswith("gfx"):
        return None
    passes = 100
    command = [analyzer, "-mtriple=amdgcn-amd-amdhsa", f"-mcpu={arch}", f"-iterations={passes}", "-instruction-info=0"]
    code = "\n".join(line for line in body if not _BRANCH.search(line))
    done = subprocess.run(command, input=code, capture_output=True, text=True)  # it may not know the target, or crash
    found = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
    return int(found[1]) / passes if found and done.returncode == 0 and not done.stderr else None
