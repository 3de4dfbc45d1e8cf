"""The forward kernel (arXiv 2401.04658, algorithm 1): ``o = LA(q, k, v)`` and the final state."""

# What @triton.jit makes of a function and of its launch is beyond a type checker.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import cpu
from ..reference import head_count
from . import launch
from .body import attend
from .calls import Box, Calls, Launch, signature
from .decay import to_log2
from .segments import segment_states
from .selfcheck import Integers, equal, is_right
from .tiles import of_head


@triton.jit(
    do_not_specialize=[
        "q_b", "q_h", "q_t", "k_b", "k_h", "k_t", "v_b", "v_h", "v_t", "o_b", "o_h", "o_t", "g_b", "g_h", "g_t",
        "scale", "heads", "q_group", "k_group", "v_group", "length", "segment", "segments",
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
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    CHUNK: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    HAS_START: tl.constexpr,
    STORE_END: tl.constexpr,
    UNIT: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per (batch and head, segment, block of columns), the blocks of a head next to each other.

    Tensors ``[B,*,N,D]`` with strides in units of UNIT elements; states ``[B,H,segments,DK,DV]`` fp32, contiguous.
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
        start_ptr + (row * segments + part) * (DK * DV), end_ptr + row * (DK * DV),
        b, h // q_group, h // k_group, h // v_group, h, h,
        q_t * UNIT, k_t * UNIT, v_t * UNIT, o_t * UNIT, q_t * UNIT, g_t, g_head, scale,
        begin, stop, length, segment, part == segments - 1, block,
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
    narrow: str = "",
) -> tuple[Tensor, Tensor]:
    """Output ``[B,H,N,Dv]`` in q's dtype and layout, and the final state ``[B,H,Dk,Dv]`` fp32 (empty if not wanted).

    ``narrow``: which of q, k and v hold numbers of bf16 in whatever dtype they have.
    """
    with launch.on_device_of(q):
        q, k, v = launch.unit_last(q), launch.unit_last(k), launch.unit_last(v)
        initial_state = launch.dense_state(initial_state)
        key = signature(q, k, v, log_decay, initial_state), scale, want_state, narrow, launch.setting(q)
        call = CALLS.get(key, lambda: _prepare(q, k, v, log_decay, float(scale), initial_state, want_state, narrow))
        return call(q, k, v, log_decay, initial_state)


Call = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
CALLS: Calls[Call] = Calls()


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    want_state: bool,
    narrow: str,
) -> Call:
    """A function for tensors like these."""
    heads = head_count(q, k, v, log_decay, initial_state)
    batch, _, length, dk = q.shape
    dv = v.shape[3]
    per_token = log_decay.dim() == 3
    shape = (batch, heads, dk, dv) if want_state else (0,)
    o, state = launch.empty_like_q(q, heads, dv), torch.empty(shape, dtype=torch.float32, device=q.device)
    new_o, new_state = launch.Memory(o), launch.Memory(state)

    def nothing(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor]:
        state = new_state()
        return new_o(), state.zero_() if initial is None or not want_state else state.copy_(initial)

    if o.numel() == 0:
        return nothing
    tma = launch.use_tma(q, k, v, o)
    tiles, _ = launch.config("forward", dk, dv, q.dtype, q.device, tma, per_token)
    precision = launch.precision(q.dtype, q.device, tiles.body)
    exact = launch.is_exact(precision)
    programs = batch * heads * launch.blocks(dv, tiles.bv)
    split = launch.split(length, programs, q.device, tiles)
    states = None
    if split.count > 1:
        states = segment_states(k, v, log_decay, initial_state, split, precision, narrow)
    decay_strides, factors = launch.decay_strides(log_decay), None
    numbers = [
        scale, heads, heads // q.shape[1], heads // k.shape[1], heads // v.shape[1],
        length, split.tokens, split.count,
    ]  # fmt: skip
    constants = {
        "DK": dk, "DV": dv, "BK": tiles.bk, "BV": tiles.bv, "CHUNK": tiles.chunk, "PER_TOKEN": per_token,
        "HAS_START": states is not None or initial_state is not None, "STORE_END": want_state,
    }  # fmt: skip
    columns = ((q, tiles.bk), (k, tiles.bk), (v, tiles.bv), (o, tiles.bv))
    if tiles.body == "hopper":
        from .factors import token_factors
        from .hopper.forward import forward_kernel as kernel
        from .hopper.layouts import swizzled

        numbers = [decay_strides[1], *numbers]
        constants |= tiles.constants | launch.digits(q.dtype, narrow)
        boxes, options = [Box(x, tiles.chunk, n, swizzled(q.dtype)) for x, n in columns], tiles.options
        if per_token:
            factors = token_factors(log_decay, tiles.chunk, exact)
    else:
        by_descriptor = launch.portable_tma(tma, q.dtype)
        kernel, unit = forward_kernel, launch.unit(q, k, v, o)
        numbers = [*[s for x in (q, k, v, o) for s in launch.strides(x, unit)], *decay_strides, *numbers]
        constants |= {"UNIT": unit, "TMA": by_descriptor, "PRECISION": precision}
        boxes = [Box(x, tiles.chunk, n) if by_descriptor else None for x, n in columns]
        options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    run = Launch(kernel, programs * split.count, [*boxes, None, None, None], numbers, constants, options)

    def call(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor]:
        # Its scratch is free again before o is made.
        start = initial if states is None else states(k, v, log_decay, initial)[0]
        o, state = new_o(), new_state()
        decays = log_decay if factors is None else factors(log_decay)
        run(q, k, v, o, decays, state if start is None else start, state)
        return o, state

    def computes_integers() -> bool:
        known = Integers(dk, dv, q, per_token, aligned=tma, exact=exact, narrow=narrow)
        start = known.state if constants["HAS_START"] else None
        found = forward(known.q, known.k, known.v, known.log_decay, 1.0, start, want_state, narrow)
        return equal(found, known.outputs(start))

    said = constants["HAS_START"], want_state, precision, narrow
    kind = "forward", tiles, dk, dv, q.dtype, per_token, tma, *said, q.device
    if not is_right(kind, q.device, computes_integers):
        return lambda q, k, v, log_decay, initial: cpu.forward(q, k, v, log_decay, scale, initial, want_state)
    return call
