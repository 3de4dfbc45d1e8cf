"""The forward kernel over the pieces of packed sequences (arXiv 2401.04658, algorithm 1)."""

# What @triton.jit makes of a function and of its launch is beyond a type checker.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...reference import head_count
from .. import launch
from ..body import attend
from ..decay import to_log2
from .pieces import Pieces, cut, piece_at, tokens_of_a_piece
from .states import piece_states


@triton.jit(
    do_not_specialize=[
        "q_h", "q_t", "k_h", "k_t", "v_h", "v_t", "o_h", "o_t", "g_h", "g_t", "scale", "heads",
        "q_group", "k_group", "v_group",
    ]
)  # fmt: skip
def packed_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    g_ptr,
    table_ptr,
    firsts_ptr,
    states_ptr,  # [pieces, H, DK, DV] fp32: states before the pieces
    end_ptr,  # [S, H, DK, DV] fp32, if STORE_END
    q_h,
    q_t,
    k_h,
    k_t,
    v_h,
    v_t,
    o_h,
    o_t,
    g_h,
    g_t,
    scale,
    heads,
    q_group,
    k_group,
    v_group,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    CHUNK: tl.constexpr,
    UNIT: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    STORE_END: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per (piece, head, block of columns), each on tensors that begin at its first token.

    Tensors ``[1,*,N,D]`` with strides in units of UNIT elements.
    """
    blocks: tl.constexpr = (DV + BV - 1) // BV
    pid = tl.program_id(0)
    block = pid % blocks
    h = pid // blocks % heads
    piece = pid // blocks // heads
    sequence, begin, size, _, is_last = piece_at(table_ptr, firsts_ptr, piece)
    if size > 0:
        row = h.to(tl.int64)
        q_at = q_ptr + (row // q_group * q_h + begin * q_t) * UNIT
        k_at = k_ptr + (row // k_group * k_h + begin * k_t) * UNIT
        v_at = v_ptr + (row // v_group * v_h + begin * v_t) * UNIT
        o_at = o_ptr + (row * o_h + begin * o_t) * UNIT
        g_at = g_ptr + row * g_h + begin * g_t
        g_head = 0.0 if PER_TOKEN else to_log2(tl.load(g_at))
        attend(
            q_at, k_at, v_at, o_at, q_at, end_ptr, end_ptr, g_at,
            states_ptr + (piece * heads + h).to(tl.int64) * (DK * DV),
            end_ptr + (sequence * heads + h).to(tl.int64) * (DK * DV),
            0, 0, 0, 0, 0, 0, q_t * UNIT, k_t * UNIT, v_t * UNIT, o_t * UNIT, q_t * UNIT, g_t, g_head, scale,
            size - size, size, size, CHUNK, is_last, block,
            DK=DK, DV=DV, BK=BK, BV=BV, CHUNK=CHUNK, REVERSE=False, PER_TOKEN=PER_TOKEN,
            HAS_START=True, STORE_END=STORE_END, TRANSPOSED=False, AUDIT=False, TMA=False, PRECISION=PRECISION,
        )  # fmt: skip


def cut_for(q: Tensor, v: Tensor, heads: int, cu_seqlens: Tensor) -> Pieces:
    """The pieces of a call."""
    tiles = launch.portable(q.shape[3], v.shape[3], q.dtype)
    slots = launch.hardware(q.device).processors * tiles.resident
    programs = heads * launch.blocks(v.shape[3], tiles.bv)
    return cut(cu_seqlens, q.shape[2], tokens_of_a_piece(q.shape[2], programs, slots))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    want_state: bool,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor]:
    """Output ``[1,H,N,Dv]`` in q's dtype and layout, and final states ``[S,H,Dk,Dv]`` fp32 (empty if not wanted)."""
    with launch.on_device_of(q):
        heads = head_count(q, k, v, log_decay, initial_state)
        dk, dv = q.shape[3], v.shape[3]
        o = launch.empty_like_q(q, heads, dv)
        shape = (cu_seqlens.shape[0] - 1, heads, dk, dv) if want_state else (0,)
        end = torch.empty(shape, dtype=torch.float32, device=q.device)
        q, k, v = (launch.unit_last(x) for x in (q, k, v))
        initial_state = launch.dense_state(initial_state)
        pieces = cut_for(q, v, heads, cu_seqlens)
        states = piece_states(
            k, v, log_decay, 1.0, pieces, heads, initial_state, end if want_state else None, reverse=False
        )
        tiles, unit = launch.portable(dk, dv, q.dtype), launch.unit(q, k, v, o)
        packed_forward_kernel[(pieces.count * heads * launch.blocks(dv, tiles.bv),)](
            q, k, v, o, log_decay, pieces.table, pieces.firsts, states, end,
            *(s for x in (q, k, v, o) for s in launch.strides(x, unit)[1:]), *launch.decay_strides(log_decay)[1:],
            float(scale), heads, heads // q.shape[1], heads // k.shape[1], heads // v.shape[1],
            DK=dk, DV=dv, BK=tiles.bk, BV=tiles.bv, CHUNK=tiles.chunk, UNIT=unit, PER_TOKEN=log_decay.dim() == 3,
            STORE_END=want_state, PRECISION=launch.precision(q.dtype, q.device),
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        return o, end
