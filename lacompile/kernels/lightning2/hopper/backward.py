"""The backward kernel on Hopper: what backward.py's computes."""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..factors import FACTORS
from .body import attend
from .tiles import log2_of


@gluon.jit(
    do_not_specialize=[
        "g_h", "scale", "rows", "heads", "q_group", "k_group", "v_group", "length", "segment",
        "segments", "span",
    ]
)  # fmt: skip
def backward_kernel(
    q_full,  # tiles of all columns
    k_full,
    v_full,
    do_full,
    q_part,  # tiles of a block of columns
    k_part,
    do_part,
    dq_part,
    dk_part,
    dv_part,
    decays_ptr,  # those of factors.py if PER_TOKEN, else a log-decay for each head
    q_rows_ptr,  # [blocks, rows, N] fp32: sums of q * dq over a block's columns
    k_rows_ptr,  # the same of k * dk
    start_ptr,  # [rows, segments, DK, DV] fp32: states before each segment
    d_start_ptr,  # [rows, segments, DK, DV] fp32: gradients of the states after each segment
    marks_ptr,  # [rows, spans, DK, DV]: states after each span of tokens
    d_marks_ptr,  # the same: gradients of the states before each span
    d_end_ptr,  # [rows, DK, DV] fp32: gradient of the initial state
    g_h,
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
    DK: gl.constexpr,
    DV: gl.constexpr,
    K_FULL: gl.constexpr,  # blocks of a contraction over DK and over DV
    V_FULL: gl.constexpr,
    BV: gl.constexpr,
    CHUNK: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
    Q_DIGITS: gl.constexpr,  # bf16 numbers that one of q is the sum of, if it is fp32: 1 or 3
    K_DIGITS: gl.constexpr,
    V_DIGITS: gl.constexpr,
    PER_TOKEN: gl.constexpr,
    HAS_START: gl.constexpr,
    HAS_D_START: gl.constexpr,
    STORE_D_END: gl.constexpr,
    DECAY_GRAD: gl.constexpr,
):
    """One program per (batch and head, segment, gradient, block of columns).

    First those of dk and dv, which read the same tiles at the same time, then those of dq.
    """
    k_blocks: gl.constexpr = (DK + BV - 1) // BV
    v_blocks: gl.constexpr = (DV + BV - 1) // BV
    pid = gl.program_id(0)
    use = pid % (k_blocks + v_blocks)
    place = pid // (k_blocks + v_blocks)
    if place >= rows * segments:
        use = k_blocks + v_blocks + (pid - (k_blocks + v_blocks) * rows * segments) % k_blocks
        place = (pid - (k_blocks + v_blocks) * rows * segments) // k_blocks
    part = place % segments
    row = place // segments
    b = row // heads
    h = row % heads
    row = row.to(gl.int64)
    q_from = h // q_group
    k_from = h // k_group
    v_from = h // v_group
    g_head = 0.0 if PER_TOKEN else log2_of(gl.load(decays_ptr + h.to(gl.int64) * g_h).to(gl.float32))
    factors_ptr = decays_ptr + row * (gl.cdiv(length, CHUNK) * CHUNK * FACTORS)
    begin = part * segment
    stop = gl.minimum(begin + segment, length)
    start_at = start_ptr + (row * segments + part) * (DK * DV)
    d_start_at = d_start_ptr + (row * segments + part) * (DK * DV)
    marks = row * gl.cdiv(length, span) * (DK * DV)
    if use < k_blocks:
        attend(
            v_full, do_full, q_part, dk_part, k_part, factors_ptr,
            k_rows_ptr + (use * rows + row) * length, d_marks_ptr + marks, d_start_at, d_end_ptr,
            b, v_from, h, q_from, h, k_from, g_head, scale, begin, stop, length, span, False, use,
            DK=DV, DV=DK, BK=V_FULL, BV=BV, CHUNK=CHUNK, STAGES=STAGES, REVERSE=True, PER_TOKEN=PER_TOKEN,
            REGISTERS=REGISTERS, HAS_START=HAS_D_START, STORE_END=False, TRANSPOSED=True, AUDIT=DECAY_GRAD,
            OF_A=V_DIGITS, OF_B=3, OF_C=Q_DIGITS,
        )  # fmt: skip
    elif use < k_blocks + v_blocks:
        attend(
            k_full, q_full, do_part, dv_part, do_part, factors_ptr,
            q_rows_ptr, marks_ptr, d_start_at, d_end_ptr + row * (DK * DV),
            b, k_from, q_from, h, h, h, g_head, scale, begin, stop, length, span, part == 0, use - k_blocks,
            DK=DK, DV=DV, BK=K_FULL, BV=BV, CHUNK=CHUNK, STAGES=STAGES, REVERSE=True, PER_TOKEN=PER_TOKEN,
            REGISTERS=REGISTERS, HAS_START=HAS_D_START, STORE_END=STORE_D_END, TRANSPOSED=False,
            AUDIT=False, OF_A=K_DIGITS, OF_B=Q_DIGITS, OF_C=3,
        )  # fmt: skip
    else:
        block = use - k_blocks - v_blocks
        attend(
            do_full, v_full, k_part, dq_part, q_part, factors_ptr,
            q_rows_ptr + (block * rows + row) * length, marks_ptr + marks, start_at, d_end_ptr,
            b, h, v_from, k_from, h, q_from, g_head, scale, begin, stop, length, span, False, block,
            DK=DV, DV=DK, BK=V_FULL, BV=BV, CHUNK=CHUNK, STAGES=STAGES, REVERSE=False, PER_TOKEN=PER_TOKEN,
            REGISTERS=REGISTERS, HAS_START=HAS_START, STORE_END=False, TRANSPOSED=True, AUDIT=DECAY_GRAD,
            OF_A=3, OF_B=V_DIGITS, OF_C=K_DIGITS,
        )  # fmt: skip
