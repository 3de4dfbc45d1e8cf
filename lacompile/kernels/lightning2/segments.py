"""Few heads: the sequence is cut into segments that run in parallel, each from the state at its start.

A pre-pass takes each segment's own contribution to the state, a scan over the segments combines them. Both exist for
the state (forwards, from k and v) and for its gradient (backwards, from q and do).
"""

# What @triton.jit makes of a function and of its launch is beyond a type checker.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .body import state_offsets
from .decay import chunk_sums, to_log2
from .tiles import of_head, read

# Fixed decay: what is older than this many halvings is below the rounding of the fp32 state and is not read.
HALVINGS = tl.constexpr(40.0)


@triton.jit
def contribution(
    b_source,
    c_source,
    g_ptr,
    batch,
    b_head,
    c_head,
    b_stride,
    c_stride,
    g_stride,
    g_head,
    scale,
    begin,
    stop,
    block,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    CHUNK: tl.constexpr,
    REVERSE: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(``[BK, BV]`` sum of decayed ``scale b c`` over tokens ``[begin, stop)``, the decay over all of them in log2).

    Forwards each token decays to the segment's end, backwards to its start.
    """
    total = tl.full((), 0.0, tl.float32)
    if not PER_TOKEN:
        total = (stop - begin).to(tl.float32) * g_head
        # The oldest tokens that still count: the same for every program of a head, and known before the loop.
        horizon = tl.minimum(1.0 / tl.maximum(-g_head, 1e-9) * HALVINGS, (stop - begin).to(tl.float32))
        reach = (tl.cdiv(horizon.to(tl.int32), CHUNK) + 1) * CHUNK
        if REVERSE:
            stop = tl.minimum(stop, begin + reach)
        else:
            begin = tl.maximum(begin, begin + ((stop - begin - reach) // CHUNK) * CHUNK)
    state = tl.zeros([BK, BV], tl.float32)
    chunks = tl.cdiv(stop - begin, CHUNK)
    for step in range(chunks):
        at = begin + (chunks - 1 - step if REVERSE else step) * CHUNK
        b = tl.trans(read(b_source, batch, b_head, b_stride, at, stop, 0, CHUNK, BK, DK, TMA))
        c = read(c_source, batch, c_head, c_stride, at, stop, block * BV, CHUNK, BV, DV, TMA)
        sums, last = chunk_sums(g_ptr, g_stride, at, stop, g_head, CHUNK, PER_TOKEN)
        to_state = tl.exp2(sums if REVERSE else last - sums) * scale
        weighted = (c.to(tl.float32) * to_state[:, None]).to(c.dtype)
        state = tl.dot(b, weighted, state * tl.exp2(last), input_precision=PRECISION)
        if PER_TOKEN:
            total += last
    return state, total


@triton.jit(
    do_not_specialize=[
        "b_b", "b_h", "b_t", "c_b", "c_h", "c_t", "g_b", "g_h", "g_t",
        "scale", "heads", "b_group", "c_group", "length", "segment", "segments",
    ]
)  # fmt: skip
def contributions_kernel(
    b_source,
    c_source,
    g_ptr,
    states_ptr,  # [rows, segments + 1, DK, DV] fp32: each segment's contribution, in the slot it leads to
    totals_ptr,  # [rows, segments] fp32: log2-decay over each segment
    b_b,
    b_h,
    b_t,
    c_b,
    c_h,
    c_t,
    g_b,
    g_h,
    g_t,
    scale,
    heads,
    b_group,
    c_group,
    length,
    segment,
    segments,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    CHUNK: tl.constexpr,
    UNIT: tl.constexpr,
    REVERSE: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per (batch and head, segment but the last in this direction of time, block of columns).

    b ``[B,*,N,DK]`` and c ``[B,*,N,DV]`` are k and v forwards, q and do backwards. Segment s leads to slot s + 1
    forwards and to slot s backwards.
    """
    blocks: tl.constexpr = (DV + BV - 1) // BV
    pid = tl.program_id(0)
    block = pid % blocks
    part = (pid // blocks) % (segments - 1) + (1 if REVERSE else 0)
    row = (pid // blocks) // (segments - 1)
    b = row // heads
    h = row % heads
    row = row.to(tl.int64)
    g_at = g_ptr + b.to(tl.int64) * g_b + h.to(tl.int64) * g_h
    g_head = 0.0 if PER_TOKEN else to_log2(tl.load(g_at))
    begin = part * segment
    state, total = contribution(
        of_head(b_source, b, h // b_group, b_b, b_h, UNIT, TMA),
        of_head(c_source, b, h // c_group, c_b, c_h, UNIT, TMA), g_at, b, h // b_group, h // c_group,
        b_t * UNIT, c_t * UNIT, g_t, g_head, scale, begin, tl.minimum(begin + segment, length), block,
        DK, DV, BK, BV, CHUNK, REVERSE, PER_TOKEN, TMA, PRECISION,
    )  # fmt: skip
    at_state, in_state = state_offsets(block, DK, DV, False, BK, BV)
    slot = row * (segments + 1) + (part if REVERSE else part + 1)
    tl.store(states_ptr + slot * (DK * DV) + at_state, state, mask=in_state)
    if block == 0:
        tl.store(totals_ptr + row * segments + part, total)


@triton.jit(do_not_specialize=["segments"])
def scan_kernel(
    states_ptr,  # [rows, segments + 1, DK, DV] fp32: contributions in, states out
    totals_ptr,  # [rows, segments] fp32
    first_ptr,  # [rows, DK, DV] state to begin with, if HAS_FIRST
    segments,
    DKV: tl.constexpr,
    TILE: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_FIRST: tl.constexpr,
):
    """One program per (batch and head, tile of the state): ``S <- exp(total) S + contribution`` over the segments."""
    tiles: tl.constexpr = (DKV + TILE - 1) // TILE
    pid = tl.program_id(0)
    row = (pid // tiles).to(tl.int64)
    e = pid % tiles * TILE + tl.arange(0, TILE)
    inside = e < DKV
    if HAS_FIRST:
        state = tl.load(first_ptr + row * DKV + e, mask=inside, other=0.0).to(tl.float32)
    else:
        state = tl.zeros([TILE], tl.float32)
    slot = row * (segments + 1) + (segments if REVERSE else 0)
    tl.store(states_ptr + slot * DKV + e, state, mask=inside)
    for step in range(segments - 1):
        part = segments - 1 - step if REVERSE else step
        slot = row * (segments + 1) + (part if REVERSE else part + 1)
        at = states_ptr + slot * DKV + e
        total = tl.load(totals_ptr + row * segments + part)
        state = state * tl.exp2(total) + tl.load(at, mask=inside, other=0.0)
        tl.store(at, state, mask=inside)


def segment_states(
    b: Tensor,
    c: Tensor,
    log_decay: Tensor,
    scale: float,
    first: Tensor | None,
    split: launch.Segments,
    reverse: bool,
) -> Tensor:
    """States at the borders of the segments, ``[B,H,segments + 1,Dk,Dv]`` fp32.

    Forwards (b, c) = (k, v), ``first`` is the state before token 0 and the last slot is left unset; backwards they
    are (q, do) and the gradient of the state after the last token, and slot 0 is left unset.
    """
    heads = log_decay.shape[0 if log_decay.dim() == 1 else 1]
    batch, _, length, dk = b.shape
    dv = c.shape[3]
    cfg = launch.config(dk, dv, b.dtype)
    unit, tma = launch.unit(b, c), launch.use_tma(b, c)
    fp32 = {"dtype": torch.float32, "device": b.device}
    states = torch.empty(batch, heads, split.count + 1, dk, dv, **fp32)
    totals = torch.empty(batch * heads, split.count, **fp32)
    grid = (batch * heads * (split.count - 1) * launch.blocks(dv, cfg.bv),)
    contributions_kernel[grid](
        launch.source(b, tma, cfg.chunk, cfg.bk), launch.source(c, tma, cfg.chunk, cfg.bv), log_decay, states, totals,
        *launch.strides(b, unit), *launch.strides(c, unit), *launch.decay_strides(log_decay), float(scale), heads,
        heads // b.shape[1], heads // c.shape[1], length, split.tokens, split.count,
        DK=dk, DV=dv, BK=cfg.bk, BV=cfg.bv, CHUNK=cfg.chunk, UNIT=unit, REVERSE=reverse,
        PER_TOKEN=log_decay.dim() == 3, TMA=tma, PRECISION=launch.precision(b.dtype),
        num_warps=cfg.warps, num_stages=cfg.stages,
    )  # fmt: skip
    tile = min(1024, launch.next_power_of_2(dk * dv))
    scan_kernel[(batch * heads * launch.blocks(dk * dv, tile),)](
        states, totals, states if first is None else first, split.count,
        DKV=dk * dv, TILE=tile, REVERSE=reverse, HAS_FIRST=first is not None, num_warps=4,
    )  # fmt: skip
    return states
