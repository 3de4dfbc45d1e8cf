"""The body of body.py for Hopper's tensor cores, with their memory traffic laid out by hand (Gluon).

The state is kept transposed, ``[BV, BK]``, with its rows spread over the warps: so the rounded state and the values are
the first operands of products straight from registers, and neither goes through shared memory. Tiles arrive by tensor
descriptor, ``STAGES`` chunks ahead.
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

from ..decay import MIN_LOG2
from ..factors import FACTORS


@gluon.constexpr_function
def accumulator(warps_m, warps_n, columns):
    """The layout of a product with ``columns`` columns, spread over ``warps_m`` by ``warps_n`` warps."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[warps_m, warps_n], instr_shape=[16, columns, 16])


@gluon.jit
def log2_of(g):
    """Natural to base-2 logarithm, clamped to [-160, inf); NaN stays NaN."""
    g = g * 1.4426950408889634
    return gl.where(g < MIN_LOG2, MIN_LOG2, g)


@gluon.jit
def read_factors(factors_ptr, at, wanted, layout: gl.constexpr, CHUNK: gl.constexpr):
    """The rows of decay factors (see factors.py) of the chunk at token ``at``."""
    row = gl.arange(0, FACTORS, layout=gl.SliceLayout(1, layout))[:, None]
    t = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, layout))[None, :]
    return gl.load(factors_ptr + at.to(gl.int64) * FACTORS + row * CHUNK + t, mask=wanted, other=0.0)


@gluon.jit
def write_factors(tile, count, g_head, CHUNK: gl.constexpr, WARPS: gl.constexpr):
    """Writes those rows for a decay per head and ``count`` tokens."""
    line: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [1, WARPS], [1, 0])
    t = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, line))[None, :]
    sums = gl.minimum(t + 1, count).to(gl.float32) * g_head
    last = count.to(gl.float32) * g_head
    tile.slice(0, 1).store(sums)
    tile.slice(1, 1).store(gl.exp2(sums))
    tile.slice(2, 1).store(gl.exp2(last - sums))
    tile.slice(3, 1).store(gl.exp2(last + gl.zeros_like(sums)))


@gluon.jit
def fetch(
    a_source,
    b_source,
    c_source,
    x_source,
    a_tiles,
    b_tiles,
    c_tiles,
    x_tiles,
    arrived,
    slot,
    batch,
    a_head,
    b_head,
    c_head,
    x_head,
    at,
    column,
    wanted,
    BYTES: gl.constexpr,
    AUDIT: gl.constexpr,
):
    """Starts the copies of one chunk's tiles, if ``wanted``."""
    barrier = arrived.index(slot)
    mbarrier.expect(barrier, BYTES, pred=wanted)
    tma.async_copy_global_to_shared(a_source, [batch, a_head, at, 0], barrier, a_tiles.index(slot), pred=wanted)
    tma.async_copy_global_to_shared(b_source, [batch, b_head, at, 0], barrier, b_tiles.index(slot), pred=wanted)
    tma.async_copy_global_to_shared(c_source, [batch, c_head, at, column], barrier, c_tiles.index(slot), pred=wanted)
    if AUDIT:
        tma.async_copy_global_to_shared(
            x_source, [batch, x_head, at, column], barrier, x_tiles.index(slot), pred=wanted
        )


@gluon.jit
def scores_of(a_tile, b_tile, layout: gl.constexpr, CHUNK: gl.constexpr):
    """Starts ``a b'`` of one chunk."""
    scores = gl.zeros([CHUNK, CHUNK], gl.float32, layout=layout)
    return warpgroup_mma(a_tile, b_tile.permute([1, 0]), scores, use_acc=False, is_async=True)


@gluon.jit
def token_weight(factors, inside, scale, layout: gl.constexpr, REVERSE: gl.constexpr):
    """``[CHUNK, CHUNK]`` decays between the tokens of one chunk, times the scale."""
    sums = factors.slice(0, 1)
    gap = sums.permute([1, 0]).load(layout) - sums.load(layout)
    return gl.exp2(gl.where(inside, -gap if REVERSE else gap, float("-inf"))) * scale


@gluon.jit
def from_state_of(factors, scale, layout: gl.constexpr, REVERSE: gl.constexpr):
    """``[1, CHUNK]`` decays between the state and each token, and the scale where the state is what went before."""
    decays = factors.slice(2 if REVERSE else 1, 1).load(layout)
    return decays if REVERSE else decays * scale


@gluon.jit
def attend(
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
    STAGES: gl.constexpr,
    WARPS: gl.constexpr,
    REVERSE: gl.constexpr,
    PER_TOKEN: gl.constexpr,
    HAS_START: gl.constexpr,
    STORE_END: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    AUDIT: gl.constexpr,
):
    """What body.attend computes, from the same arguments; sources and target are descriptors."""
    dtype: gl.constexpr = a_source.dtype
    shared: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    of_state: gl.constexpr = accumulator(WARPS, 1, BK)
    of_y: gl.constexpr = accumulator(WARPS, 1, CHUNK)
    of_scores: gl.constexpr = accumulator(4, WARPS // 4, CHUNK * 4 // WARPS)
    operand: gl.constexpr = gl.DotOperandLayout(0, of_y, 2)
    state_operand: gl.constexpr = gl.DotOperandLayout(0, of_state, 2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    lines: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, WARPS // 4], [1, 0])
    by_column: gl.constexpr = gl.BlockedLayout([WARPS, 1], [1, 32], [1, WARPS], [1, 0])
    AHEAD: gl.constexpr = STAGES > 2

    a_tiles = gl.allocate_shared_memory(dtype, [STAGES, CHUNK, BK], shared)
    b_tiles = gl.allocate_shared_memory(dtype, [STAGES, CHUNK, BK], shared)
    c_tiles = gl.allocate_shared_memory(dtype, [STAGES, CHUNK, BV], shared)
    x_tiles = c_tiles
    if AUDIT:
        x_tiles = gl.allocate_shared_memory(dtype, [STAGES, CHUNK, BV], shared)
    f_tiles = gl.allocate_shared_memory(gl.float32, [STAGES if PER_TOKEN else 2, FACTORS, CHUNK], plain)
    scores_tiles = gl.allocate_shared_memory(dtype, [2 if AHEAD else 1, CHUNK, CHUNK], shared)
    y_tile = gl.allocate_shared_memory(dtype, [CHUNK, BV], shared)
    arrived = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(arrived.index(s), count=1)
    fence_async_shared()

    BYTES: gl.constexpr = CHUNK * (2 * BK + (2 if AUDIT else 1) * BV) * 2
    column = block * BV
    chunks = gl.cdiv(stop - begin, CHUNK)
    for s in gl.static_range(STAGES):
        fetch(
            a_source, b_source, c_source, x_source, a_tiles, b_tiles, c_tiles, x_tiles, arrived, s,
            batch, a_head, b_head, c_head, x_head, begin + (chunks - 1 - s if REVERSE else s) * CHUNK, column,
            s < chunks, BYTES, AUDIT,
        )  # fmt: skip

    k = gl.arange(0, BK, layout=gl.SliceLayout(0, of_state))[None, :]
    n = column + gl.arange(0, BV, layout=gl.SliceLayout(1, of_state))[:, None]
    at_state = n * DK + k if TRANSPOSED else k * DV + n
    in_state = (k < DK) & (n < DV)
    if HAS_START:
        state = gl.load(start_ptr + at_state, mask=in_state, other=0.0)
    else:
        state = gl.zeros([BV, BK], gl.float32, layout=of_state)

    row = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, of_scores))
    col = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, of_scores))
    inside = row[:, None] <= col[None, :] if REVERSE else row[:, None] >= col[None, :]
    if AUDIT:
        rows_tile = gl.allocate_shared_memory(gl.float32, [WARPS, CHUNK], plain)
        t = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, by_column))
    if PER_TOKEN:
        weight = gl.zeros([CHUNK, CHUNK], gl.float32, layout=of_scores)
        for s in gl.static_range(STAGES):
            first = begin + (chunks - 1 - s if REVERSE else s) * CHUNK
            f_tiles.index(s).store(read_factors(factors_ptr, first, s < chunks, lines, CHUNK))
    else:
        gap = (row[:, None] - col[None, :]).to(gl.float32) * g_head
        weight = gl.exp2(gl.where(inside, -gap if REVERSE else gap, float("-inf"))) * scale
        write_factors(f_tiles.index(0), gl.to_tensor(CHUNK), g_head, CHUNK, WARPS)
        write_factors(f_tiles.index(1), stop - begin - (chunks - 1) * CHUNK, g_head, CHUNK, WARPS)
    if AHEAD:
        mbarrier.wait(arrived.index(0), 0)
        scores = scores_of(a_tiles.index(0), b_tiles.index(0), of_scores, CHUNK)
        if PER_TOKEN:
            weight = token_weight(f_tiles.index(0), inside, scale, of_scores, REVERSE)
        scores = warpgroup_mma_wait(0, deps=[scores])
        scores_tiles.index(0).store((scores * weight).to(dtype))
        fence_async_shared()

    for step in range(chunks):
        slot = step % STAGES
        at = begin + (chunks - 1 - step if REVERSE else step) * CHUNK
        a_tile, b_tile, c_tile = a_tiles.index(slot), b_tiles.index(slot), c_tiles.index(slot)
        ahead = step + STAGES
        at_ahead = begin + (chunks - 1 - ahead if REVERSE else ahead) * CHUNK
        if PER_TOKEN:
            factors_ahead = read_factors(factors_ptr, at_ahead, ahead < chunks, lines, CHUNK)
        factors = f_tiles.index(slot if PER_TOKEN else (at + CHUNK > stop).to(gl.int32))
        from_state = from_state_of(factors, scale, of_y, REVERSE)
        to_state = factors.slice(1 if REVERSE else 2, 1).load(of_y)
        whole = factors.slice(3, 1).slice(0, 1, 1).load(of_state)
        if REVERSE:
            to_state *= scale
        if not AHEAD:
            if PER_TOKEN:
                # Before any product: among them ptxas 12.8 mixed up the first chunk's state (kernel-notes, hazards).
                weight = token_weight(factors, inside, scale, of_scores, REVERSE)
            mbarrier.wait(arrived.index(slot), (step // STAGES) & 1)
            scores = scores_of(a_tile, b_tile, of_scores, CHUNK)
        rounded = gl.convert_layout(state.to(dtype), operand)
        y = gl.zeros([BV, CHUNK], gl.float32, layout=of_y)
        y = warpgroup_mma(rounded, a_tile.permute([1, 0]), y, use_acc=False, is_async=True)
        c = c_tile.permute([1, 0]).load(of_y)
        weighted = gl.convert_layout((c.to(gl.float32) * to_state).to(dtype), state_operand)
        state = warpgroup_mma(weighted, b_tile, state * whole, is_async=True)
        if AHEAD:
            # The scores of the next chunk, which depend on no state, while this one's products are on their way.
            coming = (step + 1) % STAGES
            mbarrier.wait(arrived.index(coming), ((step + 1) // STAGES) & 1, pred=step + 1 < chunks)
            scores = scores_of(a_tiles.index(coming), b_tiles.index(coming), of_scores, CHUNK)
            if PER_TOKEN:
                weight = token_weight(f_tiles.index(coming), inside, scale, of_scores, REVERSE)
            y = warpgroup_mma_wait(2, deps=[y])
            y = y * from_state
            given = scores_tiles.index(step & 1).permute([1, 0])
            y = warpgroup_mma(gl.convert_layout(c, operand), given, y, is_async=True)
            state, scores = warpgroup_mma_wait(1, deps=[state, scores])
            scores_tiles.index((step + 1) & 1).store((scores * weight).to(dtype))
            fence_async_shared()
            y = warpgroup_mma_wait(0, deps=[y])
        else:
            scores = warpgroup_mma_wait(2, deps=[scores])
            scores_tiles.index(0).store((scores * weight).to(dtype))
            fence_async_shared()
            y = warpgroup_mma_wait(1, deps=[y])
            if PER_TOKEN:
                from_state = from_state_of(factors, scale, of_y, REVERSE)  # read anew: registers are short by now
            y = y * from_state
            y = warpgroup_mma(gl.convert_layout(c, operand), scores_tiles.index(0).permute([1, 0]), y, is_async=True)
            state = warpgroup_mma_wait(1, deps=[state])
            y = warpgroup_mma_wait(0, deps=[y])

        tma.store_wait(0)
        y_tile.permute([1, 0]).store(y.to(dtype))
        # Between the stores and the first barrier after them: what the copy engine reads must be fenced before that.
        fence_async_shared()
        if PER_TOKEN:
            f_tiles.index(slot).store(factors_ahead)
        if AUDIT:
            # Each warp sums its own rows; the barrier that publishes y publishes those sums.
            x = x_tiles.index(slot).permute([1, 0]).load(of_y)
            sums_of_x = gl.sum((x.to(gl.float32) * y).reshape([WARPS, BV // WARPS, CHUNK]), 1)
            rows_tile.store(sums_of_x)
            border = at if REVERSE else at + CHUNK
            if (border % span == 0) | (border >= length):
                mark = (gl.cdiv(border, span) - (0 if REVERSE else 1)).to(gl.int64) * (DK * DV)
                gl.store(marks_ptr + mark + at_state, state.to(marks_ptr.dtype.element_ty), mask=in_state)
        tma.async_copy_shared_to_global(y_target, [batch, y_head, at, column], y_tile)
        if AUDIT:
            gl.store(rows_ptr + at.to(gl.int64) + t, gl.sum(rows_tile.load(by_column), 0), mask=t < stop - at)
        fetch(
            a_source, b_source, c_source, x_source, a_tiles, b_tiles, c_tiles, x_tiles, arrived, slot,
            batch, a_head, b_head, c_head, x_head, at_ahead, column, ahead < chunks, BYTES, AUDIT,
        )  # fmt: skip

    tma.store_wait(0)
    for s in gl.static_range(STAGES):
        mbarrier.invalidate(arrived.index(s))
    if STORE_END:
        if store_end:
            gl.store(end_ptr + at_state, state, mask=in_state)
