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


@gluon.constexpr_function
def accumulator(warps_m, warps_n, columns):
    """The layout of a product with ``columns`` columns, spread over ``warps_m`` by ``warps_n`` warps."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[warps_m, warps_n], instr_shape=[16, columns, 16])


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def token_sums(g, CHUNK: gl.constexpr):
    """(inclusive sums ``[CHUNK]`` of log-decays in base 2, the last of them)."""
    sums = gl.associative_scan(g, 0, _add)
    return sums, gl.sum(g, 0)


@gluon.jit
def load_decays(g_ptr, g_stride, at, stop, layout: gl.constexpr, CHUNK: gl.constexpr):
    """Log-decays ``[CHUNK]`` from token ``at`` on, 0 from ``stop`` on."""
    t = at + gl.arange(0, CHUNK, layout=layout)
    return gl.load(g_ptr + t.to(gl.int64) * g_stride, mask=t < stop, other=0.0).to(gl.float32)


@gluon.jit
def log2_of(g):
    """Natural to base-2 logarithm, clamped to [-160, inf); NaN stays NaN."""
    g = g * 1.4426950408889634
    return gl.where(g < MIN_LOG2, MIN_LOG2, g)


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
def attend(
    a_source,
    b_source,
    c_source,
    y_target,
    x_source,
    rows_ptr,
    marks_ptr,
    g_ptr,
    start_ptr,
    end_ptr,
    batch,
    a_head,
    b_head,
    c_head,
    y_head,
    x_head,
    g_stride,
    g_head,
    scale,
    begin,
    stop,
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
    line: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])

    a_tiles = gl.allocate_shared_memory(dtype, [STAGES, CHUNK, BK], shared)
    b_tiles = gl.allocate_shared_memory(dtype, [STAGES, CHUNK, BK], shared)
    c_tiles = gl.allocate_shared_memory(dtype, [STAGES, CHUNK, BV], shared)
    x_tiles = c_tiles
    if AUDIT:
        x_tiles = gl.allocate_shared_memory(dtype, [STAGES, CHUNK, BV], shared)
    scores_tile = gl.allocate_shared_memory(dtype, [CHUNK, CHUNK], shared)
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
    t = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, of_y))
    if PER_TOKEN:
        first = begin + (chunks - 1 if REVERSE else 0) * CHUNK
        coming = load_decays(g_ptr, g_stride, first, stop, line, CHUNK)
    else:
        gap = (row[:, None] - col[None, :]).to(gl.float32) * g_head
        weight = gl.exp2(gl.where(inside, -gap if REVERSE else gap, float("-inf"))) * scale

    for step in range(chunks):
        slot = step % STAGES
        at = begin + (chunks - 1 - step if REVERSE else step) * CHUNK
        if PER_TOKEN:
            sums, last = token_sums(log2_of(coming), CHUNK)
            after = begin + (chunks - 2 - step if REVERSE else step + 1) * CHUNK
            coming = load_decays(g_ptr, g_stride, after, gl.where(step + 1 < chunks, stop, after), line, CHUNK)
            of_row = gl.convert_layout(sums, gl.SliceLayout(1, of_scores))
            of_col = gl.convert_layout(sums, gl.SliceLayout(0, of_scores))
            sums = gl.convert_layout(sums, gl.SliceLayout(0, of_y))
            gap = of_row[:, None] - of_col[None, :]
            weight = gl.exp2(gl.where(inside, -gap if REVERSE else gap, float("-inf"))) * scale
        else:
            count = gl.minimum(stop - at, CHUNK)
            sums = gl.minimum(t + 1, count).to(gl.float32) * g_head
            last = count.to(gl.float32) * g_head
        if REVERSE:
            from_state = gl.exp2(last - sums)
            to_state = gl.exp2(sums) * scale
        else:
            from_state = gl.exp2(sums) * scale
            to_state = gl.exp2(last - sums)

        a_tile, b_tile, c_tile = a_tiles.index(slot), b_tiles.index(slot), c_tiles.index(slot)
        mbarrier.wait(arrived.index(slot), (step // STAGES) & 1)
        scores = gl.zeros([CHUNK, CHUNK], gl.float32, layout=of_scores)
        scores = warpgroup_mma(a_tile, b_tile.permute([1, 0]), scores, use_acc=False, is_async=True)
        rounded = gl.convert_layout(state.to(dtype), operand)
        y = gl.zeros([BV, CHUNK], gl.float32, layout=of_y)
        y = warpgroup_mma(rounded, a_tile.permute([1, 0]), y, use_acc=False, is_async=True)
        c = c_tile.permute([1, 0]).load(of_y)
        weighted = gl.convert_layout((c.to(gl.float32) * to_state[None, :]).to(dtype), state_operand)
        state = warpgroup_mma(weighted, b_tile, state * gl.exp2(last), is_async=True)
        scores = warpgroup_mma_wait(2, deps=[scores])
        scores_tile.store((scores * weight).to(dtype))
        fence_async_shared()
        y = warpgroup_mma_wait(1, deps=[y])
        y = y * from_state[None, :]
        y = warpgroup_mma(gl.convert_layout(c, operand), scores_tile.permute([1, 0]), y, is_async=True)
        state = warpgroup_mma_wait(1, deps=[state])
        y = warpgroup_mma_wait(0, deps=[y])

        tma.store_wait(0)
        y_tile.permute([1, 0]).store(y.to(dtype))
        # Between the stores and the first barrier after them: what the copy engine reads must be fenced before that.
        fence_async_shared()
        if AUDIT:
            x = x_tiles.index(slot).permute([1, 0]).load(of_y)
            sums_of_x = gl.sum(x.to(gl.float32) * y, 0)
            gl.store(rows_ptr + at.to(gl.int64) + t, sums_of_x, mask=t < stop - at)
            border = at if REVERSE else at + CHUNK
            if (border % span == 0) | (border >= stop):
                mark = gl.cdiv(border, span).to(gl.int64) * (DK * DV)
                gl.store(marks_ptr + mark + at_state, state.to(marks_ptr.dtype.element_ty), mask=in_state)
        tma.async_copy_shared_to_global(y_target, [batch, y_head, at, column], y_tile)
        ahead = step + STAGES
        fetch(
            a_source, b_source, c_source, x_source, a_tiles, b_tiles, c_tiles, x_tiles, arrived, slot,
            batch, a_head, b_head, c_head, x_head, begin + (chunks - 1 - ahead if REVERSE else ahead) * CHUNK, column,
            ahead < chunks, BYTES, AUDIT,
        )  # fmt: skip

    tma.store_wait(0)
    for s in gl.static_range(STAGES):
        mbarrier.invalidate(arrived.index(s))
    if STORE_END:
        if store_end:
            gl.store(end_ptr + at_state, state, mask=in_state)
