"""The tiles of the INT8 product in LLVM IR: one description, for which an instruction set gives vectors and their step.

A vector holds codes. A step multiplies a vector of weights with one of tokens and adds neighbouring products to INT32
lanes: four to a lane where codes are bytes, two where they are 16-bit integers (`InstructionSet.code`). Either way a
lane's codes take 4 bytes, a word, so whatever moves words is the same for all.

- `vpdpbusd` takes unsigned times signed bytes: weights are flipped as they are loaded (`int8.py` tells why).
- `vpmaddwd` takes 16-bit integers: tokens are written as such once, weights get their signs extended as they are loaded
  by the dot tiles, and once for all tokens for the outer tiles. It multiplies half as many codes, but `vpmaddubsw`,
  which takes bytes, saturates: oneDNN's `torch._int_mm` makes silently wrong sums with it.

Without an instruction, plain LLVM IR says the step.
"""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from llvmlite.ir import IRBuilder as Builder
from numba.core import cgutils

from w8a8.kernels.cpu.instructions import InstructionSet, instruction_set
from w8a8.kernels.cpu.ir import BYTE, HALF, LONG, WORD, Tile, Value, function, long, pointer
from w8a8.kernels.cpu.jit import intrinsic

AHEAD = 512
"""Bytes that the dot tiles prefetch ahead."""
LINE = 64
"""Bytes of a row, and so inputs, that a dot tile takes at once: a cache line."""


# --- vectors ----------------------------------------------------------------------------------------------------------


def _lanes(cpu: InstructionSet) -> ir.VectorType:
    return ir.VectorType(WORD, cpu.lanes)


def _signs(cpu: InstructionSet) -> Value:
    return ir.Constant(_lanes(cpu), [0x80808080] * cpu.lanes)


def _add_products(cpu: InstructionSet, builder: Builder, total: Value, w: Value, x: Value) -> Value:
    """Add to the lanes of `total` the products of the codes in `w` and `x`."""
    lanes, codes = _lanes(cpu), ir.VectorType(ir.IntType(8 * cpu.code), cpu.inputs)
    if cpu.intrinsic and cpu.code == 1:
        return builder.call(function(builder, cpu.intrinsic, lanes, lanes, lanes, lanes), [total, w, x])
    w, x = builder.bitcast(w, codes), builder.bitcast(x, codes)
    if cpu.intrinsic:
        pairs = builder.call(function(builder, cpu.intrinsic, lanes, codes, codes), [w, x])
        return _opaque(
            builder, builder.add(total, pairs)
        )  # else LLVM adds up pairs first, in registers that are scarce
    words = ir.VectorType(WORD, cpu.inputs)
    products = builder.mul((builder.zext if cpu.flips else builder.sext)(w, words), builder.sext(x, words))
    step = cpu.inputs // cpu.lanes
    for first in range(step):
        chosen = ir.Constant(lanes, list(range(first, cpu.inputs, step)))
        total = builder.add(total, builder.shuffle_vector(products, ir.Constant(words, ir.Undefined), chosen))
    return total


def _opaque(builder: Builder, value: Value) -> Value:
    """Hide from LLVM how the vector `value` came about, by an empty asm."""
    return builder.asm(ir.FunctionType(value.type, [value.type]), "", "=v,0", [value], side_effect=False)


def _load_weights(cpu: InstructionSet, builder: Builder, *address: Value) -> Value:
    """Load a vector of weights from where they are stored."""
    codes = builder.load(pointer(builder, ir.VectorType(BYTE, cpu.inputs), *address), align=1)
    if cpu.code == 2:
        return builder.bitcast(builder.sext(codes, ir.VectorType(HALF, cpu.inputs)), _lanes(cpu))
    codes = builder.bitcast(codes, _lanes(cpu))
    return builder.xor(codes, _signs(cpu)) if cpu.flips else codes


# --- tiles ------------------------------------------------------------------------------------------------------------


def dot_tile(cpu: InstructionSet, rows: int, tokens: int) -> Tile:
    """Make the tile that multiplies `rows` rows with `tokens` tokens, lanes along the inputs.

    Arguments: address of the first row; bytes of a row; index of the last row that exists (read again in place of rows
    past it); address of the first token's codes (zeros up to a multiple of `LINE` inputs); bytes from one token's codes
    to the next's; address of the first sum; bytes from one token's sums to the next's.
    """

    def body(builder: Builder, args: Sequence[Value]) -> None:
        weight, k, last, codes, stride, out, out_stride = args
        lanes = _lanes(cpu)
        # 1) Sums of zero; the addresses of rows and tokens.
        sums = [
            [cgutils.alloca_once_value(builder, ir.Constant(lanes, None)) for _ in range(rows)] for _ in range(tokens)
        ]
        row = []
        for r in range(rows):
            index = builder.select(builder.icmp_signed("<", long(r), last), long(r), last)
            row.append(builder.add(weight, builder.mul(index, k)))
        token = [builder.add(codes, builder.mul(long(t), stride)) for t in range(tokens)]

        def line(weights: Sequence[Value], at: Value) -> None:
            """Multiply the `LINE` inputs from `at` on, whose weights lie at the addresses `weights`."""
            for start in range(0, LINE, cpu.inputs):
                w = [_load_weights(cpu, builder, address, long(start)) for address in weights]
                for t in range(tokens):
                    place = builder.mul(builder.add(at, long(start)), long(cpu.code))
                    x = builder.load(pointer(builder, lanes, token[t], place), align=1)
                    for total, row_ in zip(sums[t], w, strict=True):
                        builder.store(_add_products(cpu, builder, builder.load(total), row_, x), total)

        # 2) Whole lines, then the rest of each row: copied, because what lies behind it may not be read.
        prefetch = function(builder, "llvm.prefetch.p0", ir.VoidType(), BYTE.as_pointer(), WORD, WORD, WORD)
        with cgutils.for_range(builder, builder.sdiv(k, long(LINE))) as loop:
            at = builder.mul(loop.index, long(LINE))
            for address in row:
                ahead = pointer(builder, BYTE, address, at, long(AHEAD))
                builder.call(prefetch, [ahead, WORD(0), WORD(3), WORD(1)])
            line([builder.add(address, at) for address in row], at)
        left = builder.srem(k, long(LINE))
        done = builder.sub(k, left)
        with builder.if_then(builder.icmp_signed(">", left, long(0)), likely=False):
            copies = [cgutils.alloca_once(builder, ir.ArrayType(BYTE, LINE), zfill=True) for _ in row]
            for copy, address in zip(copies, row, strict=True):
                cgutils.raw_memcpy(builder, copy, pointer(builder, BYTE, address, done), left, 1)
            line([builder.ptrtoint(copy, LONG) for copy in copies], done)
        # 3) Add up the lanes of each sum, and write it.
        add_up = function(builder, f"llvm.vector.reduce.add.v{cpu.lanes}i32", WORD, lanes)
        for t in range(tokens):
            for r in range(rows):
                to = pointer(builder, WORD, out, builder.mul(long(t), out_stride), long(4 * r))
                builder.store(builder.call(add_up, [builder.load(sums[t][r])]), to)

    return Tile(f"w8a8_dot_{rows}_{tokens}", 7, body)


def outer_tile(cpu: InstructionSet, rows: int, vectors: int) -> Tile:
    """Make the tile that adds the products of `rows` rows with `vectors` vectors of tokens, lanes along the tokens.

    Arguments: address of the first row's first word (of weights as they are stored where a code is a byte); bytes of a
    row; address of the tokens, packed [words][vectors][lanes]; number of words; address of the sums [rows][vectors].
    """

    def body(builder: Builder, args: Sequence[Value]) -> None:
        weight, stride, tokens, words, out = args
        lanes = _lanes(cpu)
        # 1) The sums so far, in registers; the addresses of rows.
        places = [pointer(builder, lanes, out, long(cpu.width * i)) for i in range(rows * vectors)]
        sums = [cgutils.alloca_once_value(builder, builder.load(place, align=4)) for place in places]
        row = [builder.add(weight, builder.mul(long(r), stride)) for r in range(rows)]
        signs = _signs(cpu)
        if cpu.intrinsic:
            # Hidden from LLVM by an empty asm: it would flip before broadcasting, in registers that are scarcer.
            signs = _opaque(builder, signs)
        # 2) Each row's word, broadcast, against every vector of tokens.
        with cgutils.for_range(builder, words) as loop:
            panel = builder.mul(loop.index, long(cpu.width * vectors))
            x = [
                builder.load(pointer(builder, lanes, tokens, panel, long(cpu.width * v)), align=4)
                for v in range(vectors)
            ]
            for r in range(rows):
                word = builder.load(pointer(builder, WORD, row[r], builder.mul(loop.index, long(4))), align=1)
                w = _splat(builder, word, lanes)
                if cpu.flips:
                    w = builder.xor(w, signs)
                for total, vector in zip(sums[r * vectors : (r + 1) * vectors], x, strict=True):
                    builder.store(_add_products(cpu, builder, builder.load(total), w, vector), total)
        # 3) Write the sums back.
        for total, place in zip(sums, places, strict=True):
            builder.store(builder.load(total), place, align=4)

    return Tile(f"w8a8_outer_{rows}_{vectors}", 5, body)


def transpose_tile(cpu: InstructionSet) -> Tile:
    """Make the tile that transposes as many vectors of words as a vector has lanes.

    Arguments: address and bytes from vector to vector, of the source and of the target.
    """

    def body(builder: Builder, args: Sequence[Value]) -> None:
        source, stride, target, target_stride = args
        lanes, n = _lanes(cpu), cpu.lanes
        v = [builder.load(pointer(builder, lanes, source, builder.mul(long(i), stride)), align=1) for i in range(n)]
        for bit in (bit for bit in (1, 2, 4, 8) if bit < n):
            low = ir.Constant(lanes, [n + j - bit if j & bit else j for j in range(n)])
            high = ir.Constant(lanes, [n + j if j & bit else j + bit for j in range(n)])
            v = [builder.shuffle_vector(v[i & ~bit], v[i | bit], high if i & bit else low) for i in range(n)]
        for i in range(n):
            builder.store(v[i], pointer(builder, lanes, target, builder.mul(long(i), target_stride)), align=1)

    return Tile("w8a8_transpose", 4, body)


def _splat(builder: Builder, word: Value, lanes: ir.VectorType) -> Value:
    """Broadcast `word` to every lane."""
    undefined = ir.Constant(lanes, ir.Undefined)
    one = builder.insert_element(undefined, word, WORD(0))
    return builder.shuffle_vector(one, undefined, ir.Constant(lanes, None))


# --- what compiled code calls -----------------------------------------------------------------------------------------


CPU = instruction_set()
"""The set that this process multiplies with."""


def _dot(rows: int, tokens: int) -> Any:
    tile = dot_tile(CPU, rows, tokens)

    @intrinsic
    def call(_context: Any, _weight: Any, _k: Any, _last: Any, _codes: Any, _stride: Any, _out: Any, _step: Any) -> Any:
        return tile.intrinsic()

    return call


def _outer(rows: int, vectors: int) -> Any:
    tile = outer_tile(CPU, rows, vectors)

    @intrinsic
    def call(_context: Any, _weight: Any, _stride: Any, _tokens: Any, _words: Any, _out: Any) -> Any:
        return tile.intrinsic()

    return call


@intrinsic
def transpose(_context: Any, _source: Any, _stride: Any, _target: Any, _target_stride: Any) -> Any:
    """Transpose `CPU.lanes` vectors of words; the arguments are `transpose_tile`'s."""
    return transpose_tile(CPU).intrinsic()


dot1, dot2, dot4, dot8 = (_dot(min(4, CPU.dot_sums // tokens), tokens) for tokens in (1, 2, 4, 8))
outer1, outer2, outer4 = (_outer(CPU.sums // vectors, vectors) for vectors in (1, 2, 4))
