"""The gradient of the log-decays from row sums: ``dG_i = q_i . dq_i - k_i . dk_i`` and ``dg_t = sum_{i >= t} dG_i``.

Over a long sequence the two row sums nearly cancel and their rounding does not. So the sum is cut at marks: all that
comes after a mark is, exactly, the inner product of the state there with the state's gradient there, and so is all
that comes after a token less what lies between. In fp32 the row sums are of pairs in different chunks alone, and
what the others add to each gate is summed by itself (inside.py).

One decay for all tokens adds the sums up, and with them what rounding leaves of pairs that cross from chunk to chunk.
There, in 16 bits, both sides round alike: ``q . dq`` takes q as the state's gradient took it up, decayed and rounded,
``k . dk`` takes k as the state did, and states are read as two numbers, of which the second is the rounding of the
first. Then the difference over a chunk is that of the inner products at its ends, to the precision of fp32.
"""

# What @triton.jit makes of a function and of its launch is beyond a type checker.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .calls import Launch


@triton.jit
def inner(states_ptr, grads_ptr, DKV: tl.constexpr):
    """<S, dS> of one mark in fp32."""
    e = tl.arange(0, 1024)
    total = tl.zeros([1024], tl.float32)
    for first in range(0, DKV, 1024):
        inside = first + e < DKV
        s = tl.load(states_ptr + first + e, mask=inside, other=0.0).to(tl.float32)
        total += s * tl.load(grads_ptr + first + e, mask=inside, other=0.0).to(tl.float32)
    return tl.sum(total, 0)


@triton.jit
def span_gradient(
    q_rows_ptr,  # fp32: partial sums of q * dq over the tokens of one span
    k_rows_ptr,  # the same of k * dk
    inside_ptr,  # fp32: sums of inside.py over the span, if INSIDE
    to_next,  # elements from one partial sum to the next
    before,  # <S, dS> at the span's start
    after,  # <S, dS> at its end
    count,
    BLOCKS: tl.constexpr,
    SPAN: tl.constexpr,
    INSIDE: tl.constexpr,
):
    """``[SPAN]`` gradients of ``count`` tokens' log-decays, then zeros.

    Sums from the span's start, less what they miss at its end in proportion to the tokens: rounding adds up like a
    random walk, and of such a walk with both ends known that is the best estimate.
    """
    t = tl.arange(0, SPAN)
    here = t < count
    difference = tl.zeros([SPAN], tl.float32)
    for block in tl.static_range(BLOCKS):
        difference += tl.load(q_rows_ptr + block * to_next + t, mask=here, other=0.0)
        difference -= tl.load(k_rows_ptr + block * to_next + t, mask=here, other=0.0)
    so_far = tl.cumsum(difference, 0) - difference
    missed = after - (before - tl.sum(difference, 0))
    gradient = before - so_far + missed * (t.to(tl.float32) / count)
    if INSIDE:
        gradient += tl.load(inside_ptr + t, mask=here, other=0.0)
    return tl.where(here, gradient, 0.0)


@triton.jit(do_not_specialize=["length", "rows", "spans"])
def decay_grad_kernel(
    q_rows_ptr,  # [blocks, rows, N] fp32: partial sums of q * dq
    k_rows_ptr,  # the same of k * dk
    inside_ptr,  # [rows, N] fp32: sums of inside.py, if INSIDE
    marks_ptr,  # [rows, spans, DK, DV]: states after each span
    d_marks_ptr,  # the same: gradients of the states before each span
    start_ptr,  # [rows, DK, DV]: the state before token 0, if HAS_START
    d_end_ptr,  # [rows, DK, DV]: gradient of the state after the last token, if HAS_D_END
    out_ptr,  # fp32: [rows, N] per token, or [rows, spans] sums over a span
    length,
    rows,
    spans,
    DKV: tl.constexpr,
    BLOCKS: tl.constexpr,
    SPAN: tl.constexpr,
    INSIDE: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_D_END: tl.constexpr,
):
    """One program per (batch and head, span)."""
    pid = tl.program_id(0)
    row = (pid // spans).to(tl.int64)
    span = pid % spans
    slot = (row * spans + span) * DKV
    before = 0.0
    after = 0.0
    if span > 0:
        before = inner(marks_ptr + slot - DKV, d_marks_ptr + slot, DKV)
    elif HAS_START:
        before = inner(start_ptr + row * DKV, d_marks_ptr + slot, DKV)
    if span < spans - 1:
        after = inner(marks_ptr + slot, d_marks_ptr + slot + DKV, DKV)
    elif HAS_D_END:
        after = inner(marks_ptr + slot, d_end_ptr + row * DKV, DKV)

    count = tl.minimum(length - span * SPAN, SPAN)
    at = row * length + span.to(tl.int64) * SPAN
    gradient = span_gradient(
        q_rows_ptr + at, k_rows_ptr + at, inside_ptr + at, rows.to(tl.int64) * length, before, after, count,
        BLOCKS=BLOCKS, SPAN=SPAN, INSIDE=INSIDE,
    )  # fmt: skip
    if PER_TOKEN:
        t = tl.arange(0, SPAN)
        tl.store(out_ptr + at + t, gradient, mask=t < count)
    else:
        tl.store(out_ptr + row * spans + span, tl.sum(gradient, 0))


def decay_grad(
    log_decay: Tensor,
    rows_shape: Sequence[int],
    marks_shape: Sequence[int],
    span: int,
    is_exact: bool,
    has_start: bool,
    has_d_end: bool,
) -> Callable[..., Tensor]:
    """Makes the gradient of log-decays like these, ``[H]`` or ``[B,H,N]``, of what the backward kernel wrote down.

    The result takes its row sums and marks, of the shapes given, with the sums inside chunks between them if inputs are
    fp32, the state before the first token and the gradient of that after the last, if there are any. It returns fp32.
    """
    blocks, rows, length = rows_shape
    _, spans, dk, dv = marks_shape
    per_token = log_decay.dim() == 3
    heads = log_decay.shape[1 if per_token else 0]
    shape = log_decay.shape if per_token else (rows // heads, heads, spans)
    run = Launch(
        decay_grad_kernel, rows * spans, [None] * 8, [length, rows, spans],
        {"DKV": dk * dv, "BLOCKS": blocks, "SPAN": span, "INSIDE": is_exact, "PER_TOKEN": per_token,
         "HAS_START": has_start, "HAS_D_END": has_d_end},
        {"num_warps": 4},
    )  # fmt: skip

    def gradient(
        q_rows: Tensor,
        k_rows: Tensor,
        inside: Tensor,
        marks: Tensor,
        d_marks: Tensor,
        start: Tensor | None,
        d_end: Tensor | None,
    ) -> Tensor:
        out = torch.empty(shape, dtype=torch.float32, device=q_rows.device)
        start, d_end = (q_rows if x is None else x for x in (start, d_end))
        run(q_rows, k_rows, inside, marks, d_marks, start, d_end, out)
        return out if per_token else out.sum((0, 2))

    return gradient
