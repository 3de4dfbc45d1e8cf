"""The forward kernel on Hopper: what forward.py's computes."""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .body import attend, log2_of


@gluon.jit(
    do_not_specialize=[
        "g_b", "g_h", "g_t", "scale", "heads", "q_group", "k_group", "v_group", "length", "segment", "segments",
        "start_slots",
    ]
)  # fmt: skip
def forward_kernel(
    q_source,
    k_source,
    v_source,
    o_target,
    g_ptr,
    start_ptr,
    end_ptr,
    g_b,
    g_h,
    g_t,
    scale,
    heads,
    q_group,
    k_group,
    v_group,
    length,
    segment,
    segments,
    start_slots,
    DK: gl.constexpr,
    DV: gl.constexpr,
    BK: gl.constexpr,
    BV: gl.constexpr,
    CHUNK: gl.constexpr,
    PER_TOKEN: gl.constexpr,
    HAS_START: gl.constexpr,
    STORE_END: gl.constexpr,
    STAGES: gl.constexpr,
    WARPS: gl.constexpr,
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
    g_at = g_ptr + b.to(gl.int64) * g_b + h.to(gl.int64) * g_h
    g_head = 0.0 if PER_TOKEN else log2_of(gl.load(g_at).to(gl.float32))
    begin = part * segment
    stop = gl.minimum(begin + segment, length)
    attend(
        q_source, k_source, v_source, o_target, q_source, end_ptr, end_ptr, g_at,
        start_ptr + (row * start_slots + part) * (DK * DV), end_ptr + row * (DK * DV),
        b, h // q_group, h // k_group, h // v_group, h, h, g_t, g_head, scale,
        begin, stop, segment, part == segments - 1, block,
        DK=DK, DV=DV, BK=BK, BV=BV, CHUNK=CHUNK, STAGES=STAGES, WARPS=WARPS, REVERSE=False, PER_TOKEN=PER_TOKEN,
        HAS_START=HAS_START, STORE_END=STORE_END, TRANSPOSED=False, AUDIT=False,
    )  # fmt: skip
