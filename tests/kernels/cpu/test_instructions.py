"""Every instruction set: which one runs, that all compute the same, and what LLVM makes of those this CPU lacks."""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from llvmlite import binding, ir
from tile_programs import compiled_for

from w8a8.errors import UsageError
from w8a8.kernels.cpu import instructions
from w8a8.kernels.cpu.instructions import ARM, SETS, VARIABLE, InstructionSet, available, instruction_set
from w8a8.kernels.cpu.ir import Tile
from w8a8.kernels.cpu.tiles import dot_tile, outer_tile
from w8a8.machine import Cpu

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
        ("+neon,+dotprod,+i8mm", ["i8mm", "dotprod", "generic"]),
        ("+neon,+dotprod", ["dotprod", "generic"]),
        ("", ["generic"]),
    ],
)
def test_the_best_set_that_the_cpu_has_runs(features: str, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("NUMBA_CPU_FEATURES", features)
    assert [found.name for found in available()] == names
    assert instruction_set().name == names[0]


@pytest.mark.parametrize("granted", [True, False])
def test_amx_is_there_where_linux_grants_its_registers(granted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CPU_FEATURES", "+avx512f,+avx512vnni,+amx-tile,+amx-int8")
    monkeypatch.setattr(instructions, "_grants_tiles", lambda: granted)
    assert [found.name for found in available()] == ["amx"] * granted + ["avx512vnni", "generic"]
    assert instructions.restrained() == (not granted)  # so that the code of either is cached apart


@pytest.mark.parametrize("known", [True, False])
def test_linux_says_what_arm_s_cpu_has_where_llvm_does_not(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def found_by_llvm() -> dict[str, bool]:
        if not known:
            raise RuntimeError
        return {"neon": True, "sve": False}

    for variable in (VARIABLE, "NUMBA_CPU_FEATURES", "NUMBA_CPU_NAME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(binding, "get_host_cpu_features", found_by_llvm)
    cpu = Cpu("Neoverse V1", frozenset({"asimd", "asimddp", "i8mm", "bf16"}), 4)
    monkeypatch.setattr(instructions, "cpu", lambda: cpu)
    assert [found.name for found in available()] == ["i8mm", "dotprod", "generic"]
    assert instructions.features.__wrapped__() == {"dotprod", "i8mm", "bf16", *["neon"] * known}


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
from w8a8.kernels.cpu import chosen
assert chosen.CPU.name == {name!r}
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
from llvmlite import ir
from w8a8.kernels.cpu import instructions, vectors
from w8a8.kernels.cpu.ir import function

found = next(found for found in instructions.SETS if found.name == {name!r})
spelled = replace(found, intrinsic="", matrix=found.matrix and replace(found.matrix, intrinsic=""))
wrong = replace(instructions.SETS[-1], name="wrong", intrinsic="llvm.fshl.v4i32", code=1, flips=True)
instructions.instruction_set, instructions.available = lambda: wrong, lambda: (wrong, spelled)
instructions.restrained = lambda: False
inline = vectors.plain_products

def called(builder, total, w, x, extend):
    name = f"step_{{w.type.count}}_{{total.type.count}}_{{extend.__name__}}"
    made = function(builder, name, total.type, total.type, w.type, x.type)
    if not made.blocks:
        made.linkage = "internal"
        made.attributes.add("noinline")
        inside = ir.IRBuilder(made.append_basic_block())
        inside.ret(inline(inside, *made.args, getattr(inside, extend.__name__)))
    return builder.call(made, [total, w, x])

vectors.plain_products = called
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMED if name != available()[0].name])
def test_every_set_computes_the_same(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The kernel with each set but this CPU's best, which `test_int8.py` tries.

    Where this CPU lacks a set, its instruction is a function in plain LLVM IR. And there one is said to be better whose
    instruction computes something else: the kernel does without.
    """
    has = name in {found.name for found in available()}
    cache = tmp_path_factory.getbasetemp() / "numba"  # one for all: their code may not be mixed
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache), **({VARIABLE: name} if has else {"NUMBA_OPT": "0"})}
    program = (CHECKS if has else LACKING + CHECKS).format(name=name)
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert ("(wrong) computes wrong sums" in run.stderr) == (not has)


# --- what LLVM makes of them ------------------------------------------------------------------------------------------


def loop_of(tile: Tile, cpu: InstructionSet, product: str) -> list[str]:
    """Compile a tile for a CPU with no better set, and return the instructions of its inner loop."""
    module = ir.Module()
    tile.define(module)
    compiler, optimized = compiled_for(cpu, module)
    assembly: str = compiler.emit_assembly(optimized)
    labels = {label: at.start() for at in re.finditer(r"^(\.\w+):", assembly, re.MULTILINE) for label in [at[1]]}
    loops = [
        assembly[labels[jump[1]] : jump.end()]
        for jump in re.finditer(r"\t(?:j|b\.|cb|tb)\w+\t(?:.*, )?(\.\w+)", assembly)
        if labels[jump[1]] < jump.start()
    ]
    return max(loops, key=lambda text: text.count(product)).splitlines()[1:]


@pytest.mark.parametrize("name", [name for name in NAMED if name != "generic"])
def test_tiles_use_the_instruction_and_spill_nothing(name: str) -> None:
    cpu = NAMED[name]
    for tokens in (1, 2, 4, cpu.dot_tokens):
        rows = min(4, cpu.dot_sums // tokens)
        loop = loop_of(dot_tile(cpu, rows, tokens), cpu, cpu.product)
        check_loop(loop, cpu, cpu.product, rows * tokens * 64 // cpu.inputs)
    product = cpu.matrix.product if cpu.matrix else cpu.product
    for vectors in (vectors for vectors in (1, 2, 4) if vectors <= cpu.vectors):
        rows = cpu.outer_rows(vectors)
        loop = loop_of(outer_tile(cpu, rows, vectors), cpu, product)
        check_loop(loop, cpu, product, rows * vectors // (cpu.lanes if cpu.grid else 1))


def check_loop(loop: list[str], cpu: InstructionSet, product: str, products: int) -> None:
    register = "%tmm" if product == "tdpbssd" else "v" if cpu.triple == ARM else "%zmm" if cpu.width == 64 else "%ymm"
    steps = [line for line in loop if product in line]
    assert len(steps) in ({products, 2 * products} if cpu.grid else {products})  # LLVM unrolls some loops of a grid
    assert all(register in line for line in steps)
    assert not [line for line in loop if re.search(r"%rsp|\(%rbp\).*mm|mm.*\(%rbp\)|\bsp\b|\bx29\b", line)]
