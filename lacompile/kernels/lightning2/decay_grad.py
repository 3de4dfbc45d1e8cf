"""The gradient of the log-decays from row sums: ``dG_i = q_i . dq_i - k_i . dk_i`` and ``dg_t = sum_{i >= t} dG_i``.

Summed over a long sequence the two row sums nearly cancel and their rounding would not. So the sum is cut into spans:
all that comes after a span is, exactly, the inner product of the state there with the state's gradient there.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["length", "rows", "spans", "slots"])
def decay_grad_kernel(
    q_rows_ptr,  # [blocks, rows, N] fp32: partial sums of q * dq
    k_rows_ptr,  # the same of k * dk
    states_ptr,  # [rows, slots, DK, DV] fp32: state before token 0, SPAN, 2 SPAN, ..., and after the last token
    grads_ptr,  # gradients of those states
    d_state_ptr,  # [rows, DK, DV] fp32: gradient of the final state, if HAS_D_STATE
    out_ptr,  # [rows, N] per token, or [rows, spans] sums over a span
    length,
    rows,
    spans,
    slots,
    DKV: tl.constexpr,
    BLOCKS: tl.constexpr,
    SPAN: tl.constexpr,
    TILE: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    HAS_D_STATE: tl.constexpr,
):
    """One program per (batch and head, span); TILE is SPAN or less if the sequence is shorter."""
    pid = tl.program_id(0)
    row = (pid // spans).to(tl.int64)
    span = pid % spans
    t = tl.arange(0, TILE)
    here = t < length - span * SPAN
    at = span.to(tl.int64) * SPAN + t
    difference = tl.zeros([TILE], tl.float32)
    for block in tl.static_range(BLOCKS):
        from_row = (block * rows + row) * length
        difference += tl.load(q_rows_ptr + from_row + at, mask=here, other=0.0)
        difference -= tl.load(k_rows_ptr + from_row + at, mask=here, other=0.0)

    e = tl.arange(0, 1024)
    total = tl.zeros([1024], tl.float32)
    if span < spans - 1:
        slot = (row * slots + span + 1) * DKV
        for first in range(0, DKV, 1024):
            inside = first + e < DKV
            s = tl.load(states_ptr + slot + first + e, mask=inside, other=0.0)
            total += s * tl.load(grads_ptr + slot + first + e, mask=inside, other=0.0)
    elif HAS_D_STATE:
        slot = (row * slots + spans) * DKV
        for first in range(0, DKV, 1024):
            inside = first + e < DKV
            s = tl.load(states_ptr + slot + first + e, mask=inside, other=0.0)
            total += s * tl.load(d_state_ptr + row * DKV + first + e, mask=inside, other=0.0)
    after = tl.sum(total, 0)
    if PER_TOKEN:
        tl.store(out_ptr + row * length + at, tl.cumsum(difference, 0, reverse=True) + after, mask=here)
    else:
        count = tl.minimum(length - span * SPAN, SPAN).to(tl.float32)
        tl.store(out_ptr + row * spans + span, tl.sum(difference * (t + 1).to(tl.float32), 0) + after * count)
