"""The tiles that this process multiplies with: those of the best instruction set that computes right.

What a CPU says that it has is not taken on trust, because nobody owns every CPU that there is. Before a set is used, it
multiplies extreme codes in a small tile, compiled for the same CPU as the kernel. If a sum is wrong, the next set is
tried.
"""

import ctypes
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba.core.registry import cpu_target

from w8a8.kernels.cpu import trials
from w8a8.kernels.cpu.instructions import VARIABLE, InstructionSet, available, instruction_set
from w8a8.kernels.cpu.jit import compile_anew, intrinsic
from w8a8.kernels.cpu.tiles import dot_tile, outer_tile, transpose_tile
from w8a8.kernels.cpu.trials import Codes


def trusted() -> InstructionSet:
    """Return the set that was asked for, or the best below it that computes right; warn of each that does not."""
    asked = instruction_set()
    for cpu in available()[available().index(asked) :]:
        if not cpu.intrinsic or proves(cpu):
            break
        warnings.warn(
            f"this CPU's {cpu.products} ({cpu.name}) computes wrong sums, so the INT8 kernel does without. "
            f"Please report your CPU. With {VARIABLE} set to another instruction set nothing is to be warned of",
            stacklevel=2,
        )
    if cpu is not asked:
        compile_anew()
    return cpu


def proves(cpu: InstructionSet) -> bool:
    """Whether the instructions of a set that this CPU has give the right sums of extreme codes."""
    every = np.arange(-128, 128).astype(np.int8)
    full = [np.full(256, code, np.int8) for code in (-127, 127)]
    codes = np.stack([*full, np.maximum(every, -127), np.maximum(every[::-1], -127)] * 4)[: cpu.lanes]
    weight = np.stack([every, np.full(256, -128, np.int8)] * 8)
    tried = [replace(cpu, matrix=None), cpu] if cpu.matrix else [cpu]
    return all(_proves(one, weight[: one.matrix.side if one.matrix else 1], codes) for one in tried)


def _proves(cpu: InstructionSet, weight: Codes, codes: Codes) -> bool:
    """Compile one outer tile for the CPU that Numba compiles for, run it, and say whether its sums are right."""
    trial = trials.outer(cpu, weight, codes, np.zeros((len(weight), cpu.lanes), np.int32))
    module = ir.Module()
    trial.tile.define(module)
    triple, name, features = cpu_target.target_context.codegen().magic_tuple()
    machine = binding.Target.from_triple(triple).create_target_machine(name, features, jit=True)
    compiled = binding.create_mcjit_compiler(binding.parse_assembly(str(module)), machine)
    compiled.finalize_object()
    memory = trial.memory.copy()
    address = compiled.get_function_address(trial.tile.name)
    ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * trial.tile.arguments)(address)(*trial.at(memory.ctypes.data))
    return trial.right(memory)


CPU = trusted()
"""The set that this process multiplies with."""


def _dot(tokens: int) -> Any:
    tile = dot_tile(CPU, min(4, CPU.dot_sums // tokens), tokens)

    @intrinsic
    def call(
        _context: Any, _weight: Any, _k: Any, _last: Any, _codes: Any, _stride: Any, _out: Any, _step: Any, _ahead: Any
    ) -> Any:
        return tile.intrinsic()

    return call


def _outer(vectors: int) -> Any:
    tile = outer_tile(CPU, CPU.outer_rows(vectors), vectors)

    @intrinsic
    def call(_context: Any, _weight: Any, _stride: Any, _tokens: Any, _words: Any, _out: Any) -> Any:
        return tile.intrinsic()

    return call


@intrinsic
def transpose(_context: Any, _source: Any, _stride: Any, _target: Any, _target_stride: Any) -> Any:
    """Transpose `CPU.lanes` vectors of words; the arguments are `transpose_tile`'s."""
    return transpose_tile(CPU).intrinsic()


# A set without the larger tiles never calls them.
dot1, dot2, dot4, dot8 = (_dot(min(tokens, CPU.dot_tokens)) for tokens in (1, 2, 4, 8))
outer1, outer2, outer4 = (_outer(min(vectors, CPU.vectors)) for vectors in (1, 2, 4))
