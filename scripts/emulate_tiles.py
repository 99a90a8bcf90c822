"""Run the INT8 tiles of every instruction set in emulators, and compare every sum with the exact one.

    apt-get install qemu-user binutils-aarch64-linux-gnu bochs bochs-term
    python scripts/emulate_tiles.py

QEMU runs ARM's sets, Bochs x86's: version 2.7 (Debian 12) has neither AVX-VNNI nor AMX, 3.0 (Debian 13) has both. The
emulator is told to be a processor that has the set, and where there is one, none that is better.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import bochs_machine
from tile_programs import compiled, every_trial, judged

from w8a8.kernels.cpu.instructions import ARM, SETS, X86, InstructionSet
from w8a8.kernels.cpu.trials import Trial

QEMU, ASSEMBLER, LINKER = "qemu-aarch64", "aarch64-linux-gnu-as", "aarch64-linux-gnu-ld"


@dataclass(frozen=True, slots=True)
class Emulated:
    """An instruction set, and the processor that its emulator is told to be.

    `lowest`: the least code that the emulator multiplies right.
    """

    cpu: InstructionSet
    processor: str
    lowest: int = -128

    @property
    def emulator(self) -> str:
        """The emulator's command."""
        return QEMU if self.cpu.triple == ARM else bochs_machine.BOCHS

    def possible(self) -> bool:
        """Whether what is installed can emulate it."""
        if self.cpu.triple == ARM:
            return all(map(shutil.which, (QEMU, ASSEMBLER, LINKER)))
        here = (bochs_machine.ASSEMBLER, bochs_machine.LINKER)
        return all(map(shutil.which, here)) and self.processor in bochs_machine.models()

    def trials(self) -> list[Trial]:
        """Make trials of each of the set's tiles."""
        return [*every_trial(self.cpu, self.lowest)]

    def run(self, tried: Sequence[Trial]) -> list[bool]:
        """Say of each trial whether its sums are right. Raises ValueError where the program does not reach its end."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            trials = folder / "trials.o"
            size = compiled(self.cpu, tried, trials)
            run = _run_on_arm if self.cpu.triple == ARM else bochs_machine.run
            return judged(tried, run(trials, size, self.processor, folder))


_START = """
.globl _start, memcpy, memset
_start: bl run_trials
mov x1, x0
mov x0, 1
ldr x2, ={size}
mov x8, 64
svc 0
mov x0, 0
mov x8, 93
svc 0
memcpy: mov x3, x0
cbz x2, 1f
0: ldrb w4, [x1], 1
strb w4, [x3], 1
subs x2, x2, 1
b.ne 0b
1: ret
memset: mov x3, x0
cbz x2, 1f
0: strb w1, [x3], 1
subs x2, x2, 1
b.ne 0b
1: ret
"""
"""Runs the trials, writes the memory to standard output, and exits, by Linux' system calls."""


def _run_on_arm(trials: Path, size: int, processor: str, folder: Path) -> bytes:
    """Run trials of `tile_programs.compiled` on the processor that QEMU calls `processor`; return what they write."""
    start, program = folder / "start.o", folder / "program"
    subprocess.run([ASSEMBLER, "-o", start], input=_START.format(size=size).encode(), check=True)
    subprocess.run([LINKER, "-o", program, start, trials], check=True)
    return subprocess.run([QEMU, "-cpu", processor, program], capture_output=True, check=False).stdout


_SETS = {cpu.name: cpu for cpu in SETS}
EMULATED = (
    Emulated(_SETS["amx"], "sapphire_rapids", lowest=0),  # Bochs 3.0 takes tdpbssd's bytes for unsigned ones
    Emulated(_SETS["avx512vnni"], "tigerlake"),
    Emulated(_SETS["avxvnni"], "arrow_lake"),
    Emulated(_SETS["avx2"], "corei7_haswell_4770"),
    Emulated(replace(_SETS["generic"], target=("ivybridge", ""), triple=X86), "corei7_ivy_bridge_3770k"),
    Emulated(_SETS["i8mm"], "max"),
    Emulated(_SETS["dotprod"], "neoverse-n1"),
    Emulated(replace(_SETS["generic"], target=("generic", "+neon"), triple=ARM), "cortex-a57"),
)


def main() -> int:
    """Emulate every set that can be, and say what came of it; 1 where a sum was wrong."""
    wrong = 0
    for one in EMULATED:
        what = f"{one.cpu.name} ({one.cpu.products}), {one.processor} of {one.emulator}"
        if not one.possible():
            print(f"{what}: not installed")
            continue
        tried = one.trials()
        right = one.run(tried)
        wrong += right.count(False)
        sums = sum(trial.expected.size for trial in tried)
        verdict = f"{right.count(False)} WRONG" if not all(right) else "all right"
        print(f"{what}: {len(tried)} products of {sums:,} sums, {verdict}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
