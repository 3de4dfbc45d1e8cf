"""Few heads: the sequence is cut into segments that run in parallel, each from the state at its start.

A pre-pass takes the contributions to the state of pieces of segments, a scan over the pieces combines them. Both exist
for the state (forwards, from k and v) and for its gradient (backwards, from q and do).

With a fixed decay what lies far enough behind a segment's border is below rounding there, and is not read at all. How
far that is (:func:`reach`) follows from the decay alone: no kernel waits for another to know it, nor the host for any.
"""

# What @triton.jit makes of a function and of its launch is beyond a type checker.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning.space import next_power_of_2
from . import launch
from .body import state_offsets
from .calls import Box, Launch
from .decay import chunk_sums, to_log2
from .tiles import of_head, read

# Fixed decay: what is older than this many halvings is below the rounding of the fp32 state and is not read.
HALVINGS = tl.constexpr(40.0)


@triton.jit
def reach(g_head, CHUNK: tl.constexpr):
    """How many tokens before a border still count there, given a log2-decay: a multiple of CHUNK."""
    horizon = tl.minimum(1.0 / tl.maximum(-g_head, 1e-7) * HALVINGS, 1e9)
    return (tl.cdiv(horizon.to(tl.int32), CHUNK) + 1) * CHUNK


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


@triton.jit
def piece_of(begin, stop, piece, index, g_head, CHUNK: tl.constexpr, REVERSE: tl.constexpr, PER_TOKEN: tl.constexpr):
    """(first token, end) of a segment's piece: nothing of it where all of it is out of reach of the border.

    The border is the segment's end forwards and its start backwards.
    """
    first = begin + index * piece
    end = tl.minimum(first + piece, stop)
    if not PER_TOKEN:
        far = reach(g_head, CHUNK)
        if (first - begin >= far) if REVERSE else (stop - end >= far):
            end = first
    return first, tl.maximum(end, first)


@triton.jit(
    do_not_specialize=[
        "b_b", "b_h", "b_t", "c_b", "c_h", "c_t", "g_b", "g_h", "g_t",
        "scale", "heads", "b_group", "c_group", "length", "segment", "segments", "piece",
    ]
)  # fmt: skip
def contributions_kernel(
    b_source,
    c_source,
    g_ptr,
    states_ptr,  # [rows, segments, PIECES, DK, DV] fp32: contributions; nothing where a piece is out of reach
    totals_ptr,  # [rows, segments, PIECES] fp32: log2-decay over each piece, if PER_TOKEN
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
    piece,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    CHUNK: tl.constexpr,
    UNIT: tl.constexpr,
    PIECES: tl.constexpr,
    REVERSE: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per (batch and head, segment but the last in this direction of time, piece, block of columns).

    b ``[B,*,N,DK]`` and c ``[B,*,N,DV]`` are k and v forwards, q and do backwards.
    """
    blocks: tl.constexpr = (DV + BV - 1) // BV
    pid = tl.program_id(0)
    block = pid % blocks
    index = (pid // blocks) % PIECES
    part = (pid // (blocks * PIECES)) % (segments - 1) + (1 if REVERSE else 0)
    row = pid // (blocks * PIECES) // (segments - 1)
    b = row // heads
    h = row % heads
    row = row.to(tl.int64)
    g_at = g_ptr + b.to(tl.int64) * g_b + h.to(tl.int64) * g_h
    g_head = 0.0 if PER_TOKEN else to_log2(tl.load(g_at))
    start = part * segment
    first, end = piece_of(start, tl.minimum(start + segment, length), piece, index, g_head, CHUNK, REVERSE, PER_TOKEN)
    slot = (row * segments + part) * PIECES + index
    if end > first:
        state, total = contribution(
            of_head(b_source, b, h // b_group, b_b, b_h, UNIT, TMA),
            of_head(c_source, b, h // c_group, c_b, c_h, UNIT, TMA), g_at, b, h // b_group, h // c_group,
            b_t * UNIT, c_t * UNIT, g_t, g_head, scale, first, end, block,
            DK, DV, BK, BV, CHUNK, REVERSE, PER_TOKEN, TMA, PRECISION,
        )  # fmt: skip
        at_state, in_state = state_offsets(block, DK, DV, False, BK, BV)
        tl.store(states_ptr + slot * (DK * DV) + at_state, state, mask=in_state)
        if PER_TOKEN:
            if block == 0:
                tl.store(totals_ptr + slot, total)


@triton.jit(do_not_specialize=["heads", "g_h", "length", "segment", "segments", "piece"])
def scan_kernel(
    contributions_ptr,  # [rows, segments, PIECES, DK, DV] fp32
    totals_ptr,  # [rows, segments, PIECES] fp32, if PER_TOKEN
    g_ptr,
    first_ptr,  # [rows, DK, DV] state to begin with, if HAS_FIRST
    states_ptr,  # [rows, segments + 1, DK, DV] fp32: the states at the borders
    heads,
    g_h,
    length,
    segment,
    segments,
    piece,
    DKV: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    PIECES: tl.constexpr,
    REVERSE: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    HAS_FIRST: tl.constexpr,
):
    """One program per (batch and head, tile of the state): ``S <- exp(total) S + contribution`` over the pieces.

    Segment s leads to slot s + 1 forwards and to slot s backwards.
    """
    tiles: tl.constexpr = (DKV + TILE - 1) // TILE
    pid = tl.program_id(0)
    row = (pid // tiles).to(tl.int64)
    e = pid % tiles * TILE + tl.arange(0, TILE)
    inside = e < DKV
    g_head = 0.0 if PER_TOKEN else to_log2(tl.load(g_ptr + (pid // tiles) % heads * g_h))
    if HAS_FIRST:
        state = tl.load(first_ptr + row * DKV + e, mask=inside, other=0.0).to(tl.float32)
    else:
        state = tl.zeros([TILE], tl.float32)
    slots = states_ptr + row * (segments + 1) * DKV + e
    tl.store(slots + (segments.to(tl.int64) * DKV if REVERSE else 0), state, mask=inside)
    for step in range(segments - 1):
        part = segments - 1 - step if REVERSE else step
        start = part * segment
        stop = tl.minimum(start + segment, length)
        for n in tl.static_range(PIECES):
            index = PIECES - 1 - n if REVERSE else n
            first, end = piece_of(start, stop, piece, index, g_head, CHUNK, REVERSE, PER_TOKEN)
            slot = (row * segments + part) * PIECES + index
            if PER_TOKEN:
                total = tl.load(totals_ptr + slot, mask=end > first, other=0.0)
            else:
                whole = tl.maximum(tl.minimum(start + (index + 1) * piece, stop) - (start + index * piece), 0)
                total = whole.to(tl.float32) * g_head
            here = inside & (end > first)
            state = state * tl.exp2(total) + tl.load(contributions_ptr + slot * DKV + e, mask=here, other=0.0)
        tl.store(slots + (part if REVERSE else part + 1).to(tl.int64) * DKV, state, mask=inside)


def segment_states(
    b: Tensor,
    c: Tensor,
    log_decay: Tensor,
    scale: float,
    first: Tensor | None,
    split: launch.Segments,
    reverse: bool,
) -> Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]:
    """Makes of tensors like these the states at the borders of the segments, ``[B,H,segments + 1,Dk,Dv]`` fp32.

    Forwards (b, c) = (k, v), ``first`` is the state before token 0 and the last slot is left unset; backwards they
    are (q, do) and the gradient of the state after the last token, and slot 0 is left unset.
    """
    per_token = log_decay.dim() == 3
    heads = log_decay.shape[1 if per_token else 0]
    batch, _, length, dk = b.shape
    dv = c.shape[3]
    rows = batch * heads
    tiles = launch.prepass_config(dk, dv, b.dtype)
    unit, tma = launch.unit(b, c), launch.use_tma(b, c)
    chunk, pieces = tiles.chunk, launch.PIECES
    boxes = [Box(b, chunk, tiles.bk), Box(c, chunk, tiles.bv)] if tma else [None, None]
    contribute = Launch(
        contributions_kernel, rows * (split.count - 1) * pieces * launch.blocks(dv, tiles.bv), [*boxes, *[None] * 3],
        [*launch.strides(b, unit), *launch.strides(c, unit), *launch.decay_strides(log_decay), scale, heads,
         heads // b.shape[1], heads // c.shape[1], length, split.tokens, split.count, split.piece],
        {"DK": dk, "DV": dv, "BK": tiles.bk, "BV": tiles.bv, "CHUNK": chunk, "UNIT": unit, "PIECES": pieces,
         "REVERSE": reverse, "PER_TOKEN": per_token, "TMA": tma, "PRECISION": launch.precision(b.dtype)},
        {"num_warps": tiles.warps, "num_stages": tiles.stages},
    )  # fmt: skip
    tile = min(1024, next_power_of_2(dk * dv))
    scan = Launch(
        scan_kernel, rows * launch.blocks(dk * dv, tile), [None] * 5,
        [heads, 0 if per_token else log_decay.stride(0), length, split.tokens, split.count, split.piece],
        {"DKV": dk * dv, "TILE": tile, "CHUNK": chunk, "PIECES": pieces, "REVERSE": reverse, "PER_TOKEN": per_token,
         "HAS_FIRST": first is not None},
        {"num_warps": 4},
    )  # fmt: skip

    def states(b: Tensor, c: Tensor, log_decay: Tensor, first: Tensor | None) -> Tensor:
        fp32 = {"dtype": torch.float32, "device": b.device}
        contributions = torch.empty((rows, split.count, pieces, dk, dv), **fp32)
        totals = torch.empty((rows, split.count, pieces), **fp32)
        made = torch.empty((batch, heads, split.count + 1, dk, dv), **fp32)
        contribute(b, c, log_decay, contributions, totals)
        scan(contributions, totals, log_decay, made if first is None else first, made)
        return made

    return states
