"""Every instruction set: which one runs, that all compute the same, and what LLVM makes of those this CPU lacks."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from llvmlite import binding, ir

from w8a8.errors import UsageError
from w8a8.kernels.cpu.instructions import SETS, VARIABLE, InstructionSet, available, instruction_set
from w8a8.kernels.cpu.ir import Tile
from w8a8.kernels.cpu.tiles import dot_tile, outer_tile

NAMED = {found.name: found for found in SETS}


@pytest.fixture(autouse=True)
def asked_again() -> Iterator[None]:
    """Let the environment be read by each test, and again after it."""
    for asked in (available, instruction_set):
        asked.cache_clear()
    yield
    for asked in (available, instruction_set):
        asked.cache_clear()


@pytest.mark.parametrize(
    ("features", "names"),
    [
        ("+avx2,+f16c,+avxvnni,+avx512f,+avx512vnni", ["avx512vnni", "avxvnni", "avx2", "generic"]),
        ("+avx2,+f16c,+avxvnni,-avx512vnni", ["avxvnni", "avx2", "generic"]),
        ("+avx2,+f16c", ["avx2", "generic"]),
        ("", ["generic"]),
    ],
)
def test_the_best_set_that_the_cpu_has_runs(features: str, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("NUMBA_CPU_FEATURES", features)
    assert [found.name for found in available()] == names
    assert instruction_set().name == names[0]


def test_a_variable_names_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "generic")
    assert instruction_set() is NAMED["generic"]


@pytest.mark.parametrize("name", ["avx512vnni", "AVX2", "sse9"])
def test_a_set_that_the_cpu_has_not_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CPU_FEATURES", "+avx2,+f16c")
    monkeypatch.setenv(VARIABLE, name)
    with pytest.raises(UsageError, match=f"{VARIABLE}={name}: this CPU has avx2, generic; name one of them"):
        instruction_set()


def test_after_another_use_of_numba_it_comes_too_late() -> None:
    run = subprocess.run(
        [sys.executable, "-c", "import numba\nnumba.njit(lambda x: x)(1)\nimport w8a8.kernels.cpu.rows"],
        env={**os.environ, VARIABLE: "generic", "NUMBA_CPU_FEATURES": "+avx2,+f16c"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"UsageError: {VARIABLE} comes too late" in run.stderr


# --- what they compute ------------------------------------------------------------------------------------------------

CHECKS = """
from tests.kernels.cpu.test_int8 import check, check_nan
from w8a8.kernels.cpu import tiles
assert tiles.CPU.name == {name!r}
for tokens in (1, 2, 3, 8, 17, 40, 64):
    check(tokens, 53, 132, "BF16")
check(20, 7, 67, "F16")
check(5, 7, 67, "F32")
check(20, 48, 4100, "BF16")
for tokens in (1, 20):
    check_nan(tokens, float("nan"), "BF16")
    check_nan(tokens, float("-inf"), "F16")
"""
LACKING = """
from dataclasses import replace
from w8a8.kernels.cpu import instructions
spelled = replace(next(found for found in instructions.SETS if found.name == {name!r}), intrinsic="")
instructions.instruction_set, instructions.available = lambda: spelled, lambda: (spelled,)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED)
def test_every_set_computes_the_same(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The kernel with a set that this CPU has; with another, its instruction is spelled in plain LLVM IR."""
    has = name in {found.name for found in available()}
    cache = tmp_path_factory.getbasetemp() / "numba"  # one for all: their code may not be mixed
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache if has else tmp_path_factory.mktemp(name))}
    program = (CHECKS if has else LACKING + CHECKS).format(name=name)
    if has:
        environment[VARIABLE] = name
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


# --- what LLVM makes of them ------------------------------------------------------------------------------------------


def loop_of(tile: Tile, cpu: InstructionSet) -> list[str]:
    """Compile a tile for a CPU with no better set, and return the instructions of its inner loop."""
    module = ir.Module()
    tile.define(module)
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    target = binding.Target.from_triple("x86_64-unknown-linux-gnu")
    machine = target.create_target_machine(*cpu.target, opt=3)
    parsed = binding.parse_assembly(str(module))
    passes = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(3))
    passes.getModulePassManager().run(parsed, passes)
    assembly: str = machine.emit_assembly(parsed)
    labels = {label: at.start() for at in re.finditer(r"^(\.\w+):", assembly, re.MULTILINE) for label in [at[1]]}
    loops = [
        assembly[labels[jump[1]] : jump.end()]
        for jump in re.finditer(r"\tj\w+\t(\.\w+)", assembly)
        if labels[jump[1]] < jump.start()
    ]
    return max(loops, key=lambda text: text.count(cpu.product)).splitlines()[1:]


@pytest.mark.parametrize("name", ["avx512vnni", "avxvnni", "avx2"])
def test_tiles_use_the_instruction_and_spill_nothing(name: str) -> None:
    cpu = NAMED[name]
    register = "%zmm" if cpu.width == 64 else "%ymm"
    for tokens in (1, 2, 4, cpu.sums // 3):
        rows = min(4, cpu.dot_sums // tokens)
        check_loop(loop_of(dot_tile(cpu, rows, tokens), cpu), cpu, register, rows * tokens * 64 // cpu.inputs)
    for vectors in (1, 2, cpu.sums // 6):
        check_loop(loop_of(outer_tile(cpu, cpu.sums // vectors, vectors), cpu), cpu, register, cpu.sums)


def check_loop(loop: list[str], cpu: InstructionSet, register: str, products: int) -> None:
    steps = [line for line in loop if cpu.product in line]
    assert len(steps) == products
    assert all(register in line for line in steps)
    assert not [line for line in loop if "%rsp" in line or ("%rbp" in line and "mm" in line)]
