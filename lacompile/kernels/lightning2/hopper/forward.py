"""The forward kernel on Hopper: what forward.py's computes."""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..factors import FACTORS
from .body import attend
from .tiles import log2_of


@gluon.jit(
    do_not_specialize=[
        "g_h", "scale", "heads", "q_group", "k_group", "v_group", "length", "segment", "segments",
    ]
)  # fmt: skip
def forward_kernel(
    q_source,
    k_source,
    v_source,
    o_target,
    decays_ptr,  # those of factors.py if PER_TOKEN, else a log-decay for each head
    start_ptr,
    end_ptr,
    g_h,
    scale,
    heads,
    q_group,
    k_group,
    v_group,
    length,
    segment,
    segments,
    DK: gl.constexpr,
    DV: gl.constexpr,
    BK: gl.constexpr,
    BV: gl.constexpr,
    CHUNK: gl.constexpr,
    PER_TOKEN: gl.constexpr,
    HAS_START: gl.constexpr,
    STORE_END: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
    Q_DIGITS: gl.constexpr,  # bf16 numbers that one of q is the sum of, if it is fp32: 1 or 3
    K_DIGITS: gl.constexpr,
    V_DIGITS: gl.constexpr,
):
    """One program per (batch and head, segment, block of columns)."""
    blocks: gl.constexpr = (DV + BV - 1) // BV
    pid = gl.program_id(0)
    block = pid % blocks
    part = (pid // blocks) % segments
    row = (pid // blocks) // segments
    b = row // heads
    h = row % heads
    row = row.to(gl.int64)
    g_head = 0.0 if PER_TOKEN else log2_of(gl.load(decays_ptr + h.to(gl.int64) * g_h).to(gl.float32))
    factors_ptr = decays_ptr + row * (gl.cdiv(length, CHUNK) * CHUNK * FACTORS)
    begin = part * segment
    stop = gl.minimum(begin + segment, length)
    attend(
        q_source, k_source, v_source, o_target, q_source, factors_ptr, end_ptr, end_ptr,
        start_ptr + (row * segments + part) * (DK * DV), end_ptr + row * (DK * DV),
        b, h // q_group, h // k_group, h // v_group, h, h, g_head, scale,
        begin, stop, length, segment, part == segments - 1, block,
        DK=DK, DV=DV, BK=BK, BV=BV, CHUNK=CHUNK, STAGES=STAGES, REVERSE=False, PER_TOKEN=PER_TOKEN,
        REGISTERS=REGISTERS, HAS_START=HAS_START, STORE_END=STORE_END, TRANSPOSED=False, AUDIT=False,
        OF_A=Q_DIGITS, OF_B=K_DIGITS, OF_C=V_DIGITS,
    )  # fmt: skip
