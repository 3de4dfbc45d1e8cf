"""Hopper's body for 16-bit tensors: two groups of warps, each with half of the work.

One carries the state (state.py), the other makes the outputs (outputs.py). The first runs ahead by as many chunks as
there are slots for a posted state, so that neither waits for the latency of the other's products. Tiles arrive by
tensor descriptor, up to STAGES chunks ahead. Signals, all of them barriers in shared memory:

- ``arrived[stage]``: a chunk's tiles are there.
- ``posted[slot]``: the state before a chunk is there, and everything before that chunk is in it, so that the tiles of
  the chunk before may be replaced once its outputs are made.
- ``taken[slot]``: a posted state has been used.
"""

# What @gluon.jit makes of a function and of its launch is beyond a type checker.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .outputs import make_outputs
from .state import carry_state
from .tiles import chunk_at, fetch, rows_agree


@gluon.jit
def attend_in_groups(
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
    REVERSE: gl.constexpr,
    PER_TOKEN: gl.constexpr,
    HAS_START: gl.constexpr,
    STORE_END: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    AUDIT: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """What body.attend computes, from the same arguments."""
    dtype: gl.constexpr = a_source.dtype
    shared: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    SLOTS: gl.constexpr = 2 if BV == 64 else 1  # what there is room for
    a_tiles = gl.allocate_shared_memory(dtype, [STAGES, CHUNK, BK], shared)
    b_tiles = gl.allocate_shared_memory(dtype, [STAGES, CHUNK, BK], shared)
    c_tiles = gl.allocate_shared_memory(dtype, [STAGES, CHUNK, BV], shared)
    x_tiles = c_tiles
    if AUDIT:
        x_tiles = gl.allocate_shared_memory(dtype, [STAGES, CHUNK, BV], shared)
    state_tiles = gl.allocate_shared_memory(dtype, [SLOTS, BV, BK], shared)
    rest_tiles = state_tiles
    if rows_agree(AUDIT, PER_TOKEN):
        rest_tiles = gl.allocate_shared_memory(dtype, [SLOTS, BV, BK], shared)
    y_tiles = gl.allocate_shared_memory(dtype, [SLOTS, CHUNK, BV], shared)
    arrived = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    posted = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(arrived.index(s), count=1)
    for s in gl.static_range(SLOTS):
        mbarrier.init(posted.index(s), count=1)
        mbarrier.init(taken.index(s), count=1)
    fence_async_shared()

    column = block * BV
    chunks = gl.cdiv(stop - begin, CHUNK)
    # A loop, so that its code is short: until the first tile is asked for, nothing hides what it takes to be read.
    for s in range(gl.minimum(chunks, STAGES)):
        fetch(
            a_source, b_source, c_source, x_source, a_tiles, b_tiles, c_tiles, x_tiles, arrived, s,
            batch, a_head, b_head, c_head, x_head, chunk_at(s, begin, chunks, CHUNK, REVERSE), column, True, AUDIT,
        )  # fmt: skip
    gl.warp_specialize(
        [
            (make_outputs, (
                a_source, b_source, c_source, x_source, y_target, a_tiles, b_tiles, c_tiles, x_tiles, y_tiles,
                state_tiles, rest_tiles, arrived, posted, taken, factors_ptr, rows_ptr, batch, a_head, b_head, c_head,
                x_head, y_head, g_head, scale, begin, stop, column, REVERSE, PER_TOKEN, AUDIT,
            )),
            (carry_state, (
                b_tiles, c_tiles, state_tiles, rest_tiles, arrived, posted, taken, factors_ptr, marks_ptr, start_ptr,
                end_ptr, g_head, scale, begin, stop, length, span, store_end, column, DK, DV, REVERSE, PER_TOKEN,
                HAS_START, STORE_END, TRANSPOSED, AUDIT,
            )),
        ],
        [4],
        [REGISTERS],
    )  # fmt: skip
