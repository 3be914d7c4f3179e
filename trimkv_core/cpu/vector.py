"""What numba's Python lacks: a register tile of a matrix product, bits as numbers, a counter that threads share.

These are written as LLVM instructions, so that the order of every sum is the one written here. A product's rows then
have the same bits however many rows there are: a library picks other kernels for a few rows, and they round otherwise.

Letters: K inner dimension of a product, R rows.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

# Outputs a tile computes side by side: two AVX2 registers, one of AVX-512, four of NEON.
LANES = 16
# Rows of a tile: 6 x 2 accumulators, two weights and a factor are AVX2's sixteen registers.
TILE_ROWS = 6

_FLOAT = ir.FloatType()
_INT32, _INT64 = ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_FLOAT, LANES)
_FLOAT_BYTES = 4


def _make_tile(rows: int) -> Any:
    """A function that computes `rows` x LANES outputs of a product.

    tile(weight, ldw, x, ldx, y, ldy, start, add, k): addresses (bytes) and strides (numbers); y[r, lane] = start[lane]
    + Σ x[r, i]·weight[i, lane] over i in 0 … k-1, in this order, each step one fused multiply-add, and then, if `add`
    is not 0, + add[r, lane], strides as in y. `start` 0: zeros. k ≥ 1.
    """

    @intrinsic
    def tile(context, weight, ldw, x, ldx, y, ldy, start, add, k):
        address, size = types.uintp, types.intp
        signature = types.void(address, size, address, size, address, size, address, address, size)

        def generate(target, builder, signature, arguments):
            weight, ldw, x, ldx, y, ldy, start, add, k = arguments
            fma = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), f"llvm.fma.v{LANES}f32"
            )

            def pointer(base, offset, kind):
                at = builder.gep(builder.inttoptr(base, _FLOAT.as_pointer()), [offset])
                return builder.bitcast(at, kind.as_pointer())

            def load(at):
                value = builder.load(at)
                value.align = _FLOAT_BYTES
                return value

            zero64 = ir.Constant(_INT64, 0)
            zeros = ir.Constant(_VECTOR, [0.0] * LANES)
            undefined = ir.Constant(_VECTOR, ir.Undefined)
            row_offsets = [builder.mul(ldx, ir.Constant(_INT64, row)) for row in range(rows)]
            first = cgutils.alloca_once_value(builder, zeros)
            with builder.if_then(builder.icmp_unsigned("!=", start, zero64)):
                builder.store(load(pointer(start, zero64, _VECTOR)), first)
            begin = builder.load(first)
            x_rows = [pointer(x, offset, _FLOAT) for offset in row_offsets]
            entry = builder.block
            loop, done = builder.append_basic_block("k"), builder.append_basic_block("done")
            builder.branch(loop)

            builder.position_at_end(loop)
            index = builder.phi(_INT64)
            index.add_incoming(zero64, entry)
            sums = [builder.phi(_VECTOR) for _ in range(rows)]
            column = load(pointer(weight, builder.mul(index, ldw), _VECTOR))
            following = []
            for row in range(rows):
                sums[row].add_incoming(begin, entry)
                factor = builder.insert_element(
                    undefined, builder.load(builder.gep(x_rows[row], [index])), ir.Constant(_INT32, 0)
                )
                spread = builder.shuffle_vector(
                    factor, undefined, ir.Constant(ir.VectorType(_INT32, LANES), [0] * LANES)
                )
                following.append(builder.call(fma, [spread, column, sums[row]]))
            after = builder.add(index, ir.Constant(_INT64, 1))
            index.add_incoming(after, loop)
            for total, value in zip(sums, following, strict=True):
                total.add_incoming(value, loop)
            builder.cbranch(builder.icmp_signed("<", after, k), loop, done)

            builder.position_at_end(done)
            with builder.if_else(builder.icmp_unsigned("!=", add, zero64)) as (adds, only_stores):
                for branch, is_adding in ((adds, True), (only_stores, False)):
                    with branch:
                        for row in range(rows):
                            offset = builder.mul(ldy, ir.Constant(_INT64, row))
                            value = following[row]
                            if is_adding:
                                value = builder.fadd(value, load(pointer(add, offset, _VECTOR)))
                            builder.store(value, pointer(y, offset, _VECTOR)).align = _FLOAT_BYTES
            return target.get_dummy_value()

        return signature, generate

    return tile


tile_1, tile_2, tile_3, tile_4, tile_5, tile_6 = (_make_tile(rows) for rows in range(1, TILE_ROWS + 1))


@numba.njit(inline="always")
def multiply_rows(weight, ldw, x, ldx, y, ldy, start, add, k, rows):
    """`rows` rows of a product against one panel: arguments as for a tile."""
    row = 0
    while row < rows:
        x_row, y_row = x + np.uintp(4 * row * ldx), y + np.uintp(4 * row * ldy)
        add_row = add + np.uintp(4 * row * ldy) if add != 0 else add
        left = rows - row
        if left >= 6:
            tile_6(weight, ldw, x_row, ldx, y_row, ldy, start, add_row, k)
        elif left == 5:
            tile_5(weight, ldw, x_row, ldx, y_row, ldy, start, add_row, k)
        elif left == 4:
            tile_4(weight, ldw, x_row, ldx, y_row, ldy, start, add_row, k)
        elif left == 3:
            tile_3(weight, ldw, x_row, ldx, y_row, ldy, start, add_row, k)
        elif left == 2:
            tile_2(weight, ldw, x_row, ldx, y_row, ldy, start, add_row, k)
        else:
            tile_1(weight, ldw, x_row, ldx, y_row, ldy, start, add_row, k)
        row += 6


@intrinsic
def dot(context, a, b, size):
    """Σ a[i]·b[i] of float32 at two addresses; size: a positive multiple of LANES. The order of the sum is fixed."""

    def generate(target, builder, signature, arguments):
        a, b, size = arguments
        fma = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), f"llvm.fma.v{LANES}f32"
        )
        reduce = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_FLOAT, [_FLOAT, _VECTOR]), f"llvm.vector.reduce.fadd.v{LANES}f32"
        )
        left, right = (builder.inttoptr(address, _VECTOR.as_pointer()) for address in (a, b))
        entry = builder.block
        loop, done = builder.append_basic_block("dot"), builder.append_basic_block("dot_done")
        steps = builder.udiv(size, ir.Constant(_INT64, LANES))
        builder.branch(loop)
        builder.position_at_end(loop)
        index, total = builder.phi(_INT64), builder.phi(_VECTOR)
        index.add_incoming(ir.Constant(_INT64, 0), entry)
        total.add_incoming(ir.Constant(_VECTOR, [0.0] * LANES), entry)
        factors = []
        for side in (left, right):
            factor = builder.load(builder.gep(side, [index]))
            factor.align = _FLOAT_BYTES
            factors.append(factor)
        value = builder.call(fma, [*factors, total])
        after = builder.add(index, ir.Constant(_INT64, 1))
        index.add_incoming(after, loop)
        total.add_incoming(value, loop)
        builder.cbranch(builder.icmp_signed("<", after, steps), loop, done)
        builder.position_at_end(done)
        # "reassoc": lanes are added as a tree, not one after another.
        return builder.call(reduce, [ir.Constant(_FLOAT, -0.0), value], fastmath=("reassoc",))

    return types.float32(types.uintp, types.uintp, types.intp), generate


@intrinsic
def float_of_bits(context, bits):
    """The float32 of 32 bits."""

    def generate(target, builder, signature, arguments):
        return builder.bitcast(arguments[0], _FLOAT)

    return types.float32(types.int32), generate


@intrinsic
def widen(context, value):
    """The float32 of a float32, or of a bfloat16's bits in a uint16."""
    is_bfloat16 = value == types.uint16

    def generate(target, builder, signature, arguments):
        if not is_bfloat16:
            return arguments[0]
        bits = builder.shl(builder.zext(arguments[0], _INT32), ir.Constant(_INT32, 16))
        return builder.bitcast(bits, _FLOAT)

    return types.float32(value), generate


@intrinsic
def fetch_ahead(context, address):
    """Ask for the cache line at an address; it need not be a valid one."""

    def generate(target, builder, signature, arguments):
        byte = ir.IntType(8).as_pointer()
        prefetch = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), [byte, _INT32, _INT32, _INT32]), "llvm.prefetch.p0"
        )
        read, keep, data = (ir.Constant(_INT32, value) for value in (0, 3, 1))
        builder.call(prefetch, [builder.inttoptr(arguments[0], byte), read, keep, data])
        return target.get_dummy_value()

    return types.void(types.uintp), generate


@intrinsic
def next_number(context, counter):
    """Add 1 to an intp at an address, together with other threads; returns the number before."""

    def generate(target, builder, signature, arguments):
        at = builder.inttoptr(arguments[0], _INT64.as_pointer())
        return builder.atomic_rmw("add", at, ir.Constant(_INT64, 1), "monotonic")

    return types.intp(types.uintp), generate


@intrinsic
def fused(context, a, b, c):
    """a·b + c of float32, rounded once: what a kernel that may reorder sums still takes as written."""

    def generate(target, builder, signature, arguments):
        fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_FLOAT, [_FLOAT] * 3), "llvm.fma.f32")
        return builder.call(fma, arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


@numba.njit(inline="always")
def exp(x):
    """eˣ in float32 for x ≤ 0, within 2 units in the last place; 0 below -87. Straight-line, so that loops vectorise.

    x = n·ln 2 + r with |r| ≤ ln 2 / 2; the polynomial is 1 + r + r²·q(r), q fitted to the least largest error, 2⁻²⁸.
    ln 2 is taken off in two parts, by `fused`: a kernel with fast arithmetic would make them one and lose two bits.
    """
    bounded = max(x, np.float32(-87.0))
    n = np.floor(bounded * np.float32(1.4426950408889634) + np.float32(0.5))
    r = fused(n, np.float32(-0.693359375), bounded)
    r = fused(n, np.float32(2.12194440e-4), r)
    p = np.float32(0.0013950591)
    p = fused(p, r, np.float32(0.008368953))
    p = fused(p, r, np.float32(0.041666206))
    p = fused(p, r, np.float32(0.16666518))
    p = fused(p, r, np.float32(0.5))
    p = fused(p, r, np.float32(1.0))
    p = fused(p, r, np.float32(1.0))
    power = float_of_bits((np.int32(n) + np.int32(127)) << np.int32(23))
    # A comparison that NaN fails: it must come out as NaN.
    return np.float32(0.0) if x < np.float32(-87.0) else p * power
