"""Half of Hopper's body: the warps that carry the state from chunk to chunk.

Before a chunk they post its state, rounded, for the other half (outputs.py), then add to it what the chunk brings. What
rounding leaves is posted, too, where row sums have to agree (decay_grad.py). The state is transposed, ``[BV, BK]``, its
rows spread over the warps: so the values, decayed, are the first operand of the product straight from registers.
"""

# What @gluon.jit makes of a function and of its launch is beyond a type checker.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..factors import FACTORS
from .digits import rounded
from .tiles import accumulator, chunk_at, rows_agree


@gluon.jit
def head_to_state(t, count, g_head, REVERSE: gl.constexpr):
    """Decays between token t, of ``count`` in its chunk, and the state after the chunk, or backwards before it."""
    return gl.exp2((t + 1 if REVERSE else gl.maximum(count - 1 - t, 0)).to(gl.float32) * g_head)


@gluon.jit
def weighted_values(c_tile, to_state, scale, layout: gl.constexpr, operand: gl.constexpr, REVERSE: gl.constexpr):
    """The values of one chunk, transposed, decayed to where the state is taken next."""
    if REVERSE:
        to_state *= scale
    c = c_tile.permute([1, 0]).load(layout).to(gl.float32) * to_state
    return gl.convert_layout(c.to(c_tile.dtype), operand)


@gluon.jit
def state_offsets(
    column,
    layout: gl.constexpr,
    DK: gl.constexpr,
    DV: gl.constexpr,
    BK: gl.constexpr,
    BV: gl.constexpr,
    TRANSPOSED: gl.constexpr,
):
    """Offsets and mask ``[BV, BK]`` of columns from ``column`` on, in a state ``[DK, DV]`` or ``[DV, DK]``."""
    k = gl.arange(0, BK, layout=gl.SliceLayout(0, layout))[None, :]
    n = column + gl.arange(0, BV, layout=gl.SliceLayout(1, layout))[:, None]
    return n * DK + k if TRANSPOSED else k * DV + n, (k < DK) & (n < DV)


@gluon.jit
def load_state(
    start_ptr,
    column,
    layout: gl.constexpr,
    DK: gl.constexpr,
    DV: gl.constexpr,
    BK: gl.constexpr,
    BV: gl.constexpr,
    TRANSPOSED: gl.constexpr,
):
    """The columns of a state that a segment begins with."""
    at_state, in_state = state_offsets(column, layout, DK, DV, BK, BV, TRANSPOSED)
    return gl.load(start_ptr + at_state, mask=in_state, other=0.0)


@gluon.jit
def store_state(
    target_ptr, state, column, layout: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr, TRANSPOSED: gl.constexpr
):
    """Writes columns of a state, in the target's dtype."""
    at_state, in_state = state_offsets(column, layout, DK, DV, state.shape[1], state.shape[0], TRANSPOSED)
    gl.store(target_ptr + at_state, state.to(target_ptr.dtype.element_ty), mask=in_state)


@gluon.jit
def store_mark(
    marks_ptr,
    state,
    at,
    length,
    span,
    column,
    layout: gl.constexpr,
    DK: gl.constexpr,
    DV: gl.constexpr,
    CHUNK: gl.constexpr,
    REVERSE: gl.constexpr,
    TRANSPOSED: gl.constexpr,
):
    """Writes the state behind the chunk at ``at``, or backwards before it, down where a span ends."""
    border = at if REVERSE else at + CHUNK
    if (border % span == 0) | (border >= length):
        mark = (gl.cdiv(border, span) - (0 if REVERSE else 1)).to(gl.int64) * (DK * DV)
        store_state(marks_ptr + mark, state, column, layout, DK, DV, TRANSPOSED)


@gluon.jit
def carry_state(
    b_tiles,
    c_tiles,
    state_tiles,
    rest_tiles,
    arrived,
    posted,
    taken,
    factors_ptr,
    marks_ptr,
    start_ptr,
    end_ptr,
    g_head,
    scale,
    begin,
    stop,
    length,
    span,
    store_end,
    column,
    DK: gl.constexpr,
    DV: gl.constexpr,
    REVERSE: gl.constexpr,
    PER_TOKEN: gl.constexpr,
    HAS_START: gl.constexpr,
    STORE_END: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    AUDIT: gl.constexpr,
):
    """Four warps that keep the state: they post it, rounded, before each chunk, and take the chunk into it."""
    STAGES: gl.constexpr = b_tiles.shape[0]
    SLOTS: gl.constexpr = state_tiles.shape[0]
    AGREES: gl.constexpr = rows_agree(AUDIT, PER_TOKEN)
    CHUNK: gl.constexpr = b_tiles.shape[1]
    BK: gl.constexpr = b_tiles.shape[2]
    BV: gl.constexpr = c_tiles.shape[2]
    TO_STATE: gl.constexpr = 1 if REVERSE else 2
    dtype: gl.constexpr = b_tiles.dtype
    of_state: gl.constexpr = accumulator(BK)
    of_c: gl.constexpr = accumulator(CHUNK)
    operand: gl.constexpr = gl.DotOperandLayout(0, of_state, 2)
    if HAS_START:
        state = load_state(start_ptr, column, of_state, DK, DV, BK, BV, TRANSPOSED)
    else:
        state = gl.zeros([BV, BK], gl.float32, layout=of_state)
    t = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, of_c))[None, :]
    chunks = gl.cdiv(stop - begin, CHUNK)
    at = chunk_at(0, begin, chunks, CHUNK, REVERSE)
    if PER_TOKEN:
        of_chunk = factors_ptr + at.to(gl.int64) * FACTORS
        to_state, whole = gl.load(of_chunk + TO_STATE * CHUNK + t), gl.load(of_chunk + 3 * CHUNK)
    else:
        count = gl.minimum(stop - at, CHUNK)
        to_state, whole = head_to_state(t, count, g_head, REVERSE), gl.exp2(count.to(gl.float32) * g_head)
    mbarrier.wait(arrived.index(0), 0)
    weighted = weighted_values(c_tiles.index(0), to_state, scale, of_c, operand, REVERSE)
    if PER_TOKEN:
        of_chunk = factors_ptr + chunk_at(1, begin, chunks, CHUNK, REVERSE).to(gl.int64) * FACTORS
        to_state = gl.load(of_chunk + TO_STATE * CHUNK + t)
    for step in range(chunks):
        mbarrier.wait(taken.index(step % SLOTS), (step // SLOTS & 1) ^ 1)
        state_tiles.index(step % SLOTS).store(rounded(state, dtype))
        if AGREES:
            # Read back, and not kept: it would not fit into the registers beside the state.
            high = state_tiles.index(step % SLOTS).load(of_state)
            rest_tiles.index(step % SLOTS).store(rounded(state - high.to(gl.float32), dtype))
        state = warpgroup_mma(weighted, b_tiles.index(step % STAGES), state * whole, is_async=True)
        fence_async_shared()
        mbarrier.arrive(posted.index(step % SLOTS), count=1)
        # What the next chunk adds, while this one's product is on its way.
        ahead = chunk_at(step + 1, begin, chunks, CHUNK, REVERSE)
        if PER_TOKEN:
            whole = gl.load(factors_ptr + ahead.to(gl.int64) * FACTORS + 3 * CHUNK)
        else:
            count = gl.minimum(stop - ahead, CHUNK)
            whole = gl.exp2(count.to(gl.float32) * g_head)
            if not REVERSE:
                if count < CHUNK:
                    to_state = head_to_state(t, count, g_head, REVERSE)
        coming = (step + 1) % STAGES
        mbarrier.wait(arrived.index(coming), ((step + 1) // STAGES) & 1, pred=step + 1 < chunks)
        weighted_ahead = weighted_values(c_tiles.index(coming), to_state, scale, of_c, operand, REVERSE)
        if PER_TOKEN:
            of_chunk = factors_ptr + chunk_at(step + 2, begin, chunks, CHUNK, REVERSE).to(gl.int64) * FACTORS
            to_state = gl.load(of_chunk + TO_STATE * CHUNK + t)
        state = warpgroup_mma_wait(0, deps=[state])
        weighted = weighted_ahead
        if AUDIT:
            at = chunk_at(step, begin, chunks, CHUNK, REVERSE)
            # The offsets are worked out anew in a way that no compiler knows: it would keep them, and spill.
            apart = column + gl.minimum(step, 0)
            store_mark(
                marks_ptr, state, at, length, span, apart, of_state, DK, DV, CHUNK, REVERSE, TRANSPOSED,
            )  # fmt: skip
    if STORE_END:
        if store_end:
            store_state(end_ptr, state, column + gl.minimum(begin, 0), of_state, DK, DV, TRANSPOSED)
