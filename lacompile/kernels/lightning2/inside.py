"""What pairs of tokens of one chunk add to the gradient of the log-decays between them, in fp32: a sum for each gate.

Such pairs are in ``q . dq`` and in ``k . dk`` alike. Where a state is soon forgotten they are most of both, and what is
left of their difference is less than its rounding. So the row sums of body.py leave them out where inputs are fp32.
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
from .decay import between, chunk_sums, to_log2
from .tiles import of_head, read

BLOCK = 32
"""Columns that are contracted at a time."""


def warps(chunk: int) -> int:
    """One for every 16 tokens, which are what a warp's product takes."""
    return chunk // 16


@triton.jit
def inside_chunk(
    q_source,  # as in tiles.py, of one head
    k_source,
    v_source,
    do_source,
    g_ptr,  # log-decays from token 0 on if PER_TOKEN
    out_ptr,  # [N] fp32
    q_stride,
    k_stride,
    v_stride,
    do_stride,
    g_stride,
    g_head,
    scale,
    at,
    stop,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    PRECISION: tl.constexpr,
    NARROW: tl.constexpr,
):
    """For each token t of ``[at, at + CHUNK)`` the sum over s < t <= u, all of one chunk, of what s adds to row u.

    NARROW: q and k are fp32 and hold numbers of bf16.
    """
    alike = tl.zeros([CHUNK, CHUNK], tl.float32)
    for column in range(0, DK, BLOCK):
        q = read(q_source, 0, 0, q_stride, at, stop, column, CHUNK, BLOCK, DK, False)
        k = read(k_source, 0, 0, k_stride, at, stop, column, CHUNK, BLOCK, DK, False)
        if NARROW:
            alike = tl.dot(q.to(tl.bfloat16), tl.trans(k.to(tl.bfloat16)), alike)
        else:
            alike = tl.dot(q, tl.trans(k), alike, input_precision=PRECISION)
    wanted = tl.zeros([CHUNK, CHUNK], tl.float32)
    for column in range(0, DV, BLOCK):
        do = read(do_source, 0, 0, do_stride, at, stop, column, CHUNK, BLOCK, DV, False)
        v = read(v_source, 0, 0, v_stride, at, stop, column, CHUNK, BLOCK, DV, False)
        wanted = tl.dot(do, tl.trans(v), wanted, input_precision=PRECISION)
    sums, rest, _, _ = chunk_sums(g_ptr, g_stride, at, stop, g_head, CHUNK, PER_TOKEN, True)
    pairs = alike * wanted * (between(sums, rest, g_head, False, CHUNK, PER_TOKEN, True) * scale)
    t = tl.arange(0, CHUNK)
    from_here = tl.cumsum(pairs, 0, reverse=True)
    across = tl.sum(tl.where(t[:, None] > t[None, :], from_here, 0.0), 1)
    tl.store(out_ptr + at.to(tl.int64) + t, across, mask=t < stop - at)


@triton.jit(
    do_not_specialize=[
        "q_b", "q_h", "q_t", "k_b", "k_h", "k_t", "v_b", "v_h", "v_t", "do_b", "do_h", "do_t", "g_b", "g_h", "g_t",
        "scale", "heads", "q_group", "k_group", "v_group", "length",
    ]
)  # fmt: skip
def inside_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    g_ptr,
    out_ptr,  # [rows, N] fp32
    q_b,
    q_h,
    q_t,
    k_b,
    k_h,
    k_t,
    v_b,
    v_h,
    v_t,
    do_b,
    do_h,
    do_t,
    g_b,
    g_h,
    g_t,
    scale,
    heads,
    q_group,
    k_group,
    v_group,
    length,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    UNIT: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    PRECISION: tl.constexpr,
    NARROW: tl.constexpr,
):
    """One program per (batch and head, chunk). Tensors ``[B,*,N,D]`` with strides in units of UNIT elements."""
    chunks = tl.cdiv(length, CHUNK)
    row = tl.program_id(0) // chunks
    b = row // heads
    h = row % heads
    g_at = g_ptr + b.to(tl.int64) * g_b + h.to(tl.int64) * g_h
    inside_chunk(
        of_head(q_ptr, b, h // q_group, q_b, q_h, UNIT, False), of_head(k_ptr, b, h // k_group, k_b, k_h, UNIT, False),
        of_head(v_ptr, b, h // v_group, v_b, v_h, UNIT, False), of_head(do_ptr, b, h, do_b, do_h, UNIT, False),
        g_at, out_ptr + row.to(tl.int64) * length, q_t * UNIT, k_t * UNIT, v_t * UNIT, do_t * UNIT, g_t,
        0.0 if PER_TOKEN else to_log2(tl.load(g_at)), scale, tl.program_id(0) % chunks * CHUNK, length,
        DK=DK, DV=DV, BLOCK=BLOCK, CHUNK=CHUNK, PER_TOKEN=PER_TOKEN, PRECISION=PRECISION,
        NARROW=NARROW,
    )  # fmt: skip


def inside(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    log_decay: Tensor,
    scale: float,
    chunk: int,
    precision: str,
    narrow: str,
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Makes of q, k, v, do and log-decays like these what is inside chunks of ``chunk`` tokens, ``[B * H, N]`` fp32.

    ``narrow`` is as in forward.py.
    """
    tensors = q, k, v, do
    batch, heads, length, dv = do.shape
    unit = launch.unit(*tensors)
    numbers = [*[s for x in tensors for s in launch.strides(x, unit)], *launch.decay_strides(log_decay)]
    numbers += [scale, heads, *(heads // x.shape[1] for x in (q, k, v)), length]
    run = Launch(
        inside_kernel, batch * heads * launch.blocks(length, chunk), [None] * 6, numbers,
        {"DK": q.shape[3], "DV": dv, "BLOCK": BLOCK, "CHUNK": chunk, "UNIT": unit, "PER_TOKEN": log_decay.dim() == 3,
         "PRECISION": precision, "NARROW": launch.saves(precision, narrow, "qk")},
        {"num_warps": warps(chunk)},
    )  # fmt: skip

    def pairs(q: Tensor, k: Tensor, v: Tensor, do: Tensor, log_decay: Tensor) -> Tensor:
        out = torch.empty((batch * heads, length), dtype=torch.float32, device=q.device)
        run(q, k, v, do, log_decay, out)
        return out

    return pairs
