"""The tiles of the INT8 product in LLVM IR: one description, for which an instruction set gives vectors and their step.

`vectors.py` has the vectors and what multiplies them, `grid.py` AMX's tile registers.
"""

from collections.abc import Sequence

from llvmlite import ir
from llvmlite.ir import IRBuilder as Builder
from numba.core import cgutils

from w8a8.kernels.cpu.grid import Grid
from w8a8.kernels.cpu.instructions import ARM, InstructionSet, Matrix
from w8a8.kernels.cpu.ir import BYTE, LONG, WORD, Tile, Value, function, long, pointer
from w8a8.kernels.cpu.vectors import add_matrix, add_products, lanes_of, load_weights, opaque, signs, splat

LINE = 64
"""Bytes of a row, and so inputs, that a dot tile takes at once: a cache line."""

_HALVES = ([0, 1, 4, 5], [2, 3, 6, 7])
"""Turns the sums of 2 rows and 4 tokens into those of 2 rows and 2 tokens, twice; and back."""
_ZIPPED = ([0, 4, 1, 5], [2, 6, 3, 7])
"""Turns 2 words of 4 tokens into 2 tokens with 2 words each, twice."""


def dot_tile(cpu: InstructionSet, rows: int, tokens: int) -> Tile:
    """Make the tile that multiplies `rows` rows with `tokens` tokens, lanes along the inputs.

    Arguments: address of the first row; bytes of a row; index of the last row that exists (read again in place of rows
    past it); address of the first token's codes (zeros up to a multiple of `LINE` inputs); bytes from one token's codes
    to the next's; address of the first sum; bytes from one token's sums to the next's; bytes from the first row to what
    is fetched meanwhile, line by line in the order of memory.
    """

    def body(builder: Builder, args: Sequence[Value]) -> None:
        weight, k, last, codes, stride, out, out_stride, ahead = args
        lanes = lanes_of(cpu)
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
                _in_order(cpu, builder)
                w = [load_weights(cpu, builder, address, long(start)) for address in weights]
                for t in range(tokens):
                    place = builder.mul(builder.add(at, long(start)), long(cpu.code))
                    x = builder.load(pointer(builder, lanes, token[t], place), align=1)
                    for total, row_ in zip(sums[t], w, strict=True):
                        builder.store(add_products(cpu, builder, builder.load(total), row_, x), total)

        # 2) Whole lines, then the rest of each row: copied, because what lies behind it may not be read.
        prefetch = function(builder, "llvm.prefetch.p0", ir.VoidType(), BYTE.as_pointer(), WORD, WORD, WORD)
        with cgutils.for_range(builder, builder.sdiv(k, long(LINE))) as loop:
            at = builder.mul(loop.index, long(LINE))
            for r in range(rows):
                place = pointer(builder, BYTE, weight, ahead, builder.mul(at, long(rows)), long(LINE * r))
                builder.call(prefetch, [place, WORD(0), WORD(3), WORD(1)])
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

    return Tile(f"w8a8_{cpu.name}_dot_{rows}_{tokens}", 8, body, _features(cpu))


def outer_tile(cpu: InstructionSet, rows: int, vectors: int) -> Tile:
    """Make the tile that adds the products of `rows` rows with `vectors` vectors of tokens, lanes along the tokens.

    Arguments: address of the first row's first word (of weights as they are stored where a code is a byte); bytes of a
    row; address of the tokens, packed [words][vectors][lanes]; number of words; address of the sums [rows][vectors].
    """

    matrix = cpu.matrix
    if matrix and cpu.grid:
        return _outer_grid(cpu, matrix, rows, vectors)
    side = matrix.side if matrix else 1

    def body(builder: Builder, args: Sequence[Value]) -> None:
        weight, stride, tokens, words, out = args
        lanes = lanes_of(cpu)
        # 1) The sums so far, in registers, `side` rows of a vector of tokens together; the addresses of rows.
        blocks = [
            [pointer(builder, lanes, out, long(cpu.width * ((r + i) * vectors + v))) for i in range(side)]
            for r in range(0, rows, side)
            for v in range(vectors)
        ]
        sums = []
        for block in blocks:
            found = _ordered(builder, _HALVES, [builder.load(place, align=4) for place in block])
            sums.append([cgutils.alloca_once_value(builder, total) for total in found])
        row = [builder.add(weight, builder.mul(long(r), stride)) for r in range(rows)]
        # Hidden from LLVM: it would flip before broadcasting, in registers that are scarcer.
        flips = opaque(builder, signs(cpu)) if cpu.flips and cpu.intrinsic else signs(cpu)
        # 2) `side` words of each row, against every vector of tokens.
        with cgutils.for_range(builder, builder.sdiv(words, long(side))) as loop:
            panel = builder.mul(loop.index, long(side * cpu.width * vectors))
            x = []
            for v in range(vectors):
                places = [
                    pointer(builder, lanes, tokens, panel, long(cpu.width * (i * vectors + v))) for i in range(side)
                ]
                x.append(_ordered(builder, _ZIPPED, [builder.load(place, align=4) for place in places]))
            at = builder.mul(loop.index, long(4 * side))
            for r in range(0, rows, side):
                if matrix:
                    w = _two_rows(builder, [pointer(builder, LONG, address, at) for address in row[r : r + side]])
                else:
                    w = splat(builder, builder.load(pointer(builder, WORD, row[r], at), align=1), lanes)
                    w = builder.xor(w, flips) if cpu.flips else w
                for v in range(vectors):
                    for total, codes in zip(sums[r // side * vectors + v], x[v], strict=True):
                        before = builder.load(total)
                        if matrix:
                            after = add_matrix(matrix, builder, before, w, codes)
                        else:
                            after = add_products(cpu, builder, before, w, codes)
                        builder.store(after, total)
        # 3) Write the sums back.
        for block, totals in zip(blocks, sums, strict=True):
            for total, place in zip(_ordered(builder, _HALVES, [*map(builder.load, totals)]), block, strict=True):
                builder.store(total, place, align=4)

    return Tile(f"w8a8_{cpu.name}_outer_{rows}_{vectors}", 5, body, _features(cpu))


def _ordered(builder: Builder, orders: Sequence[Sequence[int]], vectors: Sequence[Value]) -> Sequence[Value]:
    """Bring the lanes of two vectors into each of `orders`; one vector alone stays as it is."""
    if len(vectors) == 1:
        return vectors
    return [builder.shuffle_vector(*vectors, ir.Constant(ir.VectorType(WORD, len(order)), order)) for order in orders]


def _two_rows(builder: Builder, places: Sequence[Value]) -> Value:
    """Load 8 bytes of each of two rows into a vector."""
    pair = ir.Constant(ir.VectorType(LONG, 2), ir.Undefined)
    for i, place in enumerate(places):
        pair = builder.insert_element(pair, builder.load(place, align=1), WORD(i))
    return pair


def _outer_grid(cpu: InstructionSet, matrix: Matrix, rows: int, vectors: int) -> Tile:
    """Make an outer tile of AMX's tile registers: up to six hold sums, one weights and one tokens."""
    side = matrix.side

    def body(builder: Builder, args: Sequence[Value]) -> None:
        weight, stride, tokens, words, out = args
        grid, pitch = Grid(builder, matrix), long(cpu.width * vectors)
        blocks = [(r, v) for r in range(0, rows, side) for v in range(vectors)]
        *sums, weights, codes = range(len(blocks) + 2)
        # 1) The sums so far, in registers.
        places = [builder.add(out, long(cpu.width * (r * vectors + v))) for r, v in blocks]
        for total, place in zip(sums, places, strict=True):
            grid.load(total, place, pitch)
        # 2) 64 inputs of 16 rows, against each vector of tokens.
        with cgutils.for_range(builder, builder.sdiv(words, long(side))) as loop:
            panel = builder.add(tokens, builder.mul(loop.index, long(side * cpu.width * vectors)))
            block = builder.add(weight, builder.mul(loop.index, long(4 * side)))
            for v in range(vectors):
                grid.load(codes, builder.add(panel, long(cpu.width * v)), pitch)
                for r in range(0, rows, side):
                    grid.load(weights, builder.add(block, builder.mul(long(r), stride)), stride)
                    grid.multiply(sums[blocks.index((r, v))], weights, codes)
        # 3) Write the sums back.
        for total, place in zip(sums, places, strict=True):
            grid.store(total, place, pitch)
        grid.release()

    return Tile(f"w8a8_{cpu.name}_outer_{rows}_{vectors}", 5, body)


def transpose_tile(cpu: InstructionSet) -> Tile:
    """Make the tile that transposes as many vectors of words as a vector has lanes.

    Arguments: address and bytes from vector to vector, of the source and of the target.
    """

    def body(builder: Builder, args: Sequence[Value]) -> None:
        source, stride, target, target_stride = args
        lanes, n = lanes_of(cpu), cpu.lanes
        v = [builder.load(pointer(builder, lanes, source, builder.mul(long(i), stride)), align=1) for i in range(n)]
        for bit in (bit for bit in (1, 2, 4, 8) if bit < n):
            low = ir.Constant(lanes, [n + j - bit if j & bit else j for j in range(n)])
            high = ir.Constant(lanes, [n + j if j & bit else j + bit for j in range(n)])
            v = [builder.shuffle_vector(v[i & ~bit], v[i | bit], high if i & bit else low) for i in range(n)]
        for i in range(n):
            builder.store(v[i], pointer(builder, lanes, target, builder.mul(long(i), target_stride)), align=1)

    return Tile(f"w8a8_{cpu.name}_transpose", 4, body)


def _in_order(cpu: InstructionSet, builder: Builder) -> None:
    """Keep LLVM from loading earlier what follows: with ARM's many registers it would load more than they hold."""
    if cpu.triple == ARM and cpu.intrinsic:
        builder.asm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", [], side_effect=True)


def _features(cpu: InstructionSet) -> str:
    """Name LLVM's features for a tile: of ARM's CPUs LLVM does not know by itself what they have."""
    return cpu.target[1] if cpu.triple == ARM and cpu.intrinsic else ""
