"""Few heads: the sequence is cut into segments that run in parallel, each from the state at its start.

A pre-pass takes the contributions to the state of pieces of segments, a scan over the pieces combines them. Both exist
for the state (forwards, from k and v) and for its gradient (backwards, from q and do). The two do not depend on each
other, and a short pre-pass is mostly waiting, so that they go side by side: its programs take one direction or the
other, which is no compile-time property, since two loops in one kernel would each have shared memory of their own.

With a fixed decay what lies far enough behind a segment's border is below rounding there, and is not read at all. How
far that is (:func:`reach`) follows from the decay alone: no kernel waits for another to know it, nor the host for any.
"""

# What @triton.jit makes of a function and of its launch is beyond a type checker.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
    reverse,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    CHUNK: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    NARROW: tl.constexpr,
):
    """(``[BK, BV]`` sum of decayed ``scale b c`` over tokens ``[begin, stop)``, the decay over all of them in log2).

    Forwards each token decays to the segment's end, backwards to its start. NARROW: b is fp32 and holds numbers of
    bf16.
    """
    total = tl.full((), 0.0, tl.float32)
    if not PER_TOKEN:
        total = (stop - begin).to(tl.float32) * g_head
    state = tl.zeros([BK, BV], tl.float32)
    chunks = tl.cdiv(stop - begin, CHUNK)
    first = begin + tl.where(reverse, chunks - 1, 0) * CHUNK
    turn = tl.where(reverse, -CHUNK, CHUNK)
    for step in range(chunks):
        at = first + step * turn
        b = tl.trans(read(b_source, batch, b_head, b_stride, at, stop, 0, CHUNK, BK, DK, TMA))
        c = read(c_source, batch, c_head, c_stride, at, stop, block * BV, CHUNK, BV, DV, TMA)
        sums, _, to_end, last = chunk_sums(g_ptr, g_stride, at, stop, g_head, CHUNK, PER_TOKEN, PRECISION != "tf32")
        to_state = tl.exp2(tl.where(reverse, sums, to_end)) * scale
        state *= tl.exp2(last)
        if c.dtype.primitive_bitwidth == 16:
            # b and not c: as where row sums are made (body.py), which are to be of the same states.
            weighted_b = (b.to(tl.float32) * to_state[None, :]).to(b.dtype)
            state = tl.dot(weighted_b, c, state)
        elif NARROW:
            weighted = c * to_state[:, None]
            narrow = b.to(tl.bfloat16)
            high = weighted.to(tl.bfloat16)
            rest = weighted - high.to(tl.float32)
            middle = rest.to(tl.bfloat16)
            state = tl.dot(narrow, (rest - middle.to(tl.float32)).to(tl.bfloat16), state)
            state = tl.dot(narrow, high, tl.dot(narrow, middle, state))
        else:
            state = tl.dot(b, c * to_state[:, None], state, input_precision=PRECISION)
        if PER_TOKEN:
            total += last
    return state, total


@triton.jit
def piece_of(begin, stop, piece, index, g_head, reverse, CHUNK: tl.constexpr, PER_TOKEN: tl.constexpr):
    """(first token, end) of a segment's piece: nothing of it where all of it is out of reach of the border.

    The border is the segment's end forwards and its start backwards.
    """
    first = begin + index * piece
    end = tl.minimum(first + piece, stop)
    if not PER_TOKEN:
        if tl.where(reverse, first - begin, stop - end) >= reach(g_head, CHUNK):
            end = first
    return first, tl.maximum(end, first)


@triton.jit
def side(pid, BOTH: tl.constexpr):
    """(whether a program goes backwards, its place among those that go the same way): in turns, if there are BOTH."""
    if BOTH:
        return pid % 2 == 1, pid // 2
    else:
        return tl.full((), False, tl.int1), pid


@triton.jit(
    do_not_specialize=[
        "k_b", "k_h", "k_t", "v_b", "v_h", "v_t", "q_b", "q_h", "q_t", "do_b", "do_h", "do_t", "g_b", "g_h", "g_t",
        "scale", "heads", "k_group", "v_group", "q_group", "do_group", "length", "segment", "borders", "piece",
        "pieces",
    ]
)  # fmt: skip
def contributions_kernel(
    k_source,
    v_source,
    q_source,
    do_source,
    g_ptr,
    states_ptr,  # [rows, borders, pieces, DK, DV] fp32: contributions; nothing where a piece is out of reach
    totals_ptr,  # [rows, borders, pieces] fp32: log2-decay over each piece, if PER_TOKEN
    d_states_ptr,  # the same two for the gradients of states
    d_totals_ptr,
    k_b,
    k_h,
    k_t,
    v_b,
    v_h,
    v_t,
    q_b,
    q_h,
    q_t,
    do_b,
    do_h,
    do_t,
    g_b,
    g_h,
    g_t,
    scale,
    heads,
    k_group,
    v_group,
    q_group,
    do_group,
    length,
    segment,
    borders,
    piece,
    pieces,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    CHUNK: tl.constexpr,
    UNIT: tl.constexpr,
    BOTH: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    NARROW: tl.constexpr,
):
    """One program per (batch and head, segment but the last in its direction of time, piece, block of columns, side).

    There is a border behind each of those segments.
    ``[B,*,N,DK]`` are k and q, ``[B,*,N,DV]`` are v and do; without BOTH q and do stand for nothing.
    """
    blocks: tl.constexpr = (DV + BV - 1) // BV
    reverse, pid = side(tl.program_id(0), BOTH)
    b_source, b_b, b_h, b_t, b_group = k_source, k_b, k_h, k_t, k_group
    c_source, c_b, c_h, c_t, c_group = v_source, v_b, v_h, v_t, v_group
    if BOTH:
        if reverse:
            b_source, b_b, b_h, b_t, b_group = q_source, q_b, q_h, q_t, q_group
            c_source, c_b, c_h, c_t, c_group = do_source, do_b, do_h, do_t, do_group
            states_ptr, totals_ptr = d_states_ptr, d_totals_ptr
    block = pid % blocks
    index = (pid // blocks) % pieces
    border = pid // (blocks * pieces) % borders
    row = pid // (blocks * pieces) // borders
    b = row // heads
    h = row % heads
    row = row.to(tl.int64)
    g_at = g_ptr + b.to(tl.int64) * g_b + h.to(tl.int64) * g_h
    g_head = 0.0 if PER_TOKEN else to_log2(tl.load(g_at))
    start = (border + reverse.to(tl.int32)) * segment
    first, end = piece_of(start, tl.minimum(start + segment, length), piece, index, g_head, reverse, CHUNK, PER_TOKEN)
    slot = (row * borders + border) * pieces + index
    if end > first:
        state, total = contribution(
            of_head(b_source, b, h // b_group, b_b, b_h, UNIT, TMA),
            of_head(c_source, b, h // c_group, c_b, c_h, UNIT, TMA), g_at, b, h // b_group, h // c_group,
            b_t * UNIT, c_t * UNIT, g_t, g_head, tl.where(reverse, scale, 1.0), first, end, block, reverse,
            DK, DV, BK, BV, CHUNK, PER_TOKEN, TMA, PRECISION, NARROW,
        )  # fmt: skip
        at_state, in_state = state_offsets(block, DK, DV, False, BK, BV)
        tl.store(states_ptr + slot * (DK * DV) + at_state, state, mask=in_state)
        if PER_TOKEN:
            if block == 0:
                tl.store(totals_ptr + slot, total)


@triton.jit(do_not_specialize=["heads", "g_h", "length", "segment", "borders", "piece", "pieces"])
def scan_kernel(
    contributions_ptr,  # [rows, borders, pieces, DK, DV] fp32
    totals_ptr,  # [rows, borders, pieces] fp32, if PER_TOKEN
    d_contributions_ptr,  # the same two for the gradients of states
    d_totals_ptr,
    g_ptr,
    first_ptr,  # [rows, DK, DV] state to begin with, if HAS_FIRST
    d_last_ptr,  # [rows, DK, DV] gradient of the last state, if HAS_D_LAST
    states_ptr,  # [rows, borders + 1, DK, DV] fp32: the state before each segment
    d_states_ptr,  # the gradient of the state after each segment
    heads,
    g_h,
    length,
    segment,
    borders,
    piece,
    pieces,
    DKV: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    PIECES: tl.constexpr,
    BOTH: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    HAS_D_LAST: tl.constexpr,
):
    """One program per (batch and head, tile of the state, side): ``S <- exp(total) S + contribution`` over the pieces.

    Segment s leads to slot s + 1 forwards and to slot s - 1 backwards.
    """
    tiles: tl.constexpr = (DKV + TILE - 1) // TILE
    reverse, pid = side(tl.program_id(0), BOTH)
    row = (pid // tiles).to(tl.int64)
    e = pid % tiles * TILE + tl.arange(0, TILE)
    inside = e < DKV
    g_head = 0.0 if PER_TOKEN else to_log2(tl.load(g_ptr + (pid // tiles) % heads * g_h))
    state = tl.zeros([TILE], tl.float32)
    if HAS_FIRST:
        state = tl.load(first_ptr + row * DKV + e, mask=inside & (not reverse), other=0.0).to(tl.float32)
    if BOTH:
        if HAS_D_LAST:
            state += tl.load(d_last_ptr + row * DKV + e, mask=inside & reverse, other=0.0).to(tl.float32)
        if reverse:
            contributions_ptr, totals_ptr, states_ptr = d_contributions_ptr, d_totals_ptr, d_states_ptr
    slots = states_ptr + row * (borders + 1) * DKV + e
    tl.store(slots + tl.where(reverse, borders, 0).to(tl.int64) * DKV, state, mask=inside)
    for step in range(borders):
        part = tl.where(reverse, borders - step, step)
        start = part * segment
        stop = tl.minimum(start + segment, length)
        for n in tl.static_range(PIECES):
            index = tl.where(reverse, PIECES - 1 - n, n)
            first, end = piece_of(start, stop, piece, index, g_head, reverse, CHUNK, PER_TOKEN)
            slot = (row * borders + part - reverse.to(tl.int32)) * pieces + index
            if PER_TOKEN:
                total = tl.load(totals_ptr + slot, mask=end > first, other=0.0)
            else:
                whole = tl.maximum(tl.minimum(start + (index + 1) * piece, stop) - (start + index * piece), 0)
                total = whole.to(tl.float32) * g_head
            here = inside & (end > first)
            state = state * tl.exp2(total) + tl.load(contributions_ptr + slot * DKV + e, mask=here, other=0.0)
        tl.store(slots + tl.where(reverse, part - 1, part + 1).to(tl.int64) * DKV, state, mask=inside)


@dataclass(frozen=True)
class Backwards:
    """What the gradients of states are made of: q, the output's gradient, that of the last state, and the scale."""

    q: Tensor
    do: Tensor
    d_last: Tensor | None
    scale: float


def segment_states(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    first: Tensor | None,
    split: launch.Segments,
    precision: str,
    narrow: str,
    back: Backwards | None = None,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Makes of tensors like these the state before each segment and, of ``back``, the gradient of that after each.

    The result takes k, v, log_decay and ``first``, the state before token 0; then q, do and the gradient of the state
    after the last token. It returns ``[B,H,segments,Dk,Dv]`` fp32 twice, the same twice without ``back``.
    ``narrow`` is as in forward.py.
    """
    per_token = log_decay.dim() == 3
    heads = log_decay.shape[1 if per_token else 0]
    batch, _, length, dk = k.shape
    dv = v.shape[3]
    rows, both = batch * heads, back is not None
    sources = (k, v, k, v) if back is None else (k, v, back.q, back.do)
    tiles = launch.prepass_config(dk, dv, k.dtype)
    unit, tma = launch.unit(*sources), launch.portable_tma(launch.use_tma(*sources), k.dtype)
    chunk, borders, directions = tiles.chunk, split.count - 1, 2 if both else 1
    pieces = launch.blocks(split.tokens, split.piece)
    boxes = [Box(x, chunk, n) if tma else None for x, n in zip(sources, 2 * (tiles.bk, tiles.bv), strict=True)]
    cut = length, split.tokens, borders, split.piece, pieces
    contribute = Launch(
        contributions_kernel, directions * rows * borders * pieces * launch.blocks(dv, tiles.bv),
        [*boxes, *[None] * 5],
        [*[s for x in sources for s in launch.strides(x, unit)], *launch.decay_strides(log_decay),
         1.0 if back is None else back.scale, heads, *(heads // x.shape[1] for x in sources), *cut],
        {"DK": dk, "DV": dv, "BK": tiles.bk, "BV": tiles.bv, "CHUNK": chunk, "UNIT": unit,
         "BOTH": both, "PER_TOKEN": per_token, "TMA": tma, "PRECISION": precision,
         "NARROW": launch.saves(precision, narrow, "qk" if both else "k")},
        {"num_warps": tiles.warps, "num_stages": tiles.stages},
    )  # fmt: skip
    tile = min(1024, next_power_of_2(dk * dv))
    scan = Launch(
        scan_kernel, directions * rows * launch.blocks(dk * dv, tile), [None] * 9,
        [heads, 0 if per_token else log_decay.stride(0), *cut],
        {"DKV": dk * dv, "TILE": tile, "CHUNK": chunk, "PIECES": launch.PIECES, "BOTH": both, "PER_TOKEN": per_token,
         "HAS_FIRST": first is not None, "HAS_D_LAST": back is not None and back.d_last is not None},
        {"num_warps": 4},
    )  # fmt: skip

    def states(
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        first: Tensor | None,
        q: Tensor | None = None,
        do: Tensor | None = None,
        d_last: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        def memory(*shape: int) -> list[Tensor]:
            """One for each direction, on its own: so its alignment does not depend on the number of segments."""
            return [torch.empty(shape, dtype=torch.float32, device=k.device) for _ in range(directions)]

        contributions = memory(rows, borders, pieces, dk, dv)
        totals = memory(rows, borders, pieces) if per_token else contributions
        made = memory(batch, heads, split.count, dk, dv)
        sources = k, v, k if q is None else q, v if do is None else do
        contribute(*sources, log_decay, contributions[0], totals[0], contributions[-1], totals[-1])
        scan(
            contributions[0], totals[0], contributions[-1], totals[-1], log_decay, made[0] if first is None else first,
            made[-1] if d_last is None else d_last, made[0], made[-1],
        )  # fmt: skip
        return made[0], made[-1]

    return states
