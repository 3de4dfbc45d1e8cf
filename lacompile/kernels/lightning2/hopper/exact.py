"""Hopper's body for fp32: every product as six of bf16 (digits.py), as exact as fp32 itself.

Making digits takes as long as the products do, so that all eight warps do both. Digits of ``b``, ``c`` and the state
lie in shared memory, where the tensor cores read them; those of what is multiplied by them stay in registers. What the
products of one chunk bring is worked at while they are under way. Tiles arrive by tensor descriptor, each asked for
once nobody needs the one of the chunk before.
"""

# What @gluon.jit makes of a function and of its launch is beyond a type checker.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma_wait

from ..factors import FACTORS
from .digits import digits, post, product, room, room_for_digits, tiles_at, turned
from .outputs import weight_of
from .state import head_to_state, load_state, store_mark, store_state
from .tiles import async_load, async_store, chunk_at

SLICE = gl.constexpr(64)
"""Columns that are contracted at a time: more of them have too many digits for the registers."""


@gluon.constexpr_function
def accumulator(columns):
    """The layout of a product ``[64, columns]``: half of the columns to each four of eight warps."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, columns // 2, 16])


@gluon.jit
def ask(source, batch, head, token, column, here, tile, wanted):
    """Starts the copy of one tile, if ``wanted``; ``here`` is told when it has arrived."""
    mbarrier.expect(here, 4 * tile.shape[0] * tile.shape[1], pred=wanted)
    async_load(source, [batch, head, token, column], here, tile, pred=wanted)


@gluon.jit
def decays_of_chunk(
    factors_ptr, at, stop, g_head, row, col, t, t_state, CHUNK: gl.constexpr, REVERSE: gl.constexpr,
    PER_TOKEN: gl.constexpr,
):  # fmt: skip
    """(log2 from token col to token row, decay from the state, decay to the state, decay of the whole chunk)."""
    if PER_TOKEN:
        of_chunk = factors_ptr + at.to(gl.int64) * FACTORS
        gap = gl.load(of_chunk + row) - gl.load(of_chunk + col)
        gap += gl.load(of_chunk + 3 * CHUNK + row) - gl.load(of_chunk + 3 * CHUNK + col)
        from_state = gl.load(of_chunk + (2 if REVERSE else 1) * CHUNK + t)
        to_state = gl.load(of_chunk + (1 if REVERSE else 2) * CHUNK + t_state)
        whole = gl.exp2(gl.load(of_chunk + CHUNK - 1))
    else:
        count = gl.minimum(stop - at, CHUNK)
        gap = (row - col).to(gl.float32) * g_head
        passed = gl.maximum(count - 1 - t, 0) if REVERSE else t + 1
        from_state = gl.exp2(passed.to(gl.float32) * g_head)
        to_state = head_to_state(t_state, count, g_head, REVERSE)
        whole = gl.exp2(count.to(gl.float32) * g_head)
    return gap, from_state, to_state, whole


@gluon.jit
def attend_exactly(
    a_source,
    b_source,
    c_source,
    y_target,
    x_source,
    factors_ptr,
    rows_ptr,
    marks_ptr,
    start_ptr,
    end_ptr,
    batch,
    a_head,
    b_head,
    c_head,
    y_head,
    x_head,
    g_head,
    scale,
    begin,
    stop,
    length,
    span,
    store_end,
    block,
    DK: gl.constexpr,
    DV: gl.constexpr,
    BK: gl.constexpr,
    BV: gl.constexpr,
    CHUNK: gl.constexpr,
    REVERSE: gl.constexpr,
    PER_TOKEN: gl.constexpr,
    HAS_START: gl.constexpr,
    STORE_END: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    AUDIT: gl.constexpr,
    OF_A: gl.constexpr,
    OF_B: gl.constexpr,
    OF_C: gl.constexpr,
):
    """What body.attend computes, from the same arguments; the state is transposed, ``[BV, BK]``, as in state.py.

    OF_A, OF_B and OF_C are how many digits the numbers of a, b and c have.
    """
    of_y: gl.constexpr = accumulator(BV)
    of_scores: gl.constexpr = accumulator(CHUNK)
    of_state: gl.constexpr = accumulator(BK)
    y_operand: gl.constexpr = gl.DotOperandLayout(0, of_y, 2)
    state_operand: gl.constexpr = gl.DotOperandLayout(0, of_state, 2)
    as_read: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [8, 1], [1, 0])
    a_room, b_room = room(CHUNK, BK, gl.float32), room(CHUNK, BK, gl.float32)
    # The second one also holds x, then scores on their way to the warps that need them.
    c_room, y_room = room(CHUNK, BV, gl.float32), room(CHUNK, BV, gl.float32)
    b_rooms, c_rooms = room_for_digits(CHUNK, BK, OF_B), room_for_digits(CHUNK, BV, OF_C)
    state_rooms = room_for_digits(BV, BK, 3)
    arrived = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(4):
        mbarrier.init(arrived.index(n), count=1)
    fence_async_shared()
    a_here, b_here, c_here, x_here = arrived.index(0), arrived.index(1), arrived.index(2), arrived.index(3)

    column = block * BV
    chunks = gl.cdiv(stop - begin, CHUNK)
    at = chunk_at(0, begin, chunks, CHUNK, REVERSE)
    ask(b_source, batch, b_head, at, 0, b_here, b_room.index(0), True)
    ask(a_source, batch, a_head, at, 0, a_here, a_room.index(0), True)
    ask(c_source, batch, c_head, at, column, c_here, c_room.index(0), True)
    if HAS_START:
        state = load_state(start_ptr, column, of_state, DK, DV, BK, BV, TRANSPOSED)
    else:
        state = gl.zeros([BV, BK], gl.float32, layout=of_state)
    row = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, of_scores))[:, None]
    col = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, of_scores))[None, :]
    t = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, of_y))[:, None]
    t_state = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, state_operand))[None, :]
    inside = row <= col if REVERSE else row >= col
    no_scores = gl.zeros([CHUNK, CHUNK], gl.float32, layout=of_scores)
    no_y = gl.zeros([CHUNK, BV], gl.float32, layout=of_y)
    for step in range(chunks):
        at = chunk_at(step, begin, chunks, CHUNK, REVERSE)
        ahead, more = chunk_at(step + 1, begin, chunks, CHUNK, REVERSE), step + 1 < chunks
        phase = step & 1
        # Always 0, which no compiler knows: it would keep the addresses of all tiles in registers, and spill.
        place = gl.minimum(stop - 1 - at, 0)
        a_tile, b_tile = a_room.index(place), b_room.index(place)
        c_tile, y_tile = c_room.index(place), y_room.index(place)
        b_digits, c_digits = tiles_at(b_rooms, place), tiles_at(c_rooms, place)
        state_digits = tiles_at(state_rooms, place)
        gap, from_state, to_state, whole = decays_of_chunk(
            factors_ptr, at, stop, g_head, row, col, t, t_state, CHUNK, REVERSE, PER_TOKEN
        )

        post(state, state_digits)
        mbarrier.wait(b_here, phase)
        post(b_tile.load(as_read), b_digits)
        fence_async_shared()
        tma.store_wait(0)
        # Behind this barrier b has been read, and y of the chunk before.
        ask(b_source, batch, b_head, ahead, 0, b_here, b_tile, more)
        if AUDIT:
            ask(x_source, batch, x_head, at, column, x_here, y_tile, True)

        mbarrier.wait(a_here, phase)
        a = digits(a_tile.slice(0, SLICE, 1).load(y_operand), OF_A)
        scores = product(a, turned(b_digits, 0, SLICE), no_scores)
        y = product(a, turned(state_digits, 0, SLICE), no_y)
        if BK > SLICE:
            a = digits(a_tile.slice(SLICE, SLICE, 1).load(y_operand), OF_A)
            scores, y = warpgroup_mma_wait(0, deps=[scores, y])
            more_scores = product(a, turned(b_digits, SLICE, SLICE), no_scores)
            more_y = product(a, turned(state_digits, SLICE, SLICE), no_y)
        mbarrier.wait(c_here, phase)
        post(c_tile.load(as_read), c_digits)
        fence_async_shared()
        weighted = c_tile.permute([1, 0]).load(state_operand) * to_state
        weighted_digits = digits(weighted * scale if REVERSE else weighted, 3)
        if BK > SLICE:
            more_scores, more_y = warpgroup_mma_wait(0, deps=[more_scores, more_y])
            scores, y = scores + more_scores, y + more_y
        else:
            scores, y = warpgroup_mma_wait(0, deps=[scores, y])

        brought = product(weighted_digits, b_digits, gl.zeros([BV, BK], gl.float32, layout=of_state))
        y *= from_state if REVERSE else from_state * scale
        if AUDIT:
            mbarrier.wait(x_here, phase)
            row_sums = gl.sum(y_tile.load(of_y) * y, 1)[:, None]  # the rest is inside.py's
            gl.store(rows_ptr + at.to(gl.int64) + t, row_sums, mask=t < stop - at)
        y_tile.store(scores * weight_of(gap, inside, scale, REVERSE))
        of_pairs = product(digits(y_tile.load(y_operand), 3), c_digits, no_y)
        # Behind the barrier between storing and loading scores a and c have been read.
        ask(a_source, batch, a_head, ahead, 0, a_here, a_tile, more)
        ask(c_source, batch, c_head, ahead, column, c_here, c_tile, more)
        brought, of_pairs = warpgroup_mma_wait(0, deps=[brought, of_pairs])
        state = state * whole + brought
        y_tile.store(y + of_pairs)
        # Between the stores and the first barrier after them, which also says that all products of the chunk are made.
        fence_async_shared()
        if AUDIT:
            store_mark(
                marks_ptr, state, at, length, span, column + place, of_state, DK, DV, CHUNK, REVERSE, TRANSPOSED,
            )  # fmt: skip
        async_store(y_target, [batch, y_head, at, column], y_tile)
    tma.store_wait(0)
    if STORE_END:
        if store_end:
            store_state(end_ptr, state, column + gl.minimum(begin, 0), of_state, DK, DV, TRANSPOSED)
