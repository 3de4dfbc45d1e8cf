"""The backward kernel over the pieces of packed sequences (arXiv 2401.04658, algorithm 2), as in :mod:`..backward`."""

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
from .decay_grad import packed_decay_grad
from .forward import cut_for
from .inside import packed_inside
from .pieces import piece_at
from .states import piece_states


@triton.jit(
    do_not_specialize=[
        "q_h", "q_t", "k_h", "k_t", "v_h", "v_t", "do_h", "do_t", "dq_h", "dq_t", "dk_h", "dk_t", "dv_h", "dv_t",
        "g_h", "g_t", "scale", "heads", "q_group", "k_group", "v_group", "length", "span", "spans",
    ]
)  # fmt: skip
def packed_backward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    g_ptr,
    table_ptr,
    firsts_ptr,
    q_rows_ptr,  # [blocks, H, N] fp32: sums of q * dq over a block's columns, as in body.py
    k_rows_ptr,  # the same of k * dk
    states_ptr,  # [pieces, H, DK, DV] fp32: states before the pieces
    d_states_ptr,  # [pieces, H, DK, DV] fp32: gradients of the states after the pieces
    marks_ptr,  # [pieces, H, spans, DK, DV]: states after each span of a piece
    d_marks_ptr,  # the same: gradients of the states before each span
    d_initial_ptr,  # [S, H, DK, DV] fp32: gradients of the states before the sequences
    q_h,
    q_t,
    k_h,
    k_t,
    v_h,
    v_t,
    do_h,
    do_t,
    dq_h,
    dq_t,
    dk_h,
    dk_t,
    dv_h,
    dv_t,
    g_h,
    g_t,
    scale,
    heads,
    q_group,
    k_group,
    v_group,
    length,
    span,
    spans,
    DK: tl.constexpr,
    DV: tl.constexpr,
    K_FULL: tl.constexpr,  # blocks of a contraction over DK and over DV, of columns out of DK and out of DV
    V_FULL: tl.constexpr,
    K_PART: tl.constexpr,
    V_PART: tl.constexpr,
    CHUNK: tl.constexpr,
    UNIT: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    DECAY_GRAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per (piece, head, gradient, block of columns), each on tensors that begin at the piece's first token.

    Tensors ``[1,*,N,D]`` with strides in units of UNIT elements; dq, dk and dv have all H heads.
    """
    k_blocks: tl.constexpr = (DK + K_PART - 1) // K_PART
    v_blocks: tl.constexpr = (DV + V_PART - 1) // V_PART
    uses: tl.constexpr = 2 * k_blocks + v_blocks
    pid = tl.program_id(0)
    use = pid % uses
    h = pid // uses % heads
    piece = pid // uses // heads
    sequence, begin, size, is_first, _ = piece_at(table_ptr, firsts_ptr, piece)
    if size > 0:
        row = h.to(tl.int64)
        q = q_ptr + (row // q_group * q_h + begin * q_t) * UNIT
        k = k_ptr + (row // k_group * k_h + begin * k_t) * UNIT
        v = v_ptr + (row // v_group * v_h + begin * v_t) * UNIT
        do = do_ptr + (row * do_h + begin * do_t) * UNIT
        g = g_ptr + row * g_h + begin * g_t
        g_head = 0.0 if PER_TOKEN else to_log2(tl.load(g))
        slot = (piece * heads + h).to(tl.int64)
        state = states_ptr + slot * (DK * DV)
        d_state = d_states_ptr + slot * (DK * DV)
        d_initial = d_initial_ptr + (sequence * heads + h).to(tl.int64) * (DK * DV)
        marks = slot * spans * (DK * DV)
        tokens = row * length + begin
        if use < k_blocks:
            attend(
                do, v, k, dq_ptr + (row * dq_h + begin * dq_t) * UNIT, q,
                q_rows_ptr + use.to(tl.int64) * heads * length + tokens, marks_ptr + marks, g, state, d_initial,
                0, 0, 0, 0, 0, 0, do_t * UNIT, v_t * UNIT, k_t * UNIT, dq_t * UNIT, q_t * UNIT, g_t, g_head, scale,
                size - size, size, size, span, False, use,
                DK=DV, DV=DK, BK=V_FULL, BV=K_PART, CHUNK=CHUNK, REVERSE=False, PER_TOKEN=PER_TOKEN, HAS_START=True,
                STORE_END=False, TRANSPOSED=True, AUDIT=DECAY_GRAD, TMA=False, PRECISION=PRECISION,
            )  # fmt: skip
        elif use < 2 * k_blocks:
            attend(
                v, do, q, dk_ptr + (row * dk_h + begin * dk_t) * UNIT, k,
                k_rows_ptr + (use - k_blocks).to(tl.int64) * heads * length + tokens, d_marks_ptr + marks, g, d_state,
                d_initial,
                0, 0, 0, 0, 0, 0, v_t * UNIT, do_t * UNIT, q_t * UNIT, dk_t * UNIT, k_t * UNIT, g_t, g_head, scale,
                size - size, size, size, span, False, use - k_blocks,
                DK=DV, DV=DK, BK=V_FULL, BV=K_PART, CHUNK=CHUNK, REVERSE=True, PER_TOKEN=PER_TOKEN, HAS_START=True,
                STORE_END=False, TRANSPOSED=True, AUDIT=DECAY_GRAD, TMA=False, PRECISION=PRECISION,
            )  # fmt: skip
        else:
            attend(
                k, q, do, dv_ptr + (row * dv_h + begin * dv_t) * UNIT, do, q_rows_ptr, marks_ptr, g, d_state, d_initial,
                0, 0, 0, 0, 0, 0, k_t * UNIT, q_t * UNIT, do_t * UNIT, dv_t * UNIT, do_t * UNIT, g_t, g_head, scale,
                size - size, size, size, span, is_first, use - 2 * k_blocks,
                DK=DK, DV=DV, BK=K_FULL, BV=V_PART, CHUNK=CHUNK, REVERSE=True, PER_TOKEN=PER_TOKEN, HAS_START=True,
                STORE_END=True, TRANSPOSED=False, AUDIT=False, TMA=False, PRECISION=PRECISION,
            )  # fmt: skip


def backward(
    do: Tensor,
    d_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    want_decay: bool,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v (in their dtype), of log_decay and of the states before the sequences (fp32).

    Without ``want_decay`` the gradient of log_decay is empty, without initial states theirs is.
    """
    with launch.on_device_of(q):
        heads, per_token = head_count(q, k, v, log_decay, initial_state), log_decay.dim() == 3
        length, dk, dv = q.shape[2], q.shape[3], v.shape[3]
        groups = heads // q.shape[1], heads // k.shape[1], heads // v.shape[1]
        q, k, v, do = (launch.unit_last(x) for x in (q, k, v, do))
        dq, dk_, dv_ = (launch.grad_like(x, heads) for x in (q, k, v))
        fp32 = {"dtype": torch.float32, "device": q.device}
        initial_state, d_state = launch.dense_state(initial_state), launch.dense_state(d_state)
        pieces = cut_for(q, v, heads, cu_seqlens)
        d_initial = torch.empty((pieces.sequences, heads, dk, dv), **fp32)
        states = piece_states(k, v, log_decay, 1.0, pieces, heads, initial_state, None, reverse=False)
        d_states = piece_states(q, do, log_decay, scale, pieces, heads, d_state, d_initial, reverse=True)
        for_k, for_v = launch.portable(dv, dk, q.dtype), launch.portable(dk, dv, q.dtype)
        k_blocks, v_blocks = launch.blocks(dk, for_k.bv), launch.blocks(dv, for_v.bv)
        span = launch.span(per_token, q, v)
        spans = launch.blocks(pieces.tokens, span)
        q_rows = torch.empty((k_blocks, heads, length) if want_decay else (0,), **fp32)
        k_rows = torch.empty_like(q_rows)
        marks_shape = (pieces.count, heads, spans, dk, dv) if want_decay else (0,)
        marks = torch.empty(marks_shape, **fp32)
        d_marks = torch.empty_like(marks)
        tensors, chunk = (q, k, v, do, dq, dk_, dv_), min(for_k.chunk, for_v.chunk)
        precision = launch.precision(q.dtype, q.device)
        unit = launch.unit(*tensors)
        packed_backward_kernel[(pieces.count * heads * (2 * k_blocks + v_blocks),)](
            *tensors, log_decay, pieces.table, pieces.firsts, q_rows, k_rows, states, d_states, marks, d_marks,
            d_initial, *(s for x in tensors for s in launch.strides(x, unit)[1:]),
            *launch.decay_strides(log_decay)[1:], float(scale), heads, *groups, length, span, spans,
            DK=dk, DV=dv, K_FULL=for_v.bk, V_FULL=for_k.bk, K_PART=for_k.bv, V_PART=for_v.bv,
            CHUNK=chunk, UNIT=unit, PER_TOKEN=per_token,
            DECAY_GRAD=want_decay, PRECISION=precision,
            num_warps=max(for_k.warps, for_v.warps), num_stages=min(for_k.stages, for_v.stages),
        )  # fmt: skip
        d_decay = q_rows
        if want_decay:
            given = q, k, v, do, log_decay, scale, chunk, pieces
            inside = packed_inside(*given) if launch.is_exact(precision) else None
            rows, ends = (q_rows, k_rows), (states, d_states)
            d_decay = packed_decay_grad(rows, inside, (marks, d_marks), ends, pieces, span, per_token)
        d_initial = d_initial if initial_state is not None else d_initial.new_empty(0)
        dq, dk_, dv_ = (launch.fold(grad, x.shape[1]) for grad, x in ((dq, q), (dk_, k), (dv_, v)))
        return dq, dk_, dv_, d_decay, d_initial
