"""The states before each piece of packed sequences, and the gradients of those after each piece.

As for the segments of one sequence (:mod:`..segments`): a pass takes every piece's own contribution, a scan over the
pieces of each sequence combines them.
"""

# What @triton.jit makes of a function and of its launch is beyond a type checker.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...tuning.space import next_power_of_2
from .. import launch
from ..body import state_offsets
from ..decay import to_log2
from ..segments import contribution
from .pieces import Pieces, piece_at


@triton.jit(do_not_specialize=["b_h", "b_t", "c_h", "c_t", "g_h", "g_t", "scale", "heads", "b_group", "c_group"])
def contributions_kernel(
    b_ptr,  # [*, N, DK]
    c_ptr,  # [*, N, DV]
    g_ptr,
    table_ptr,
    firsts_ptr,
    states_ptr,  # [pieces, H, DK, DV] fp32: contributions
    totals_ptr,  # [pieces, H] fp32: log2-decay over each piece
    b_h,
    b_t,
    c_h,
    c_t,
    g_h,
    g_t,
    scale,
    heads,
    b_group,
    c_group,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    CHUNK: tl.constexpr,
    UNIT: tl.constexpr,
    REVERSE: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per (piece, head, block of columns); nothing for the last piece of a sequence in this direction.

    Strides in units of UNIT elements.
    """
    blocks: tl.constexpr = (DV + BV - 1) // BV
    pid = tl.program_id(0)
    block = pid % blocks
    h = pid // blocks % heads
    piece = pid // blocks // heads
    _, begin, size, is_first, is_last = piece_at(table_ptr, firsts_ptr, piece)
    outermost = is_first if REVERSE else is_last
    if (size > 0) & (outermost == 0):
        row = h.to(tl.int64)
        g_at = g_ptr + row * g_h + begin * g_t
        g_head = 0.0 if PER_TOKEN else to_log2(tl.load(g_at))
        state, total = contribution(
            b_ptr + (row // b_group * b_h + begin * b_t) * UNIT, c_ptr + (row // c_group * c_h + begin * c_t) * UNIT,
            g_at, 0, 0, 0, b_t * UNIT, c_t * UNIT, g_t, g_head, scale, size - size, size, block,
            tl.full((), REVERSE, tl.int1), DK, DV, BK, BV, CHUNK, PER_TOKEN, False, PRECISION, False,
        )  # fmt: skip
        at_state, in_state = state_offsets(block, DK, DV, False, BK, BV)
        slot = (piece * heads + h).to(tl.int64)
        tl.store(states_ptr + slot * (DK * DV) + at_state, state, mask=in_state)
        if block == 0:
            tl.store(totals_ptr + slot, total)


@triton.jit(do_not_specialize=["heads"])
def scan_kernel(
    firsts_ptr,
    states_ptr,  # [pieces, H, DK, DV] fp32: contributions in; states before pieces out, or their gradients after them
    totals_ptr,  # [pieces, H] fp32
    outer_ptr,  # [S, H, DK, DV]: the state before each sequence, or the gradient of the one after it, if HAS_OUTER
    empty_ptr,  # [S, H, DK, DV]: the state on the other side of sequences without tokens, if STORE_EMPTY
    heads,
    DKV: tl.constexpr,
    TILE: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_OUTER: tl.constexpr,
    STORE_EMPTY: tl.constexpr,
):
    """One program per (sequence, head, tile of the state): ``S <- exp(total) S + contribution`` over the pieces."""
    tiles: tl.constexpr = (DKV + TILE - 1) // TILE
    pid = tl.program_id(0)
    row = pid // tiles
    h = row % heads
    sequence = row // heads
    e = pid % tiles * TILE + tl.arange(0, TILE)
    inside = e < DKV
    row_at = row.to(tl.int64) * DKV + e
    if HAS_OUTER:
        state = tl.load(outer_ptr + row_at, mask=inside, other=0.0).to(tl.float32)
    else:
        state = tl.zeros([TILE], tl.float32)
    first = tl.load(firsts_ptr + sequence)
    count = tl.load(firsts_ptr + sequence + 1) - first
    if STORE_EMPTY:
        tl.store(empty_ptr + row_at, state, mask=inside & (count == 0))
    for step in range(count):
        piece = first + (count - 1 - step if REVERSE else step)
        slot = (piece * heads + h).to(tl.int64)
        more = step + 1 < count
        own = tl.load(states_ptr + slot * DKV + e, mask=inside & more, other=0.0)
        total = tl.load(totals_ptr + slot, mask=more, other=0.0)
        tl.store(states_ptr + slot * DKV + e, state, mask=inside)
        state = state * tl.exp2(total) + own


def piece_states(
    b: Tensor,
    c: Tensor,
    log_decay: Tensor,
    scale: float,
    pieces: Pieces,
    heads: int,
    outer: Tensor | None,
    empty: Tensor | None,
    *,
    reverse: bool,
) -> Tensor:
    """Forwards the states before each piece, backwards the gradients of those after it; ``[pieces,H,Dk,Dv]`` fp32.

    Args:
        b, c: k and v forwards, q and the output's gradient backwards; ``[1,*,N,D]`` with last stride 1.
        log_decay, scale: the output's factor belongs to the gradient of the state.
        pieces: the list of work.
        heads: H.
        outer: states before the sequences, or gradients of those after them, ``[S,H,Dk,Dv]``; zero if not given.
        empty: ``[S,H,Dk,Dv]`` fp32, where sequences without tokens are to leave what is in ``outer``.
        reverse: backwards.
    """
    dk, dv = b.shape[3], c.shape[3]
    tiles = launch.portable(dk, dv, b.dtype)
    fp32 = {"dtype": torch.float32, "device": b.device}
    states = torch.empty(pieces.count, heads, dk, dv, **fp32)
    totals = torch.empty(pieces.count, heads, **fp32)
    unit = launch.unit(b, c)
    contributions_kernel[(pieces.count * heads * launch.blocks(dv, tiles.bv),)](
        b, c, log_decay, pieces.table, pieces.firsts, states, totals,
        *launch.strides(b, unit)[1:], *launch.strides(c, unit)[1:], *launch.decay_strides(log_decay)[1:],
        float(scale), heads, heads // b.shape[1], heads // c.shape[1],
        DK=dk, DV=dv, BK=tiles.bk, BV=tiles.bv, CHUNK=tiles.chunk, UNIT=unit, REVERSE=reverse,
        PER_TOKEN=log_decay.dim() == 3, PRECISION=launch.precision(b.dtype, b.device),
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    tile = min(1024, next_power_of_2(dk * dv))
    scan_kernel[(pieces.sequences * heads * launch.blocks(dk * dv, tile),)](
        pieces.firsts, states, totals, states if outer is None else outer, states if empty is None else empty, heads,
        DKV=dk * dv, TILE=tile, REVERSE=reverse, HAS_OUTER=outer is not None, STORE_EMPTY=empty is not None,
        num_warps=4,
    )  # fmt: skip
    return states
