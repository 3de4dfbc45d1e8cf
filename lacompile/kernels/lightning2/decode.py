"""A few tokens against a state: one kernel that decays it, adds to it and reads it, each state element moved once.

For so few tokens the state is all the traffic. The chunked kernels would round it to 16 bits for the tensor cores and
walk over it in tiles made for long sequences; here it stays in fp32 registers while the tokens pass one by one.
"""

# What @triton.jit makes of a function and of its launch is beyond a type checker.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import triton
import triton.language as tl
from torch import Tensor

from ..reference import head_count
from ..tuning.space import next_power_of_2
from . import launch
from .calls import Calls, Launch, signature
from .decay import to_log2

MAX_TOKENS = 16
"""Longer inputs go to the chunked kernels, whose products the tensor cores form."""


@triton.jit(
    do_not_specialize=[
        "q_b", "q_h", "q_t", "k_b", "k_h", "k_t", "v_b", "v_h", "v_t", "o_b", "o_h", "o_t", "g_b", "g_h", "g_t",
        "scale", "heads", "q_group", "k_group", "v_group", "length",
    ]
)  # fmt: skip
def decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    g_ptr,
    start_ptr,  # states before the first token, if HAS_START
    end_ptr,  # states after the last one, if STORE_END; may be the same memory
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
    s_b,  # of the states: that one is 1 and the others multiples of 16 is what makes wide loads
    s_h,
    s_k,
    s_v,
    e_b,
    e_h,
    e_k,
    e_v,
    scale,
    heads,
    q_group,
    k_group,
    v_group,
    length,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    HAS_START: tl.constexpr,
    STORE_END: tl.constexpr,
):
    """One program per (batch and head, block of columns of the state), the blocks of a head next to each other.

    Tensors ``[B,*,N,D]`` whose last stride is 1, states ``[B,H,DK,DV]`` of any strides.
    """
    blocks: tl.constexpr = (DV + BV - 1) // BV
    pid = tl.program_id(0)
    row = pid // blocks
    b = (row // heads).to(tl.int64)
    h = (row % heads).to(tl.int64)
    k_at = tl.arange(0, BK).to(tl.int64)
    v_at = (pid % blocks * BV + tl.arange(0, BV)).to(tl.int64)
    in_k = k_at < DK
    in_v = v_at < DV
    inside = in_k[:, None] & in_v[None, :]
    if HAS_START:
        at = k_at[:, None] * s_k + v_at[None, :] * s_v
        state = tl.load(start_ptr + b * s_b + h * s_h + at, mask=inside, other=0.0).to(tl.float32)
    else:
        state = tl.zeros([BK, BV], tl.float32)
    q_from = q_ptr + b * q_b + h // q_group * q_h
    k_from = k_ptr + b * k_b + h // k_group * k_h
    v_from = v_ptr + b * v_b + h // v_group * v_h
    g_from = g_ptr + b * g_b + h * g_h
    o_from = o_ptr + b * o_b + h * o_h
    q = tl.load(q_from + k_at, mask=in_k, other=0.0)
    k = tl.load(k_from + k_at, mask=in_k, other=0.0)
    v = tl.load(v_from + v_at, mask=in_v, other=0.0)
    factor = tl.exp2(to_log2(tl.load(g_from)))
    for t in range(length):
        q_row, k_row, v_row, decay = q.to(tl.float32), k.to(tl.float32), v.to(tl.float32), factor
        # The next token is asked for before this one is worked on; behind the last one there is none, so that again.
        more = (t + 1 < length).to(tl.int32)
        q_from += more * q_t
        k_from += more * k_t
        v_from += more * v_t
        q = tl.load(q_from + k_at, mask=in_k, other=0.0)
        k = tl.load(k_from + k_at, mask=in_k, other=0.0)
        v = tl.load(v_from + v_at, mask=in_v, other=0.0)
        if PER_TOKEN:
            g_from += more * g_t
            factor = tl.exp2(to_log2(tl.load(g_from)))
        state = state * decay + k_row[:, None] * v_row[None, :]
        o = tl.sum(q_row[:, None] * state, 0) * scale
        tl.store(o_from + v_at, o.to(o_ptr.dtype.element_ty), mask=in_v)
        o_from += o_t
    if STORE_END:
        at = k_at[:, None] * e_k + v_at[None, :] * e_v
        tl.store(end_ptr + b * e_b + h * e_h + at, state, mask=inside)


@cache
def tile(dk: int, dv: int) -> tuple[int, int, int]:
    """(BK, BV, warps) of a program: all rows of the state and columns for 16 KiB of it.

    Rows of at least 128 bytes, a line of the cache. 64 registers of a thread hold the state, and eight programs share
    a multiprocessor, so that the loads of one overlap the stores of another.
    """
    bk = max(16, next_power_of_2(dk))
    bv = max(16, min(next_power_of_2(dv), max(32, 4096 // bk)))
    return bk, bv, max(1, min(8, bk * bv // 2048))


def is_short(q: Tensor, v: Tensor) -> bool:
    """Whether :func:`attend_short` serves a call: there are tokens, and few of them."""
    return 0 < q.shape[2] <= MAX_TOKENS and q.numel() > 0 and v.numel() > 0


def attend_short(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    start: Tensor | None,
    end: Tensor | None,
) -> Tensor:
    """Output ``[B,H,N,Dv]`` in q's dtype and layout.

    Args:
        q, k, v, log_decay, scale: as in :func:`lacompile.decayed_attention`.
        start: states before the first token ``[B,H,Dk,Dv]``, any float dtype and strides; zero if not given.
        end: fp32 memory for the states after the last token, or None. It may be ``start``.
    """
    with launch.on_device_of(q):
        q, k, v = launch.unit_last(q), launch.unit_last(k), launch.unit_last(v)
        key = signature(q, k, v, log_decay, start, end), scale
        call = CALLS.get(key, lambda: _prepare(q, k, v, log_decay, float(scale), start, end))
        return call(q, k, v, log_decay, start, end)


Call = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
CALLS: Calls[Call] = Calls()


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float, start: Tensor | None, end: Tensor | None
) -> Call:
    """A function for tensors like these."""
    heads = head_count(q, k, v, log_decay, start)
    batch, _, length, dk = q.shape
    dv = v.shape[3]
    o = launch.empty_like_q(q, heads, dv)
    new_o = launch.Memory(o)
    bk, bv, warps = tile(dk, dv)
    nowhere = (0, 0, 0, 0)
    numbers = [
        *(s for x in (q, k, v, o) for s in x.stride()[:3]), *launch.decay_strides(log_decay),
        *(nowhere if start is None else start.stride()), *(nowhere if end is None else end.stride()),
        scale, heads, heads // q.shape[1], heads // k.shape[1], heads // v.shape[1], length,
    ]  # fmt: skip
    constants = {
        "DK": dk, "DV": dv, "BK": bk, "BV": bv, "PER_TOKEN": log_decay.dim() == 3,
        "HAS_START": start is not None, "STORE_END": end is not None,
    }  # fmt: skip
    programs = batch * heads * launch.blocks(dv, bv)
    run = Launch(decode_kernel, programs, [None] * 7, numbers, constants, {"num_warps": warps})

    def call(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, start: Tensor | None, end: Tensor | None) -> Tensor:
        o = new_o()
        run(q, k, v, o, log_decay, q if start is None else start, o if end is None else end)
        return o

    return call
