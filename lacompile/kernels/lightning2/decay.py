"""Decay factors of one chunk, in base 2. No exponent is ever positive, and what is masked is masked before exp2.

With G the cumulative log-decay inside the chunk (inclusive), three factors serve both directions of time:
between two tokens exp(G_i - G_j) for j <= i, from the chunk's start to a token exp(G_i), and from a token to the
chunk's end exp(G_last - G_j). No inverse decay exp(-G_j) is formed, which would overflow for strong decays.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# exp2(-160) is 0 in fp32. Clamping there keeps -inf (a full reset) from making NaN in a difference, and keeps the
# running sum small enough for the differences between its later tokens to stay accurate.
MIN_LOG2 = tl.constexpr(-160.0)


@triton.jit
def to_log2(log_decay):
    """Natural to base-2 logarithm, clamped to [-160, inf); NaN stays NaN."""
    g = log_decay.to(tl.float32) * LOG2_E
    return tl.where(g < MIN_LOG2, MIN_LOG2, g)


@triton.jit
def chunk_sums(g_ptr, g_stride, begin, stop, g_head, CHUNK: tl.constexpr, PER_TOKEN: tl.constexpr, EXACT: tl.constexpr):
    """(G, what its rounding left out, G_last - G, each ``[CHUNK]``; G_last) in base 2, all in fp32.

    Of tokens ``[begin, min(begin + CHUNK, stop))``; after ``stop`` G stays at its last value. ``g_ptr`` points at token
    0 of the head; ``g_head`` is the head's log2-decay when it is not per token. Two tokens that are near to each other
    may have large sums, whose rounding is large beside their difference: EXACT sums in fp64.
    """
    t = tl.arange(0, CHUNK)
    if PER_TOKEN:
        at = (begin + t).to(tl.int64) * g_stride
        g = to_log2(tl.load(g_ptr + at, mask=begin + t < stop, other=0.0))
        wide = tl.cumsum(g.to(tl.float64) if EXACT else g, 0)
        last = tl.sum(tl.where(t == CHUNK - 1, wide, 0.0), 0)
        sums, to_end, last = wide.to(tl.float32), (last - wide).to(tl.float32), last.to(tl.float32)
        rest = (wide - sums.to(wide.dtype)).to(tl.float32)
    else:
        count = tl.minimum(stop - begin, CHUNK)
        sums = tl.minimum(t + 1, count).to(tl.float32) * g_head
        last = count.to(tl.float32) * g_head
        to_end, rest = last - sums, tl.zeros_like(sums)
    return sums, rest, to_end, last


@triton.jit
def between(
    sums, rest, g_head, REVERSE: tl.constexpr, CHUNK: tl.constexpr, PER_TOKEN: tl.constexpr, EXACT: tl.constexpr
):
    """``[CHUNK, CHUNK]`` factors from token (column) to token (row), 0 where time would run backwards.

    With REVERSE rows are the earlier tokens: the transpose, computed from the same numbers.
    """
    row = tl.arange(0, CHUNK)[:, None]
    col = tl.arange(0, CHUNK)[None, :]
    gap = sums[:, None] - sums[None, :] if PER_TOKEN else (row - col).to(tl.float32) * g_head
    if PER_TOKEN and EXACT:
        gap += rest[:, None] - rest[None, :]
    if REVERSE:
        return tl.exp2(tl.where(row <= col, -gap, float("-inf")))
    return tl.exp2(tl.where(row >= col, gap, float("-inf")))
