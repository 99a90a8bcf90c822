"""Which instructions multiply INT8 codes on this CPU: the best that it has, or those that `W8A8_CPU` names.

Loads no Numba, so that every command can say quickly what would run. `tiles.py` turns a set into code.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from w8a8.errors import UsageError

VARIABLE = "W8A8_CPU"


@dataclass(frozen=True, slots=True)
class InstructionSet:
    """All in which the tiles of two CPUs differ: how vectors of codes are multiplied."""

    name: str
    """As `W8A8_CPU` spells it."""
    product: str
    """The instruction that multiplies, as assembly spells it; for `generic` the one that LLVM chooses."""
    intrinsic: str
    """What LLVM calls it; empty for plain LLVM IR."""
    width: int
    """Bytes of a vector."""
    registers: int
    """Vectors that fit into registers."""
    code: int
    """Bytes of a code in a vector: 1, where four products are added to an INT32 lane, or 2, where two are."""
    flips: bool
    """Whether weights must be unsigned: their sign bits are flipped, which adds 128 to each."""
    needs: tuple[str, ...]
    """Features of the CPU, as LLVM names them."""
    target: tuple[str, str]
    """LLVM's CPU and features that have this set and none that is better."""

    @property
    def lanes(self) -> int:
        """INT32 sums in a vector."""
        return self.width // 4

    @property
    def sums(self) -> int:
        """Vectors of sums that an outer tile keeps in registers."""
        return self.registers * 3 // 4

    @property
    def dot_sums(self) -> int:
        """Vectors of sums that a dot tile keeps in registers, beside a vector of each row."""
        return 24 if self.registers == 32 else 8

    @property
    def inputs(self) -> int:
        """Codes in a vector."""
        return self.width // self.code


SETS = (
    InstructionSet(
        "avx512vnni",
        "vpdpbusd",
        "llvm.x86.avx512.vpdpbusd.512",
        width=64,
        registers=32,
        code=1,
        flips=True,
        needs=("avx512vnni",),
        target=("x86-64-v4", "+avx512vnni"),
    ),
    InstructionSet(
        "avxvnni",
        "vpdpbusd",
        "llvm.x86.avx512.vpdpbusd.256",
        width=32,
        registers=16,
        code=1,
        flips=True,
        needs=("avxvnni", "avx2", "f16c"),
        target=("x86-64-v3", "+avxvnni"),
    ),
    InstructionSet(
        "avx2",
        "vpmaddwd",
        "llvm.x86.avx2.pmadd.wd",
        width=32,
        registers=16,
        code=2,
        flips=False,
        needs=("avx2", "f16c"),
        target=("x86-64-v3", ""),
    ),
    InstructionSet(
        "generic", "portable", "", width=16, registers=16, code=2, flips=False, needs=(), target=("ivybridge", "")
    ),
)
"""Every set, the best first; a CPU has all of those whose needs it meets."""


@cache
def available() -> tuple[InstructionSet, ...]:
    """Return the sets that the CPU has for which Numba compiles, the best first."""
    has = _features(os.environ)
    return tuple(found for found in SETS if has.issuperset(found.needs))


@cache
def instruction_set() -> InstructionSet:
    """Return the set that is used. Raises UsageError if `W8A8_CPU` names none that this CPU has."""
    name = os.environ.get(VARIABLE)
    if not name:
        return available()[0]
    for found in available():
        if found.name == name:
            return found
    names = ", ".join(found.name for found in available())
    raise UsageError(f"{VARIABLE}={name}: this CPU has {names}; name one of them, or unset {VARIABLE} for the best")


@cache
def features() -> frozenset[str]:
    """Return the features of the CPU that Numba compiles for, by LLVM's names: none for a lesser set than its best."""
    return _features(os.environ) if instruction_set() is available()[0] else frozenset()


def multiplies_bf16() -> bool:
    """Whether the CPU that Numba compiles for has BF16 arithmetic: AVX512-BF16, AMX, or ARM's."""
    return not features().isdisjoint({"avx512bf16", "amx-bf16", "bf16"})


def _features(environment: Mapping[str, str]) -> frozenset[str]:
    """Read the features of the CPU that Numba compiles for: Numba's own variables come first."""
    told = environment.get("NUMBA_CPU_FEATURES")
    if told is None and environment.get("NUMBA_CPU_NAME", "").lower() == "generic":
        told = ""
    if told is not None:
        return frozenset(feature[1:] for feature in told.split(",") if feature.startswith("+"))
    from llvmlite import binding

    try:
        return frozenset(name for name, has in binding.get_host_cpu_features().items() if has)
    except RuntimeError:  # LLVM does not know this CPU
        return frozenset()
