"""Which instructions multiply INT8 codes on this CPU: the best that it has, or those that `W8A8_CPU` names.

Loads no Numba, so that every command can say quickly what would run. `tiles.py` turns a set into code.
"""

import ctypes
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

from w8a8.errors import UsageError
from w8a8.machine import cpu

VARIABLE = "W8A8_CPU"

X86, ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"
"""The machines that have sets of their own, as LLVM names them."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """An instruction that multiplies several rows with several tokens; codes are signed bytes, four to a word."""

    product: str
    """As assembly spells it."""
    intrinsic: str
    """What LLVM calls it; empty for plain LLVM IR."""
    side: int
    """Rows that it takes, and words of each."""


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
    triple: str = X86
    """The machine that the set belongs to, as LLVM names it."""
    matrix: Matrix | None = None
    """What multiplies in the outer tiles in place of `product`."""

    @property
    def products(self) -> str:
        """The instructions that multiply, for people."""
        return f"{self.product} and {self.matrix.product}" if self.matrix else self.product

    @property
    def lanes(self) -> int:
        """INT32 sums in a vector."""
        return self.width // 4

    @property
    def inputs(self) -> int:
        """Codes in a vector."""
        return self.width // self.code

    @property
    def dot_sums(self) -> int:
        """Vectors of sums that a dot tile keeps in registers, beside a vector of each row."""
        return 24 if self.registers == 32 else 8

    @property
    def dot_tokens(self) -> int:
        """Most tokens of a dot tile."""
        return self.registers // 4

    @property
    def grid(self) -> bool:
        """Whether `matrix` has registers of its own: AMX's eight tiles of 16 rows, 64 bytes each."""
        return self.matrix is not None and self.matrix.side == self.lanes

    @property
    def vectors(self) -> int:
        """Most vectors of tokens of an outer tile."""
        return 4 if self.registers == 32 and not self.matrix else 2

    def outer_rows(self, vectors: int) -> int:
        """Rows of an outer tile of `vectors` vectors of tokens: as many as have their sums in registers.

        On ARM at most 12, because a row's address takes a register too.
        """
        rows = 3 * self.lanes if self.grid else self.registers * 3 // 4 // vectors
        return min(rows, 12) if self.triple == ARM else rows

    @property
    def step(self) -> int:
        """Bytes of a row that an outer tile takes at once."""
        return 4 * self.matrix.side if self.matrix else 4


_VPDPBUSD = InstructionSet(
    "avx512vnni",
    "vpdpbusd",
    "llvm.x86.avx512.vpdpbusd.512",
    width=64,
    registers=32,
    code=1,
    flips=True,
    needs=("avx512vnni",),
    target=("x86-64-v4", "+avx512vnni"),
)
_SDOT = InstructionSet(
    "dotprod",
    "sdot",
    "llvm.aarch64.neon.sdot.v4i32.v16i8",
    width=16,
    registers=32,
    code=1,
    flips=False,
    needs=("dotprod",),
    target=("generic", "+neon,+dotprod"),
    triple=ARM,
)
SETS = (
    replace(
        _VPDPBUSD,
        name="amx",
        needs=("amx-int8", "amx-tile", "avx512vnni"),
        target=("x86-64-v4", "+avx512vnni,+amx-tile,+amx-int8"),
        matrix=Matrix("tdpbssd", "llvm.x86.tdpbssd", side=16),
    ),
    _VPDPBUSD,
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
    replace(
        _SDOT,
        name="i8mm",
        needs=("i8mm", "dotprod"),
        target=("generic", "+neon,+dotprod,+i8mm"),
        matrix=Matrix("smmla", "llvm.aarch64.neon.smmla.v4i32.v16i8", side=2),
    ),
    _SDOT,
    InstructionSet(
        "generic",
        "portable",
        "",
        width=16,
        registers=16,
        code=2,
        flips=False,
        needs=(),
        target=("generic", "+neon") if platform.machine() == "aarch64" else ("ivybridge", ""),
        triple=ARM if platform.machine() == "aarch64" else X86,
    ),
)
"""Every set, the best first; a CPU has all of those whose needs it meets."""

_OF_LINUX = {"asimddp": "dotprod", "i8mm": "i8mm", "bf16": "bf16"}
"""Features of ARM's CPUs as Linux names them, which LLVM does not look for, and as LLVM does."""


@cache
def available() -> tuple[InstructionSet, ...]:
    """Return the sets that the CPU has for which Numba compiles, the best first."""
    has = _features(os.environ)
    return tuple(found for found in SETS if has.issuperset(found.needs) and (not found.grid or _grants_tiles()))


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


def restrained() -> bool:
    """Whether code is compiled for less than the CPU has: `W8A8_CPU` names a lesser set, or Linux withholds AMX."""
    has = _features(os.environ)
    return instruction_set() is not next(found for found in SETS if has.issuperset(found.needs))


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

    linux = cpu().features if platform.machine() == "aarch64" else frozenset()
    arm = frozenset(name for feature, name in _OF_LINUX.items() if feature in linux)
    try:
        return arm.union(name for name, has in binding.get_host_cpu_features().items() if has)
    except RuntimeError:  # LLVM does not know this CPU
        return arm


def _grants_tiles() -> bool:
    """Ask Linux for AMX's tile registers, which it gives to a process that asked (since 5.16)."""
    system_call, arch_prctl, request, tiles = ctypes.CDLL(None).syscall, 158, 0x1023, 18
    return bool(system_call(arch_prctl, request, tiles) == 0)
