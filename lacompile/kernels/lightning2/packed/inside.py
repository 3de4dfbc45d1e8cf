"""What pairs of tokens of one chunk add to the gradient of the log-decays between them, as in :mod:`..inside`."""

# What @triton.jit makes of a function and of its launch is beyond a type checker.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from ..decay import to_log2
from ..inside import BLOCK, inside_chunk, warps
from .pieces import Pieces, piece_at


@triton.jit(
    do_not_specialize=[
        "q_h", "q_t", "k_h", "k_t", "v_h", "v_t", "do_h", "do_t", "g_h", "g_t", "scale", "heads", "q_group",
        "k_group", "v_group", "length", "chunks",
    ]
)  # fmt: skip
def packed_inside_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    g_ptr,
    table_ptr,
    firsts_ptr,
    out_ptr,  # [H, N] fp32
    q_h,
    q_t,
    k_h,
    k_t,
    v_h,
    v_t,
    do_h,
    do_t,
    g_h,
    g_t,
    scale,
    heads,
    q_group,
    k_group,
    v_group,
    length,
    chunks,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    UNIT: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per (piece, head, chunk). Tensors ``[1,*,N,D]`` with strides in units of UNIT elements."""
    pid = tl.program_id(0)
    at = pid % chunks * CHUNK
    h = pid // chunks % heads
    _, begin, size, _, _ = piece_at(table_ptr, firsts_ptr, pid // chunks // heads)
    if at < size:
        row = h.to(tl.int64)
        g = g_ptr + row * g_h + begin * g_t
        inside_chunk(
            q_ptr + (row // q_group * q_h + begin * q_t) * UNIT, k_ptr + (row // k_group * k_h + begin * k_t) * UNIT,
            v_ptr + (row // v_group * v_h + begin * v_t) * UNIT, do_ptr + (row * do_h + begin * do_t) * UNIT,
            g, out_ptr + row * length + begin, q_t * UNIT, k_t * UNIT, v_t * UNIT, do_t * UNIT, g_t,
            0.0 if PER_TOKEN else to_log2(tl.load(g)), scale, at, size,
            DK=DK, DV=DV, BLOCK=BLOCK, CHUNK=CHUNK, PER_TOKEN=PER_TOKEN, PRECISION=PRECISION,
            NARROW=False,
        )  # fmt: skip


def packed_inside(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, log_decay: Tensor, scale: float, chunk: int, pieces: Pieces
) -> Tensor:
    """What is inside chunks of ``chunk`` tokens of each piece, ``[H, N]`` fp32."""
    tensors = q, k, v, do
    _, heads, length, dv = do.shape
    unit, chunks = launch.unit(*tensors), launch.blocks(pieces.tokens, chunk)
    out = torch.empty((heads, length), dtype=torch.float32, device=q.device)
    packed_inside_kernel[(pieces.count * heads * chunks,)](
        *tensors, log_decay, pieces.table, pieces.firsts, out,
        *(s for x in tensors for s in launch.strides(x, unit)[1:]), *launch.decay_strides(log_decay)[1:],
        float(scale), heads, *(heads // x.shape[1] for x in (q, k, v)), length, chunks,
        DK=q.shape[3], DV=dv, BLOCK=BLOCK, CHUNK=chunk, UNIT=unit, PER_TOKEN=log_decay.dim() == 3,
        PRECISION=launch.precision(q.dtype, q.device), num_warps=warps(chunk),
    )  # fmt: skip
    return out
