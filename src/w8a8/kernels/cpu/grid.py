"""AMX's tile registers in LLVM IR: eight of 16 rows, 64 bytes each.

`tdpbssd` multiplies a register of weights, 64 inputs of 16 rows as they are stored, with one of tokens, 16 words of 16
tokens as the outer tiles have them packed, and adds to one of 16 x 16 sums. So it takes signed bytes, nothing is to be
flipped, and nothing is to be moved beforehand.

A function that uses the registers sets them up and gives them back: a thread needs no state, and switching threads
costs no more than ever. Without the instructions, memory takes the place of registers, and plain LLVM IR that of
`tdpbssd`.
"""

from llvmlite import ir
from llvmlite.ir import IRBuilder as Builder
from numba.core import cgutils

from w8a8.kernels.cpu.instructions import Matrix
from w8a8.kernels.cpu.ir import BYTE, LONG, WORD, Value, function, long, pointer
from w8a8.kernels.cpu.vectors import plain_products, splat

ROWS, WIDTH, REGISTERS = 16, 64, 8
"""Rows of a register, bytes of a row, registers."""

_CONFIG = bytes([1, *[0] * 15, *[WIDTH, 0] * REGISTERS, *[0] * 16, *[ROWS] * REGISTERS, *[0] * 8])
"""What sets the registers up, laid out as LDTILECFG wants it: palette 1, bytes of rows, numbers of rows."""

_LANES, _CODES = ir.VectorType(WORD, WIDTH // 4), ir.VectorType(BYTE, WIDTH)


class Grid:
    """The registers, by number, in the code of one function."""

    def __init__(self, builder: Builder, matrix: Matrix) -> None:
        """Set the registers up, in code that `builder` generates."""
        self._builder, self._matrix = builder, matrix
        if matrix.intrinsic:
            config = cgutils.alloca_once_value(
                builder, ir.Constant(ir.ArrayType(BYTE, len(_CONFIG)), bytearray(_CONFIG))
            )
            self._call("llvm.x86.ldtilecfg", builder.bitcast(config, BYTE.as_pointer()))
        else:
            blocks = [cgutils.alloca_once(builder, ir.ArrayType(BYTE, ROWS * WIDTH)) for _ in range(REGISTERS)]
            self._memory = [builder.ptrtoint(block, LONG) for block in blocks]

    def load(self, register: int, address: Value, stride: Value) -> None:
        """Load a register from 16 rows, `stride` bytes apart."""
        if self._matrix.intrinsic:
            self._call("llvm.x86.tileloadd64", BYTE(register), pointer(self._builder, BYTE, address), stride)
        else:
            self._copy(address, stride, self._memory[register], long(WIDTH))

    def store(self, register: int, address: Value, stride: Value) -> None:
        """Write a register to 16 rows, `stride` bytes apart."""
        if self._matrix.intrinsic:
            self._call("llvm.x86.tilestored64", BYTE(register), pointer(self._builder, BYTE, address), stride)
        else:
            self._copy(self._memory[register], long(WIDTH), address, stride)

    def multiply(self, sums: int, weights: int, tokens: int) -> None:
        """Add to a register of sums the products of one of weights with one of tokens."""
        if self._matrix.intrinsic:
            self._call(self._matrix.intrinsic, BYTE(sums), BYTE(weights), BYTE(tokens))
            return
        builder, memory = self._builder, self._memory
        with cgutils.for_range(builder, long(ROWS)) as row, cgutils.for_range(builder, long(WIDTH // 4)) as word:
            at = builder.mul(row.index, long(WIDTH))
            w = builder.load(pointer(builder, WORD, memory[weights], at, builder.mul(word.index, long(4))))
            x = builder.load(pointer(builder, _CODES, memory[tokens], builder.mul(word.index, long(WIDTH))), align=4)
            place = pointer(builder, _LANES, memory[sums], at)
            broadcast = builder.bitcast(splat(builder, w, _LANES), _CODES)
            total = plain_products(builder, builder.load(place, align=4), broadcast, x, builder.sext)
            builder.store(total, place, align=4)

    def release(self) -> None:
        """Give the registers back."""
        if self._matrix.intrinsic:
            self._call("llvm.x86.tilerelease")

    def _call(self, name: str, *arguments: Value) -> None:
        types = [argument.type for argument in arguments]
        self._builder.call(function(self._builder, name, ir.VoidType(), *types), arguments)

    def _copy(self, source: Value, stride: Value, target: Value, target_stride: Value) -> None:
        builder = self._builder
        with cgutils.for_range(builder, long(ROWS)) as loop:
            row = builder.load(pointer(builder, _CODES, source, builder.mul(loop.index, stride)), align=1)
            builder.store(row, pointer(builder, _CODES, target, builder.mul(loop.index, target_stride)), align=1)
