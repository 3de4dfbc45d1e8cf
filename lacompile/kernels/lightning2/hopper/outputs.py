"""Half of Hopper's body: the warps that make the outputs, and ask for tiles.

A chunk's outputs need its tiles and the state before it, which the other half (state.py) posts: no chunk waits for the
outputs of another. The scores are the first operand of their product straight from registers.
"""

# What @gluon.jit makes of a function and of its launch is beyond a type checker.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..factors import FACTORS
from .digits import rounded
from .tiles import accumulator, async_store, chunk_at, fetch, rows_agree


@gluon.jit
def weight_of(gap, inside, scale, REVERSE: gl.constexpr):
    """Decays between the tokens of one chunk, times the scale, given their log2 forwards in time."""
    return gl.exp2(gl.where(inside, -gap if REVERSE else gap, float("-inf"))) * scale


@gluon.jit
def rounding(x, weight, dtype: gl.constexpr):
    """What rounding to 16 bits adds to x times weight, as where the state takes that up."""
    weighted = x * weight
    return rounded(weighted, dtype).to(gl.float32) - weighted


@gluon.jit
def make_outputs(
    a_source,
    b_source,
    c_source,
    x_source,
    y_target,
    a_tiles,
    b_tiles,
    c_tiles,
    x_tiles,
    y_tiles,
    state_tiles,
    rest_tiles,
    arrived,
    posted,
    taken,
    factors_ptr,
    rows_ptr,
    batch,
    a_head,
    b_head,
    c_head,
    x_head,
    y_head,
    g_head,
    scale,
    begin,
    stop,
    column,
    REVERSE: gl.constexpr,
    PER_TOKEN: gl.constexpr,
    AUDIT: gl.constexpr,
):
    """Four warps that make the outputs of each chunk, from its tiles and the state before it."""
    STAGES: gl.constexpr = b_tiles.shape[0]
    SLOTS: gl.constexpr = state_tiles.shape[0]
    AGREES: gl.constexpr = rows_agree(AUDIT, PER_TOKEN)
    CHUNK: gl.constexpr = b_tiles.shape[1]
    BV: gl.constexpr = c_tiles.shape[2]
    FROM_STATE: gl.constexpr = 2 if REVERSE else 1
    dtype: gl.constexpr = b_tiles.dtype
    of_y: gl.constexpr = accumulator(BV)
    of_scores: gl.constexpr = accumulator(CHUNK)
    operand: gl.constexpr = gl.DotOperandLayout(0, of_y, 2)
    row = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, of_scores))[:, None]
    col = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, of_scores))[None, :]
    t = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, of_y))[:, None]
    inside = row <= col if REVERSE else row >= col
    chunks = gl.cdiv(stop - begin, CHUNK)
    if PER_TOKEN:
        of_chunk = factors_ptr + chunk_at(0, begin, chunks, CHUNK, REVERSE).to(gl.int64) * FACTORS
        sums_at_row, sums_at_col = gl.load(of_chunk + row), gl.load(of_chunk + col)
        from_state_ahead = gl.load(of_chunk + FROM_STATE * CHUNK + t)
    else:
        weight = weight_of((row - col).to(gl.float32) * g_head, inside, scale, REVERSE)
    for step in range(chunks):
        slot = step % STAGES
        at = chunk_at(step, begin, chunks, CHUNK, REVERSE)
        mbarrier.wait(arrived.index(slot), (step // STAGES) & 1)
        scores = gl.zeros([CHUNK, CHUNK], gl.float32, layout=of_scores)
        b_turned = b_tiles.index(slot).permute([1, 0])
        scores = warpgroup_mma(a_tiles.index(slot), b_turned, scores, use_acc=False, is_async=True)
        if PER_TOKEN:
            weight = weight_of(sums_at_row - sums_at_col, inside, scale, REVERSE)
            of_chunk = factors_ptr + chunk_at(step + 1, begin, chunks, CHUNK, REVERSE).to(gl.int64) * FACTORS
            sums_at_row, sums_at_col = gl.load(of_chunk + row), gl.load(of_chunk + col)
            from_state = from_state_ahead
            from_state_ahead = gl.load(of_chunk + FROM_STATE * CHUNK + t)
        elif REVERSE:
            from_state = gl.exp2(gl.maximum(gl.minimum(stop - at, CHUNK) - 1 - t, 0).to(gl.float32) * g_head)
        else:
            from_state = gl.exp2((t + 1).to(gl.float32) * g_head)
        if not REVERSE:
            from_state *= scale
        # This also says that nobody needs the tiles of the chunk before any more.
        mbarrier.wait(posted.index(step % SLOTS), step // SLOTS & 1)
        y = gl.zeros([CHUNK, BV], gl.float32, layout=of_y)
        given = state_tiles.index(step % SLOTS).permute([1, 0])
        y = warpgroup_mma(a_tiles.index(slot), given, y, use_acc=False, is_async=True)
        if AGREES:
            rest = rest_tiles.index(step % SLOTS).permute([1, 0])
            y = warpgroup_mma(a_tiles.index(slot), rest, y, is_async=True)
        refilled = step - 1 + STAGES
        fetch(
            a_source, b_source, c_source, x_source, a_tiles, b_tiles, c_tiles, x_tiles, arrived, refilled % STAGES,
            batch, a_head, b_head, c_head, x_head, chunk_at(refilled, begin, chunks, CHUNK, REVERSE), column,
            (step > 0) & (refilled < chunks), AUDIT,
        )  # fmt: skip
        scores = warpgroup_mma_wait(2 if AGREES else 1, deps=[scores])
        weighted = gl.convert_layout((scores * weight).to(dtype), operand)
        y = warpgroup_mma_wait(0, deps=[y])
        mbarrier.arrive(taken.index(step % SLOTS), count=1)
        row_sums = gl.zeros([CHUNK], gl.float32, layout=gl.SliceLayout(1, of_y))
        if AGREES:
            x = x_tiles.index(slot).load(of_y).to(gl.float32)
            row_sums = gl.sum(rounding(x, from_state, dtype) * y, 1)
        y = warpgroup_mma(weighted, c_tiles.index(slot), y * from_state, is_async=True)
        y = warpgroup_mma_wait(0, deps=[y])
        tma.store_wait(SLOTS - 1)
        y_tile = y_tiles.index(step % SLOTS)
        y_tile.store(y.to(dtype))
        # Between the stores and the first barrier after them: what the copy engine reads must be fenced before that.
        fence_async_shared()
        if AUDIT:
            x = x_tiles.index(slot).load(of_y).to(gl.float32)
            row_sums += gl.sum(x * y, 1)
            gl.store(rows_ptr + at.to(gl.int64) + t, row_sums[:, None], mask=t < stop - at)
        async_store(y_target, [batch, y_head, at, column], y_tile)
    tma.store_wait(0)
