"""The one kernel body: decayed causal linear attention over one segment of one head, forwards or backwards in time.

With ``LA(a, b, c)_i = sum_{j <= i} exp(G_i - G_j) (a_i . b_j) c_j`` and ``LA^r`` its time reverse, the operator and its
gradients are ``o = LA(q, k, v)``, ``dq = LA(do, v, k)``, ``dv = LA^r(k, q, do)``, ``dk = LA^r(v, do, q)``
(arXiv 2401.04658, algorithms 1 and 2, regrouped). The state ``[DK, BV]`` stays in fp32 registers from chunk to chunk.
"""

# What @triton.jit makes of a function and of its launch is beyond a type checker.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from .decay import between, chunk_sums
from .tiles import read, write


@triton.jit
def state_offsets(
    block, DK: tl.constexpr, DV: tl.constexpr, TRANSPOSED: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr
):
    """Offsets and mask ``[BK, BV]`` of one block of columns of a state ``[DK, DV]``, or of one stored ``[DV, DK]``."""
    k = tl.arange(0, BK)[:, None]
    n = (block * BV + tl.arange(0, BV))[None, :]
    at = n * DK + k if TRANSPOSED else k * DV + n
    return at, (k < DK) & (n < DV)


@triton.jit
def rounding(x, weight):
    """What rounding to 16 bits adds to x times weight, as where the state takes that up; ``weight`` is by row."""
    weighted = x.to(tl.float32) * weight[:, None]
    return weighted.to(x.dtype).to(tl.float32) - weighted


@triton.jit
def attend(
    a_source,  # [N, DK] of one head, as in tiles.py
    b_source,  # [N, DK]
    c_source,  # [N, DV]
    y_target,  # [N, DV] output
    x_source,  # [N, DV] factor of y in the row sums, if AUDIT
    rows_ptr,  # [N] fp32 output: sum over this block's columns of x * y (in fp32 less the chunk's own), if AUDIT
    marks_ptr,  # output if AUDIT: states after each span, or backwards before it
    g_ptr,  # [N] log-decays if PER_TOKEN
    start_ptr,  # fp32 state to begin with, if HAS_START
    end_ptr,  # fp32 state at the end, if STORE_END
    batch,
    a_head,
    b_head,
    c_head,
    y_head,
    x_head,
    a_stride,
    b_stride,
    c_stride,
    y_stride,
    x_stride,
    g_stride,
    g_head,  # log2-decay of the head if not PER_TOKEN
    scale,
    begin,
    stop,
    length,
    span,
    store_end,  # whether this segment is the last one in this direction of time
    block,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    CHUNK: tl.constexpr,
    REVERSE: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    HAS_START: tl.constexpr,
    STORE_END: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    AUDIT: tl.constexpr,  # also write what the decay's gradient is made of
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Tokens ``[begin, stop)`` of one head, columns ``[block * BV, block * BV + BV)`` of the output.

    Forwards the state is that of the operator, ``S = sum b c`` up to the token, and the output carries ``scale``;
    backwards it is the state's gradient, which carries ``scale`` itself. Strides are those of tokens; the last one is
    1. States are ``[DK, DV]``, or ``[DV, DK]`` if TRANSPOSED. ``begin`` and ``span`` are multiples of CHUNK.
    """
    EXACT: tl.constexpr = PRECISION != "tf32"
    column = block * BV
    at_state, in_state = state_offsets(block, DK, DV, TRANSPOSED, BK, BV)
    if HAS_START:
        state = tl.load(start_ptr + at_state, mask=in_state, other=0.0).to(tl.float32)
    else:
        state = tl.zeros([BK, BV], tl.float32)

    chunks = tl.cdiv(stop - begin, CHUNK)
    for step in range(chunks):
        at = begin + (chunks - 1 - step if REVERSE else step) * CHUNK
        a = read(a_source, batch, a_head, a_stride, at, stop, 0, CHUNK, BK, DK, TMA)
        b = tl.trans(read(b_source, batch, b_head, b_stride, at, stop, 0, CHUNK, BK, DK, TMA))
        c = read(c_source, batch, c_head, c_stride, at, stop, column, CHUNK, BV, DV, TMA)
        sums, rest, to_end, last = chunk_sums(g_ptr, g_stride, at, stop, g_head, CHUNK, PER_TOKEN, EXACT)
        weight = between(sums, rest, g_head, REVERSE, CHUNK, PER_TOKEN, EXACT)
        if REVERSE:
            from_state = tl.exp2(to_end)
            to_state = tl.exp2(sums) * scale
        else:
            from_state = tl.exp2(sums) * scale
            to_state = tl.exp2(to_end)

        # The state is advanced before the scores exist: that order needs the fewest registers. It is read as two
        # numbers of 16 bits where row sums have to agree (decay_grad.py).
        AGREES: tl.constexpr = AUDIT and not PER_TOKEN and a.dtype.primitive_bitwidth == 16
        high = state.to(a.dtype)
        y = tl.dot(a, high, input_precision=PRECISION)
        row_sums = tl.zeros([CHUNK], tl.float32)
        if AGREES:
            y = tl.dot(a, (state - high.to(tl.float32)).to(a.dtype), y)
        weighted = (c.to(tl.float32) * to_state[:, None]).to(c.dtype)
        state = tl.dot(b, weighted, state * tl.exp2(last), input_precision=PRECISION)
        if AGREES:
            x = read(x_source, batch, x_head, x_stride, at, stop, column, CHUNK, BV, DV, TMA)
            row_sums = tl.sum(rounding(x, from_state) * y, 1)
        y *= from_state[:, None]
        # scale goes into the scores of every use, so that q . dq and k . dk round the same products alike and their
        # difference, the decay's gradient, does not see that rounding.
        scores = tl.dot(a, b, input_precision=PRECISION) * (weight * scale)
        of_state = y
        y = tl.dot(scores.to(c.dtype), c, y, input_precision=PRECISION)

        write(y_target, y, batch, y_head, y_stride, at, stop, column, CHUNK, BV, DV, TMA)
        if AUDIT:
            x = read(x_source, batch, x_head, x_stride, at, stop, column, CHUNK, BV, DV, TMA)
            t = tl.arange(0, CHUNK)
            row_sums += tl.sum(x.to(tl.float32) * (of_state if EXACT else y), 1)  # the rest is inside.py's
            tl.store(rows_ptr + at.to(tl.int64) + t, row_sums, mask=t < stop - at)
            border = at if REVERSE else at + CHUNK
            if (border % span == 0) | (border >= length):
                mark = (tl.cdiv(border, span) - (0 if REVERSE else 1)).to(tl.int64) * (DK * DV)
                tl.store(marks_ptr + mark + at_state, state.to(marks_ptr.dtype.element_ty), mask=in_state)

    if STORE_END:
        if store_end:
            tl.store(end_ptr + at_state, state, mask=in_state)
