"""What both halves of Hopper's body need of a chunk: where it is, how its tiles arrive, and layouts of products."""

# What @gluon.jit makes of a function and of its launch is beyond a type checker.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from ..decay import MIN_LOG2

# Triton 3.8 has these names beside the older ones, 3.9 has no others.
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.constexpr_function
def accumulator(columns):
    """The layout of a product with ``columns`` columns, its rows spread over the four warps of a half."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.constexpr_function
def rows_agree(audit, per_token):
    """Whether row sums agree with each other to fp32's precision, as those of one decay for all tokens have to."""
    return audit and not per_token


@gluon.jit
def log2_of(g):
    """Natural to base-2 logarithm, clamped to [-160, inf); NaN stays NaN."""
    g = g * 1.4426950408889634
    return gl.where(g < MIN_LOG2, MIN_LOG2, g)


@gluon.jit
def chunk_at(step, begin, chunks, CHUNK: gl.constexpr, REVERSE: gl.constexpr):
    """Where a step's chunk begins; past the last step, the last one's."""
    step = gl.minimum(step, chunks - 1)
    return begin + (chunks - 1 - step if REVERSE else step) * CHUNK


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
    AUDIT: gl.constexpr,
):
    """Starts the copies of one chunk's tiles, if ``wanted``."""
    size: gl.constexpr = 2 * a_tiles.shape[1] * (2 * a_tiles.shape[2] + (2 if AUDIT else 1) * c_tiles.shape[2])
    barrier = arrived.index(slot)
    mbarrier.expect(barrier, size, pred=wanted)
    async_load(a_source, [batch, a_head, at, 0], barrier, a_tiles.index(slot), pred=wanted)
    async_load(b_source, [batch, b_head, at, 0], barrier, b_tiles.index(slot), pred=wanted)
    async_load(c_source, [batch, c_head, at, column], barrier, c_tiles.index(slot), pred=wanted)
    if AUDIT:
        async_load(x_source, [batch, x_head, at, column], barrier, x_tiles.index(slot), pred=wanted)
