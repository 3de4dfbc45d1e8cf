"""The gradient of the log-decays of packed sequences: that of each piece, as in :mod:`..decay_grad`."""

# What @triton.jit makes of a function and of its launch is beyond a type checker.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..decay_grad import inner, span_gradient
from .pieces import Pieces, piece_at


@triton.jit(do_not_specialize=["length", "heads", "spans"])
def packed_decay_grad_kernel(
    q_rows_ptr,  # [blocks, H, N] fp32: partial sums of q * dq
    k_rows_ptr,  # the same of k * dk
    inside_ptr,  # [H, N] fp32: sums of inside.py, if INSIDE
    marks_ptr,  # [pieces, H, spans, DK, DV]: states after each span of a piece
    d_marks_ptr,  # the same: gradients of the states before each span
    states_ptr,  # [pieces, H, DK, DV] fp32: states before the pieces
    d_states_ptr,  # [pieces, H, DK, DV] fp32: gradients of the states after the pieces
    table_ptr,
    firsts_ptr,
    out_ptr,  # fp32: [H, N] per token, or [pieces, H, spans] sums over a span
    length,
    heads,
    spans,
    DKV: tl.constexpr,
    BLOCKS: tl.constexpr,
    SPAN: tl.constexpr,
    INSIDE: tl.constexpr,
    PER_TOKEN: tl.constexpr,
):
    """One program per (piece, head, span)."""
    pid = tl.program_id(0)
    span = pid % spans
    h = pid // spans % heads
    piece = pid // spans // heads
    _, begin, size, _, _ = piece_at(table_ptr, firsts_ptr, piece)
    count = tl.maximum(tl.minimum(size - span * SPAN, SPAN), 0)
    row = (piece * heads + h).to(tl.int64)
    slot = (row * spans + span) * DKV
    before = 0.0
    after = 0.0
    if count > 0:
        if span > 0:
            before = inner(marks_ptr + slot - DKV, d_marks_ptr + slot, DKV)
        else:
            before = inner(states_ptr + row * DKV, d_marks_ptr + slot, DKV)
        if (span + 1) * SPAN < size:
            after = inner(marks_ptr + slot, d_marks_ptr + slot + DKV, DKV)
        else:
            after = inner(marks_ptr + slot, d_states_ptr + row * DKV, DKV)
    at = h.to(tl.int64) * length + begin + span * SPAN
    gradient = span_gradient(
        q_rows_ptr + at, k_rows_ptr + at, inside_ptr + at, heads.to(tl.int64) * length, before, after, count,
        BLOCKS=BLOCKS, SPAN=SPAN, INSIDE=INSIDE,
    )  # fmt: skip
    if PER_TOKEN:
        t = tl.arange(0, SPAN)
        tl.store(out_ptr + at + t, gradient, mask=t < count)
    else:
        tl.store(out_ptr + row * spans + span, tl.sum(gradient, 0))


def packed_decay_grad(
    rows: tuple[Tensor, Tensor],
    inside: Tensor | None,
    marks: tuple[Tensor, Tensor],
    states: tuple[Tensor, Tensor],
    pieces: Pieces,
    span: int,
    per_token: bool,
) -> Tensor:
    """Gradient of log-decays ``[H]`` or ``[1,H,N]``, fp32, from what the backward kernel wrote down.

    ``rows``, ``marks`` and ``states`` are pairs: sums of q * dq and of k * dk, and states and their gradients.
    ``inside`` is there where inputs are fp32 (inside.py).
    """
    blocks, heads, length = rows[0].shape
    spans = marks[0].shape[2]
    shape = (1, heads, length) if per_token else (pieces.count, heads, spans)
    out = torch.empty(shape, dtype=torch.float32, device=rows[0].device)
    packed_decay_grad_kernel[(pieces.count * heads * spans,)](
        *rows, rows[0] if inside is None else inside, *marks, *states, pieces.table, pieces.firsts, out, length, heads,
        spans, DKV=marks[0].shape[3] * marks[0].shape[4], BLOCKS=blocks, SPAN=span, INSIDE=inside is not None,
        PER_TOKEN=per_token, num_warps=4,
    )  # fmt: skip
    return out if per_token else out.sum((0, 2))
