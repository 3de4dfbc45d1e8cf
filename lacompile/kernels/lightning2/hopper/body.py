"""The body of body.py for Hopper's tensor cores (Gluon), in two forms: for 16-bit tensors and for fp32."""

# What @gluon.jit makes of a function and of its launch is beyond a type checker.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .exact import attend_exactly
from .groups import attend_in_groups


@gluon.jit
def attend(
    a_source,
    b_source,
    c_source,
    y_target,
    x_source,
    factors_ptr,
    rows_ptr,
    marks_ptr,
    start_ptr,
    end_ptr,
    batch,
    a_head,
    b_head,
    c_head,
    y_head,
    x_head,
    g_head,
    scale,
    begin,
    stop,
    length,
    span,
    store_end,
    block,
    DK: gl.constexpr,
    DV: gl.constexpr,
    BK: gl.constexpr,
    BV: gl.constexpr,
    CHUNK: gl.constexpr,
    STAGES: gl.constexpr,
    REVERSE: gl.constexpr,
    PER_TOKEN: gl.constexpr,
    HAS_START: gl.constexpr,
    STORE_END: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    AUDIT: gl.constexpr,
    REGISTERS: gl.constexpr,
    OF_A: gl.constexpr,
    OF_B: gl.constexpr,
    OF_C: gl.constexpr,
):
    """What body.attend computes, from the same arguments; sources and target are descriptors.

    OF_A, OF_B and OF_C are as in exact.py.
    """
    if a_source.dtype == gl.float32:
        attend_exactly(
            a_source, b_source, c_source, y_target, x_source, factors_ptr, rows_ptr, marks_ptr, start_ptr, end_ptr,
            batch, a_head, b_head, c_head, y_head, x_head, g_head, scale, begin, stop, length, span, store_end, block,
            DK, DV, BK, BV, CHUNK, REVERSE, PER_TOKEN, HAS_START, STORE_END, TRANSPOSED, AUDIT,
            OF_A, OF_B, OF_C,
        )  # fmt: skip
    else:
        attend_in_groups(
            a_source, b_source, c_source, y_target, x_source, factors_ptr, rows_ptr, marks_ptr, start_ptr, end_ptr,
            batch, a_head, b_head, c_head, y_head, x_head, g_head, scale, begin, stop, length, span, store_end, block,
            DK, DV, BK, BV, CHUNK, STAGES, REVERSE, PER_TOKEN, HAS_START, STORE_END, TRANSPOSED, AUDIT, REGISTERS,
        )  # fmt: skip
