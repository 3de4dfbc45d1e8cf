"""The forward kernel (arXiv 2401.04658, algorithm 1): ``o = LA(q, k, v)`` and the final state."""

# What @triton.jit makes of a function and of its launch is beyond a type checker.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import head_count
from . import launch
from .body import attend
from .decay import to_log2
from .segments import segment_states
from .tiles import of_head


@triton.jit(
    do_not_specialize=[
        "q_b", "q_h", "q_t", "k_b", "k_h", "k_t", "v_b", "v_h", "v_t", "o_b", "o_h", "o_t", "g_b", "g_h", "g_t",
        "scale", "heads", "q_group", "k_group", "v_group", "length", "segment", "segments", "start_slots",
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
    q_b,
    q_h,
    q_t,
    k_b,
    k_h,
    k_t,
    v_b,
    v_h,
    v_t,
    o_b,
    o_h,
    o_t,
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
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    CHUNK: tl.constexpr,
    UNIT: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    HAS_START: tl.constexpr,
    STORE_END: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per (batch and head, segment, block of columns), the blocks of a head next to each other.

    Tensors ``[B,*,N,D]`` with strides in units of UNIT elements; states ``[B,H,slots,DK,DV]`` fp32, contiguous.
    """
    blocks: tl.constexpr = (DV + BV - 1) // BV
    pid = tl.program_id(0)
    block = pid % blocks
    part = (pid // blocks) % segments
    row = (pid // blocks) // segments
    b = row // heads
    h = row % heads
    row = row.to(tl.int64)
    q_at = of_head(q_source, b, h // q_group, q_b, q_h, UNIT, TMA)
    k_at = of_head(k_source, b, h // k_group, k_b, k_h, UNIT, TMA)
    v_at = of_head(v_source, b, h // v_group, v_b, v_h, UNIT, TMA)
    o_at = of_head(o_target, b, h, o_b, o_h, UNIT, TMA)
    g_at = g_ptr + b.to(tl.int64) * g_b + h.to(tl.int64) * g_h
    g_head = 0.0 if PER_TOKEN else to_log2(tl.load(g_at))
    begin = part * segment
    stop = tl.minimum(begin + segment, length)
    attend(
        q_at, k_at, v_at, o_at, q_at, end_ptr, end_ptr, g_at,
        start_ptr + (row * start_slots + part) * (DK * DV), end_ptr + row * (DK * DV),
        b, h // q_group, h // k_group, h // v_group, h, h,
        q_t * UNIT, k_t * UNIT, v_t * UNIT, o_t * UNIT, q_t * UNIT, g_t, g_head, scale,
        begin, stop, segment, part == segments - 1, block,
        DK=DK, DV=DV, BK=BK, BV=BV, CHUNK=CHUNK, REVERSE=False, PER_TOKEN=PER_TOKEN,
        HAS_START=HAS_START, STORE_END=STORE_END, TRANSPOSED=False, AUDIT=False, TMA=TMA, PRECISION=PRECISION,
    )  # fmt: skip


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    want_state: bool = True,
) -> tuple[Tensor, Tensor]:
    """Output ``[B,H,N,Dv]`` in q's dtype and layout, and the final state ``[B,H,Dk,Dv]`` fp32 (empty if not wanted)."""
    with torch.cuda.device_of(q):
        return _forward(q, k, v, log_decay, scale, initial_state, want_state)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float, initial_state: Tensor | None, want_state: bool
) -> tuple[Tensor, Tensor]:
    heads = head_count(q, k, v, log_decay, initial_state)
    batch, _, length, dk = q.shape
    dv = v.shape[3]
    o = launch.empty_like_q(q, heads, dv)
    shape = (batch, heads, dk, dv) if want_state else (0,)
    state = torch.empty(shape, dtype=torch.float32, device=q.device)
    if o.numel() == 0:
        return o, state.zero_() if initial_state is None or not want_state else state.copy_(initial_state)
    q, k, v = (launch.unit_last(x) for x in (q, k, v))
    initial_state = launch.dense_state(initial_state)
    c = launch.config(dk, dv, q.dtype)
    programs = batch * heads * launch.blocks(dv, c.bv)
    split = launch.plan(length, programs, launch.processors(q.device) * c.resident, launch.PREPASS_FORWARD)
    start, slots = initial_state, 1
    if split.count > 1:
        slots = split.count + 1
        start = segment_states(k, v, log_decay, 1.0, initial_state, split, reverse=False)
    unit = launch.unit(q, k, v, o)
    tma = launch.use_tma(q, k, v, o)
    boxes = [launch.source(x, tma, c.chunk, n) for x, n in ((q, c.bk), (k, c.bk), (v, c.bv), (o, c.bv))]
    forward_kernel[(programs * split.count,)](
        *boxes, log_decay, q if start is None else start, state,
        *launch.strides(q, unit), *launch.strides(k, unit), *launch.strides(v, unit), *launch.strides(o, unit),
        *launch.decay_strides(log_decay), float(scale), heads,
        heads // q.shape[1], heads // k.shape[1], heads // v.shape[1], length, split.tokens, split.count, slots,
        DK=dk, DV=dv, BK=c.bk, BV=c.bv, CHUNK=c.chunk, UNIT=unit, PER_TOKEN=log_decay.dim() == 3,
        HAS_START=start is not None, STORE_END=want_state, TMA=tma, PRECISION=launch.precision(q.dtype),
        num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    return o, state
