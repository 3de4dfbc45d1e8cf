"""Decay factors of every chunk, worked out once for the many programs of Hopper's body that read them.

A sum over the tokens of a chunk crosses all warps of a program, and every program of a head would form the same sums
and the same powers. Here each is formed once, and arrives in shared memory with the tiles it goes with.
"""

# What @triton.jit makes of a function and of its launch is beyond a type checker.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .calls import Launch
from .decay import to_log2

FACTORS = tl.constexpr(4)
"""Rows of a chunk: G in base 2 (see decay.py), exp(G), exp(G_last - G), and exp(G_last) throughout.

In fp32 the last one is what the rounding of G left out; sums are in fp64 there, as in decay.py.
"""
CHUNKS_TO_A_PROGRAM = 16


@triton.jit(do_not_specialize=["g_b", "g_h", "g_t", "heads", "length", "chunks"])
def factors_kernel(
    g_ptr,
    factors_ptr,  # [B,H,chunks,FACTORS,CHUNK] fp32
    g_b,
    g_h,
    g_t,
    heads,
    length,
    chunks,
    CHUNK: tl.constexpr,
    MANY: tl.constexpr,
    EXACT: tl.constexpr,
):
    """One program per (batch and head, MANY chunks)."""
    groups = tl.cdiv(chunks, MANY)
    row = tl.program_id(0) // groups
    chunk = tl.program_id(0) % groups * MANY + tl.arange(0, MANY)[:, None]
    t = tl.arange(0, CHUNK)[None, :]
    token = chunk * CHUNK + t
    at = (row // heads).to(tl.int64) * g_b + (row % heads).to(tl.int64) * g_h + token.to(tl.int64) * g_t
    g = to_log2(tl.load(g_ptr + at, mask=token < length, other=0.0))
    wide = tl.cumsum(g.to(tl.float64) if EXACT else g, 1)
    last = tl.sum(tl.where(t == CHUNK - 1, wide, 0.0), 1)[:, None]
    sums, to_end = wide.to(tl.float32), (last - wide).to(tl.float32)
    to = factors_ptr + (row.to(tl.int64) * chunks + chunk) * (FACTORS * CHUNK) + t
    inside = chunk < chunks
    tl.store(to, sums, mask=inside)
    tl.store(to + CHUNK, tl.exp2(sums), mask=inside)
    tl.store(to + 2 * CHUNK, tl.exp2(to_end), mask=inside)
    rest = (wide - sums.to(wide.dtype)).to(tl.float32)
    tl.store(to + 3 * CHUNK, rest if EXACT else tl.exp2(last + tl.zeros_like(sums)), mask=inside)


def token_factors(log_decay: Tensor, chunk: int, exact: bool) -> Callable[[Tensor], Tensor]:
    """Makes of log-decays ``[B,H,N]`` like these ``[B,H,chunks,FACTORS,chunk]`` fp32; after token N, G stays.

    ``exact``: what they weigh is fp32.
    """
    batch, heads, length = log_decay.shape
    chunks = launch.blocks(length, chunk)
    run = Launch(
        factors_kernel, batch * heads * launch.blocks(chunks, CHUNKS_TO_A_PROGRAM), [None, None],
        [*log_decay.stride(), heads, length, chunks],
        {"CHUNK": chunk, "MANY": CHUNKS_TO_A_PROGRAM, "EXACT": exact}, {"num_warps": 4},
    )  # fmt: skip

    def factors(log_decay: Tensor) -> Tensor:
        made = torch.empty((batch, heads, chunks, FACTORS.value, chunk), dtype=torch.float32, device=log_decay.device)
        run(log_decay, made)
        return made

    return factors
