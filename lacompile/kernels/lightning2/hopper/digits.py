"""fp32 numbers as sums of three bf16 numbers, their digits, and products of them on the tensor cores.

Six of the nine products of two numbers' digits make one product of fp32: the rest is below its last bit. A number that
came from bf16 has one digit; products with the others, which are zero, are not made.
"""

# What @gluon.jit makes of a function and of its launch is beyond a type checker.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma


@gluon.jit
def rounded(x, dtype: gl.constexpr):
    """x in 16 bits, two numbers at a time: the instruction that converts one is slow (kernel-notes/fp32.md)."""
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.bfloat16, is_pure=True, pack=2
        )
    else:
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.float16, is_pure=True, pack=2
        )


@gluon.jit
def digits(x, COUNT: gl.constexpr):
    """COUNT bf16 numbers whose sum is x, the largest first: three, or one of x that is bf16 itself."""
    high = rounded(x, gl.bfloat16)
    if COUNT == 1:
        return (high,)
    else:
        rest = x - high.to(gl.float32)
        middle = rounded(rest, gl.bfloat16)
        return high, middle, rounded(rest - middle.to(gl.float32), gl.bfloat16)


@gluon.jit
def room(rows: gl.constexpr, columns: gl.constexpr, dtype: gl.constexpr):
    """Shared memory for one tile ``[1, rows, columns]``."""
    bits: gl.constexpr = dtype.primitive_bitwidth
    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=bits, rank=2)
    return gl.allocate_shared_memory(dtype, [1, rows, columns], layout)


@gluon.jit
def room_for_digits(rows: gl.constexpr, columns: gl.constexpr, COUNT: gl.constexpr):
    """That for digits; each apart, so that no warp waits for others between writing two of them."""
    high = room(rows, columns, gl.bfloat16)
    if COUNT == 1:
        return (high,)
    else:
        middle = room(rows, columns, gl.bfloat16)
        return high, middle, room(rows, columns, gl.bfloat16)


@gluon.jit
def tiles_at(rooms, place):
    """The tiles of digits in the room for them."""
    if len(rooms) == 1:
        return (rooms[0].index(place),)
    else:
        return rooms[0].index(place), rooms[1].index(place), rooms[2].index(place)


@gluon.jit
def post(x, tiles):
    """Writes the digits of x to shared memory."""
    made = digits(x, len(tiles))
    for n in gl.static_range(len(tiles)):
        tiles[n].store(made[n])


@gluon.jit
def turned(tiles, column: gl.constexpr, COLUMNS: gl.constexpr):
    """The transposes of some columns."""
    high = tiles[0].slice(column, COLUMNS, 1).permute([1, 0])
    if len(tiles) == 1:
        return (high,)
    else:
        middle = tiles[1].slice(column, COLUMNS, 1).permute([1, 0])
        return high, middle, tiles[2].slice(column, COLUMNS, 1).permute([1, 0])


@gluon.jit
def product(a, b, zero):
    """Starts the product of digits in registers with those in shared memory, small terms first.

    From zero: the tensor cores cut off what does not fit beside a sum, and would do so at every step of a long one.
    """
    total = zero
    if len(a) == 3:
        total = warpgroup_mma(a[2], b[0], total, is_async=True)
    if len(b) == 3:
        total = warpgroup_mma(a[0], b[2], total, is_async=True)
    if len(a) == 3 and len(b) == 3:
        total = warpgroup_mma(a[1], b[1], total, is_async=True)
    if len(a) == 3:
        total = warpgroup_mma(a[1], b[0], total, is_async=True)
    if len(b) == 3:
        total = warpgroup_mma(a[0], b[1], total, is_async=True)
    return warpgroup_mma(a[0], b[0], total, is_async=True)
