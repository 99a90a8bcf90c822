"""Vectors of INT8 codes in LLVM IR: how an instruction set loads and multiplies them.

A vector holds codes. A step multiplies a vector of weights with one of tokens and adds neighbouring products to INT32
lanes: four to a lane where codes are bytes, two where they are 16-bit integers (`InstructionSet.code`). Either way a
lane's codes take 4 bytes, a word, so whatever moves words is the same for all.

- `vpdpbusd` takes unsigned times signed bytes: weights are flipped as they are loaded (`int8.py` tells why).
- `vpmaddwd` takes 16-bit integers: tokens are written as such once, weights get their signs extended as they are loaded
  by the dot tiles, and once for all tokens for the outer tiles. It multiplies half as many codes, but `vpmaddubsw`,
  which takes bytes, saturates: oneDNN's `torch._int_mm` makes silently wrong sums with it.
- `sdot` takes signed bytes: nothing is to be done.
- `smmla` takes signed bytes, 8 inputs of 2 rows and 2 tokens, and adds to 2 x 2 lanes.

Without an instruction, plain LLVM IR says the step.
"""

from collections.abc import Callable

from llvmlite import ir
from llvmlite.ir import IRBuilder as Builder

from w8a8.kernels.cpu.instructions import InstructionSet, Matrix
from w8a8.kernels.cpu.ir import BYTE, HALF, WORD, Value, function, pointer


def lanes_of(cpu: InstructionSet) -> ir.VectorType:
    """Return the type of a vector as words."""
    return ir.VectorType(WORD, cpu.lanes)


def signs(cpu: InstructionSet) -> Value:
    """Return the sign bits of a vector's bytes."""
    return ir.Constant(lanes_of(cpu), [0x80808080] * cpu.lanes)


def add_products(cpu: InstructionSet, builder: Builder, total: Value, w: Value, x: Value) -> Value:
    """Add to the lanes of `total` the products of the codes in `w` and `x`."""
    lanes, codes = lanes_of(cpu), ir.VectorType(ir.IntType(8 * cpu.code), cpu.inputs)
    if cpu.intrinsic and cpu.flips:  # x86's, which LLVM gives words
        return builder.call(function(builder, cpu.intrinsic, lanes, lanes, lanes, lanes), [total, w, x])
    w, x = builder.bitcast(w, codes), builder.bitcast(x, codes)
    if cpu.intrinsic and cpu.code == 1:
        return builder.call(function(builder, cpu.intrinsic, lanes, lanes, codes, codes), [total, w, x])
    if cpu.intrinsic:
        pairs = builder.call(function(builder, cpu.intrinsic, lanes, codes, codes), [w, x])
        return opaque(builder, builder.add(total, pairs))  # else LLVM adds up pairs first, in registers that are scarce
    return plain_products(builder, total, w, x, builder.zext if cpu.flips else builder.sext)


def add_matrix(matrix: Matrix, builder: Builder, total: Value, w: Value, x: Value) -> Value:
    """Add to the four lanes of `total`, 2 rows of 2 tokens, the products of 8 codes of each row and token."""
    codes = ir.VectorType(BYTE, 16)
    w, x = builder.bitcast(w, codes), builder.bitcast(x, codes)
    if matrix.intrinsic:
        made = function(builder, matrix.intrinsic, total.type, total.type, codes, codes)
        return builder.call(made, [total, w, x])
    first, second = [*range(8)], [*range(8, 16)]
    w, x = (
        builder.shuffle_vector(v, v, ir.Constant(ir.VectorType(WORD, 32), order))
        for v, order in ((w, first + first + second + second), (x, first + second + first + second))
    )
    return plain_products(builder, total, w, x, builder.sext)


def plain_products(builder: Builder, total: Value, w: Value, x: Value, extend: Callable[..., Value]) -> Value:
    """Add to the lanes of `total` neighbouring products of `w` and `x` in plain LLVM IR; `extend` widens a weight."""
    lanes, words = total.type, ir.VectorType(WORD, w.type.count)
    products = builder.mul(extend(w, words), builder.sext(x, words))
    step = words.count // lanes.count
    for first in range(step):
        chosen = ir.Constant(lanes, list(range(first, words.count, step)))
        total = builder.add(total, builder.shuffle_vector(products, ir.Constant(words, ir.Undefined), chosen))
    return total


def load_weights(cpu: InstructionSet, builder: Builder, *address: Value) -> Value:
    """Load a vector of weights from where they are stored."""
    codes = builder.load(pointer(builder, ir.VectorType(BYTE, cpu.inputs), *address), align=1)
    if cpu.code == 2:
        return builder.bitcast(builder.sext(codes, ir.VectorType(HALF, cpu.inputs)), lanes_of(cpu))
    codes = builder.bitcast(codes, lanes_of(cpu))
    return builder.xor(codes, signs(cpu)) if cpu.flips else codes


def splat(builder: Builder, word: Value, lanes: ir.VectorType) -> Value:
    """Broadcast `word` to every lane."""
    undefined = ir.Constant(lanes, ir.Undefined)
    one = builder.insert_element(undefined, word, WORD(0))
    return builder.shuffle_vector(one, undefined, ir.Constant(lanes, None))


def opaque(builder: Builder, value: Value) -> Value:
    """Hide from LLVM how the vector `value` of an x86 CPU came about, by an empty asm."""
    return builder.asm(ir.FunctionType(value.type, [value.type]), "", "=v,0", [value], side_effect=False)
