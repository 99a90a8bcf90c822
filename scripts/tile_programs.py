"""Programs that run the INT8 tiles without an operating system's libraries, for emulators of other CPUs.

A program has in it what the tiles multiply, and writes what they have made of it. LLVM, which comes with Numba,
compiles the tiles as it does on a CPU that has the instruction set and none that is better.
"""

from collections.abc import Iterator, Sequence
from itertools import chain, product
from pathlib import Path

import numpy as np
from llvmlite import binding, ir
from llvmlite.ir import IRBuilder as Builder

from w8a8.kernels.cpu import trials
from w8a8.kernels.cpu.instructions import InstructionSet
from w8a8.kernels.cpu.ir import BYTE, LONG, long
from w8a8.kernels.cpu.trials import ALIGNMENT, Trial

MARK = b"what the tiles have made of it:\n".ljust(ALIGNMENT)
"""Stands in front of what a program writes."""


def every_trial(cpu: InstructionSet, lowest: int = -128, seed: int = 0) -> Iterator[Trial]:
    """Make trials of each of a set's tiles: random codes from `lowest` on, and all pairs of extreme ones."""
    rng = np.random.default_rng(seed)
    highest = np.iinfo(np.int32).max

    def choices(least: int, *shape: int) -> Iterator[trials.Codes]:
        yield rng.integers(least, 128, shape, np.int8)
        for extreme in (least, 127):
            yield np.full(shape, extreme, np.int8)

    def weights(rows: int, inputs: int) -> Iterator[trials.Codes]:
        return choices(lowest, rows, inputs)

    def codes(tokens: int, inputs: int) -> Iterator[trials.Codes]:
        return choices(max(lowest, -127), tokens, inputs)

    for tokens in sorted({1, 2, 4, cpu.dot_tokens}):
        rows = min(4, cpu.dot_sums // tokens)
        for there, inputs in ((rows, 64), (rows, 133), (max(1, rows - 1), 67), (1, 1)):
            for weight, x in product(weights(there, inputs), codes(tokens, inputs)):
                yield trials.dot(cpu, rows, weight, x)
    for vectors in (vectors for vectors in (1, 2, 4) if vectors <= cpu.vectors):
        rows, tokens = cpu.outer_rows(vectors), vectors * cpu.lanes
        every = product(weights(rows, cpu.step), codes(tokens, cpu.step))
        for weight, x in chain(every, zip(weights(rows, 3 * cpu.step), codes(tokens, 3 * cpu.step), strict=True)):
            before = rng.integers(-highest, highest, (rows, tokens), np.int32)
            yield trials.outer(cpu, weight, x, before)
    yield trials.transposed(cpu, rng.integers(-highest, highest, (cpu.lanes, cpu.lanes), np.int32))


def compiled_for(cpu: InstructionSet, module: ir.Module) -> tuple[binding.TargetMachine, binding.ModuleRef]:
    """Optimize a module for a CPU that has the set and none that is better, as Numba does."""
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    binding.initialize_native_asmparser()
    target = binding.Target.from_triple(cpu.triple)
    machine = target.create_target_machine(*cpu.target, opt=3, reloc="static", codemodel="small")
    parsed = binding.parse_assembly(str(module))
    parsed.triple, parsed.data_layout = cpu.triple, str(machine.target_data)
    passes = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(3))
    passes.getModulePassManager().run(parsed, passes)
    return machine, parsed


def compiled(cpu: InstructionSet, tried: Sequence[Trial], path: Path) -> int:
    """Compile trials into an object file; return the size of their memory, in bytes.

    It has a function `run_trials`, which returns the address of that memory, and asks for `memcpy` and `memset`.
    """
    module = ir.Module("trials")
    content = MARK + b"".join(trial.memory.tobytes().ljust(_room(trial), b"\0") for trial in tried)
    bytes_ = ir.ArrayType(BYTE, len(content))
    memory = ir.GlobalVariable(module, bytes_, "memory")
    memory.initializer, memory.align = ir.Constant(bytes_, bytearray(content)), ALIGNMENT
    memory.linkage = "internal"
    builder = Builder(ir.Function(module, ir.FunctionType(LONG, []), "run_trials").append_basic_block())
    base, at = builder.ptrtoint(memory, LONG), len(MARK)
    for trial in tried:
        place = builder.add(base, long(at))
        arguments = [builder.add(place, long(a[0])) if isinstance(a, list) else long(a) for a in trial.arguments]
        builder.call(trial.tile.define(module), arguments)
        at += _room(trial)
    builder.ret(base)
    machine, optimized = compiled_for(cpu, module)
    path.write_bytes(machine.emit_object(optimized))
    return len(content)


def judged(tried: Sequence[Trial], written: bytes) -> list[bool]:
    """Say of each trial whether its sums are right, by what the program wrote. Raises ValueError if that is cut off."""
    at = written.find(MARK) + len(MARK)
    if at < len(MARK) or len(written) < at + sum(map(_room, tried)):
        raise ValueError(f"the program ended before its end: {len(written)} bytes")
    right = []
    for trial in tried:
        right.append(trial.right(np.frombuffer(written, np.uint8)[at : at + trial.memory.size]))
        at += _room(trial)
    return right


def _room(trial: Trial) -> int:
    return -(-trial.memory.size // ALIGNMENT) * ALIGNMENT
