"""The backward kernel (arXiv 2401.04658, algorithm 2): all three gradients as uses of one body, in one launch."""

# What @triton.jit makes of a function and of its launch is beyond a type checker.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import head_count
from . import launch
from .body import attend
from .decay import to_log2
from .decay_grad import decay_grad
from .segments import segment_states
from .tiles import of_head


@triton.jit(
    do_not_specialize=[
        "q_b", "q_h", "q_t", "k_b", "k_h", "k_t", "v_b", "v_h", "v_t", "do_b", "do_h", "do_t",
        "dq_b", "dq_h", "dq_t", "dk_b", "dk_h", "dk_t", "dv_b", "dv_h", "dv_t", "g_b", "g_h", "g_t",
        "scale", "rows", "heads", "q_group", "k_group", "v_group", "length", "segment", "segments", "span",
        "slots",
    ]
)  # fmt: skip
def backward_kernel(
    q_full,  # tiles of all columns, as in tiles.py
    k_full,
    v_full,
    do_full,
    q_part,  # tiles of a block of columns
    k_part,
    do_part,
    dq_part,
    dk_part,
    dv_part,
    g_ptr,
    q_rows_ptr,  # [blocks, rows, N] fp32: sums of q * dq over a block's columns
    k_rows_ptr,  # the same of k * dk
    start_ptr,  # [rows, slots, DK, DV] fp32: states before each segment
    d_start_ptr,  # [rows, slots, DK, DV] fp32: gradients of the states; the last slots are those after each segment
    marks_ptr,  # [rows, spans + 1, DK, DV]: states before token 0, span, ..., and after the last token
    d_marks_ptr,  # their gradients
    d_end_ptr,  # [rows, DK, DV] fp32: gradient of the initial state
    q_b,
    q_h,
    q_t,
    k_b,
    k_h,
    k_t,
    v_b,
    v_h,
    v_t,
    do_b,
    do_h,
    do_t,
    dq_b,
    dq_h,
    dq_t,
    dk_b,
    dk_h,
    dk_t,
    dv_b,
    dv_h,
    dv_t,
    g_b,
    g_h,
    g_t,
    scale,
    rows,
    heads,
    q_group,
    k_group,
    v_group,
    length,
    segment,
    segments,
    span,
    slots,
    DK: tl.constexpr,
    DV: tl.constexpr,
    K_FULL: tl.constexpr,  # blocks of a contraction over DK and over DV, of columns out of DK and out of DV
    V_FULL: tl.constexpr,
    K_PART: tl.constexpr,
    V_PART: tl.constexpr,
    CHUNK: tl.constexpr,
    UNIT: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_D_START: tl.constexpr,
    STORE_D_END: tl.constexpr,
    DECAY_GRAD: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per (batch and head, segment, gradient, block of columns), those of one segment next to each other.

    Tensors ``[B,*,N,D]`` with strides in units of UNIT elements; dq, dk and dv have all H heads.
    """
    k_blocks: tl.constexpr = (DK + K_PART - 1) // K_PART
    v_blocks: tl.constexpr = (DV + V_PART - 1) // V_PART
    uses: tl.constexpr = 2 * k_blocks + v_blocks
    pid = tl.program_id(0)
    use = pid % uses
    part = (pid // uses) % segments
    row = (pid // uses) // segments
    b = row // heads
    h = row % heads
    row = row.to(tl.int64)
    q_from = h // q_group
    k_from = h // k_group
    v_from = h // v_group
    g_at = g_ptr + b.to(tl.int64) * g_b + h.to(tl.int64) * g_h
    g_head = 0.0 if PER_TOKEN else to_log2(tl.load(g_at))
    begin = part * segment
    stop = tl.minimum(begin + segment, length)
    start_at = start_ptr + (row * slots + part) * (DK * DV)
    d_start_at = d_start_ptr + (row * slots + tl.minimum(part + 1, slots - 1)) * (DK * DV)
    marks = row * (tl.cdiv(length, span) + 1) * (DK * DV)
    if use < k_blocks:
        attend(
            of_head(do_full, b, h, do_b, do_h, UNIT, TMA), of_head(v_full, b, v_from, v_b, v_h, UNIT, TMA),
            of_head(k_part, b, k_from, k_b, k_h, UNIT, TMA), of_head(dq_part, b, h, dq_b, dq_h, UNIT, TMA),
            of_head(q_part, b, q_from, q_b, q_h, UNIT, TMA),
            q_rows_ptr + (use * rows + row) * length, marks_ptr + marks, g_at, start_at, d_end_ptr,
            b, h, v_from, k_from, h, q_from,
            do_t * UNIT, v_t * UNIT, k_t * UNIT, dq_t * UNIT, q_t * UNIT, g_t, g_head, scale,
            begin, stop, span, False, use,
            DK=DV, DV=DK, BK=V_FULL, BV=K_PART, CHUNK=CHUNK, REVERSE=False, PER_TOKEN=PER_TOKEN,
            HAS_START=HAS_START, STORE_END=False, TRANSPOSED=True, AUDIT=DECAY_GRAD, TMA=TMA, PRECISION=PRECISION,
        )  # fmt: skip
    elif use < 2 * k_blocks:
        attend(
            of_head(v_full, b, v_from, v_b, v_h, UNIT, TMA), of_head(do_full, b, h, do_b, do_h, UNIT, TMA),
            of_head(q_part, b, q_from, q_b, q_h, UNIT, TMA), of_head(dk_part, b, h, dk_b, dk_h, UNIT, TMA),
            of_head(k_part, b, k_from, k_b, k_h, UNIT, TMA),
            k_rows_ptr + ((use - k_blocks) * rows + row) * length, d_marks_ptr + marks, g_at, d_start_at, d_end_ptr,
            b, v_from, h, q_from, h, k_from,
            v_t * UNIT, do_t * UNIT, q_t * UNIT, dk_t * UNIT, k_t * UNIT, g_t, g_head, scale,
            begin, stop, span, False, use - k_blocks,
            DK=DV, DV=DK, BK=V_FULL, BV=K_PART, CHUNK=CHUNK, REVERSE=True, PER_TOKEN=PER_TOKEN,
            HAS_START=HAS_D_START, STORE_END=False, TRANSPOSED=True, AUDIT=DECAY_GRAD, TMA=TMA, PRECISION=PRECISION,
        )  # fmt: skip
    else:
        attend(
            of_head(k_full, b, k_from, k_b, k_h, UNIT, TMA), of_head(q_full, b, q_from, q_b, q_h, UNIT, TMA),
            of_head(do_part, b, h, do_b, do_h, UNIT, TMA), of_head(dv_part, b, h, dv_b, dv_h, UNIT, TMA), do_part,
            q_rows_ptr, marks_ptr, g_at, d_start_at, d_end_ptr + row * (DK * DV),
            b, k_from, q_from, h, h, h,
            k_t * UNIT, q_t * UNIT, do_t * UNIT, dv_t * UNIT, do_t * UNIT, g_t, g_head, scale,
            begin, stop, span, part == 0, use - 2 * k_blocks,
            DK=DK, DV=DV, BK=K_FULL, BV=V_PART, CHUNK=CHUNK, REVERSE=True, PER_TOKEN=PER_TOKEN,
            HAS_START=HAS_D_START, STORE_END=STORE_D_END, TRANSPOSED=False, AUDIT=False, TMA=TMA, PRECISION=PRECISION,
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
    want_decay: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v (in their dtype), of log_decay and of the initial state (fp32).

    Without ``want_decay`` the gradient of log_decay is zero and costs nothing; without an initial state its gradient
    is empty.
    """
    with torch.cuda.device_of(q):
        return _backward(do, d_state, q, k, v, log_decay, scale, initial_state, want_decay)


def _backward(
    do: Tensor,
    d_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    want_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    heads = head_count(q, k, v, log_decay, initial_state)
    batch, _, length, dk = q.shape
    dv = v.shape[3]
    groups = heads // q.shape[1], heads // k.shape[1], heads // v.shape[1]
    q, k, v, do = (launch.unit_last(x) for x in (q, k, v, do))
    dq, dk_, dv_ = (launch.grad_like(x, heads) for x in (q, k, v))
    d_decay = torch.zeros(log_decay.shape, dtype=torch.float32, device=q.device)
    fp32 = {"dtype": torch.float32, "device": q.device}
    # Triton 3.6 pipelines heads of 256 into more shared memory than there is unless the last state is stored.
    store_end = initial_state is not None or launch.next_power_of_2(max(dk, dv)) == 256
    d_initial = torch.empty((batch, heads, dk, dv) if store_end else (0,), **fp32)
    if batch * heads * length == 0:
        d_initial = d_initial.zero_() if d_state is None or initial_state is None else d_initial.copy_(d_state)
        d_initial = d_initial if initial_state is not None else d_initial.new_empty(0)
        dq, dk_, dv_ = (launch.fold(g, x.shape[1]) for g, x in ((dq, q), (dk_, k), (dv_, v)))
        return dq, dk_, dv_, d_decay, d_initial
    initial_state, d_state = launch.dense_state(initial_state), launch.dense_state(d_state)
    for_k, for_v = launch.config(dv, dk, q.dtype), launch.config(dk, dv, q.dtype)
    k_blocks, v_blocks = launch.blocks(dk, for_k.bv), launch.blocks(dv, for_v.bv)
    rows = batch * heads
    programs = rows * (2 * k_blocks + v_blocks)
    resident = min(for_k.resident, for_v.resident)
    split = launch.plan(length, programs, launch.processors(q.device) * resident, launch.PREPASS_BACKWARD)
    start, d_start, slots = initial_state, d_state, 1
    if split.count > 1:
        start = segment_states(k, v, log_decay, 1.0, initial_state, split, reverse=False)
        d_start = segment_states(q, do, log_decay, scale, d_state, split, reverse=True)
        slots = split.count + 1
    span = launch.span(log_decay.dim() == 3)
    spans = launch.blocks(length, span)
    q_rows = torch.empty((k_blocks, rows, length) if want_decay else (0,), **fp32)
    k_rows = torch.empty_like(q_rows)
    marks_shape = (rows, spans + 1, dk, dv) if want_decay else (0,)
    marks = torch.empty(marks_shape, dtype=launch.mark_dtype(q.dtype, log_decay.dim() == 3), device=q.device)
    d_marks = torch.empty_like(marks)
    unit = launch.unit(q, k, v, do, dq, dk_, dv_)
    tma = launch.use_tma(q, k, v, do, dq, dk_, dv_)
    chunk = min(for_k.chunk, for_v.chunk)
    boxes = [(q, for_v.bk), (k, for_v.bk), (v, for_k.bk), (do, for_k.bk), (q, for_k.bv), (k, for_k.bv), (do, for_v.bv)]
    boxes += [(dq, for_k.bv), (dk_, for_k.bv), (dv_, for_v.bv)]
    backward_kernel[(programs * split.count,)](
        *(launch.source(x, tma, chunk, columns) for x, columns in boxes), log_decay, q_rows, k_rows,
        q_rows if start is None else start, q_rows if d_start is None else d_start, marks, d_marks, d_initial,
        *launch.strides(q, unit), *launch.strides(k, unit), *launch.strides(v, unit), *launch.strides(do, unit),
        *launch.strides(dq, unit), *launch.strides(dk_, unit), *launch.strides(dv_, unit),
        *launch.decay_strides(log_decay), float(scale), rows, heads, *groups, length,
        split.tokens, split.count, span, slots,
        DK=dk, DV=dv, K_FULL=for_v.bk, V_FULL=for_k.bk, K_PART=for_k.bv, V_PART=for_v.bv,
        CHUNK=chunk, UNIT=unit, TMA=tma,
        PER_TOKEN=log_decay.dim() == 3, HAS_START=start is not None, HAS_D_START=d_start is not None,
        STORE_D_END=store_end, DECAY_GRAD=want_decay, PRECISION=launch.precision(q.dtype),
        num_warps=max(for_k.warps, for_v.warps), num_stages=min(for_k.stages, for_v.stages),
    )  # fmt: skip
    if want_decay:
        d_decay = decay_grad(q_rows, k_rows, marks, d_marks, log_decay, initial_state, d_state, span)
    d_initial = d_initial if initial_state is not None else d_initial.new_empty(0)
    dq, dk_, dv_ = (launch.fold(g, x.shape[1]) for g, x in ((dq, q), (dk_, k), (dv_, v)))
    return dq, dk_, dv_, d_decay, d_initial
