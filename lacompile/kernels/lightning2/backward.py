"""The backward kernel (arXiv 2401.04658, algorithm 2): all three gradients as uses of one body, in one launch."""

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
from ..tuning.space import next_power_of_2
from . import launch
from .body import attend
from .calls import Box, Calls, Launch, signature
from .decay import to_log2
from .decay_grad import decay_grad
from .inside import inside
from .segments import Backwards, segment_states
from .selfcheck import Integers, equal, is_right
from .tiles import of_head


@triton.jit(
    do_not_specialize=[
        "q_b", "q_h", "q_t", "k_b", "k_h", "k_t", "v_b", "v_h", "v_t", "do_b", "do_h", "do_t",
        "dq_b", "dq_h", "dq_t", "dk_b", "dk_h", "dk_t", "dv_b", "dv_h", "dv_t", "g_b", "g_h", "g_t",
        "scale", "rows", "heads", "q_group", "k_group", "v_group", "length", "segment", "segments", "span",
    ]
)  # fmt: skip
def backward_kernel(
    q_full,  # tiles of all columns, as in tiles.py
    k_full,
    v_full,
    do_full,
    q_part,  # tiles of a block of columns
    k_part,
    do_part,
    dq_part,
    dk_part,
    dv_part,
    g_ptr,
    q_rows_ptr,  # [blocks, rows, N] fp32: sums of q * dq over a block's columns, as in body.py
    k_rows_ptr,  # the same of k * dk
    start_ptr,  # [rows, segments, DK, DV] fp32: states before each segment
    d_start_ptr,  # [rows, segments, DK, DV] fp32: gradients of the states after each segment
    marks_ptr,  # [rows, spans, DK, DV]: states after each span of tokens
    d_marks_ptr,  # the same: gradients of the states before each span
    d_end_ptr,  # [rows, DK, DV] fp32: gradient of the initial state
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
    dq_b,
    dq_h,
    dq_t,
    dk_b,
    dk_h,
    dk_t,
    dv_b,
    dv_h,
    dv_t,
    g_b,
    g_h,
    g_t,
    scale,
    rows,
    heads,
    q_group,
    k_group,
    v_group,
    length,
    segment,
    segments,
    span,
    DK: tl.constexpr,
    DV: tl.constexpr,
    K_FULL: tl.constexpr,  # blocks of a contraction over DK and over DV, of columns out of DK and out of DV
    V_FULL: tl.constexpr,
    K_PART: tl.constexpr,
    V_PART: tl.constexpr,
    CHUNK: tl.constexpr,
    UNIT: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_D_START: tl.constexpr,
    STORE_D_END: tl.constexpr,
    DECAY_GRAD: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per (batch and head, segment, gradient, block of columns), those of one segment next to each other.

    Tensors ``[B,*,N,D]`` with strides in units of UNIT elements; dq, dk and dv have all H heads.
    """
    k_blocks: tl.constexpr = (DK + K_PART - 1) // K_PART
    v_blocks: tl.constexpr = (DV + V_PART - 1) // V_PART
    uses: tl.constexpr = 2 * k_blocks + v_blocks
    pid = tl.program_id(0)
    use = pid % uses
    part = (pid // uses) % segments
    row = (pid // uses) // segments
    b = row // heads
    h = row % heads
    row = row.to(tl.int64)
    q_from = h // q_group
    k_from = h // k_group
    v_from = h // v_group
    g_at = g_ptr + b.to(tl.int64) * g_b + h.to(tl.int64) * g_h
    g_head = 0.0 if PER_TOKEN else to_log2(tl.load(g_at))
    begin = part * segment
    stop = tl.minimum(begin + segment, length)
    start_at = start_ptr + (row * segments + part) * (DK * DV)
    d_start_at = d_start_ptr + (row * segments + part) * (DK * DV)
    marks = row * tl.cdiv(length, span) * (DK * DV)
    if use < k_blocks:
        attend(
            of_head(do_full, b, h, do_b, do_h, UNIT, TMA), of_head(v_full, b, v_from, v_b, v_h, UNIT, TMA),
            of_head(k_part, b, k_from, k_b, k_h, UNIT, TMA), of_head(dq_part, b, h, dq_b, dq_h, UNIT, TMA),
            of_head(q_part, b, q_from, q_b, q_h, UNIT, TMA),
            q_rows_ptr + (use * rows + row) * length, marks_ptr + marks, g_at, start_at, d_end_ptr,
            b, h, v_from, k_from, h, q_from,
            do_t * UNIT, v_t * UNIT, k_t * UNIT, dq_t * UNIT, q_t * UNIT, g_t, g_head, scale,
            begin, stop, length, span, False, use,
            DK=DV, DV=DK, BK=V_FULL, BV=K_PART, CHUNK=CHUNK, REVERSE=False, PER_TOKEN=PER_TOKEN,
            HAS_START=HAS_START, STORE_END=False, TRANSPOSED=True, AUDIT=DECAY_GRAD, TMA=TMA, PRECISION=PRECISION,
        )  # fmt: skip
    elif use < 2 * k_blocks:
        attend(
            of_head(v_full, b, v_from, v_b, v_h, UNIT, TMA), of_head(do_full, b, h, do_b, do_h, UNIT, TMA),
            of_head(q_part, b, q_from, q_b, q_h, UNIT, TMA), of_head(dk_part, b, h, dk_b, dk_h, UNIT, TMA),
            of_head(k_part, b, k_from, k_b, k_h, UNIT, TMA),
            k_rows_ptr + ((use - k_blocks) * rows + row) * length, d_marks_ptr + marks, g_at, d_start_at, d_end_ptr,
            b, v_from, h, q_from, h, k_from,
            v_t * UNIT, do_t * UNIT, q_t * UNIT, dk_t * UNIT, k_t * UNIT, g_t, g_head, scale,
            begin, stop, length, span, False, use - k_blocks,
            DK=DV, DV=DK, BK=V_FULL, BV=K_PART, CHUNK=CHUNK, REVERSE=True, PER_TOKEN=PER_TOKEN,
            HAS_START=HAS_D_START, STORE_END=False, TRANSPOSED=True, AUDIT=DECAY_GRAD, TMA=TMA, PRECISION=PRECISION,
        )  # fmt: skip
    else:
        attend(
            of_head(k_full, b, k_from, k_b, k_h, UNIT, TMA), of_head(q_full, b, q_from, q_b, q_h, UNIT, TMA),
            of_head(do_part, b, h, do_b, do_h, UNIT, TMA), of_head(dv_part, b, h, dv_b, dv_h, UNIT, TMA), do_part,
            q_rows_ptr, marks_ptr, g_at, d_start_at, d_end_ptr + row * (DK * DV),
            b, k_from, q_from, h, h, h,
            k_t * UNIT, q_t * UNIT, do_t * UNIT, dv_t * UNIT, do_t * UNIT, g_t, g_head, scale,
            begin, stop, length, span, part == 0, use - 2 * k_blocks,
            DK=DK, DV=DV, BK=K_FULL, BV=V_PART, CHUNK=CHUNK, REVERSE=True, PER_TOKEN=PER_TOKEN,
            HAS_START=HAS_D_START, STORE_END=STORE_D_END, TRANSPOSED=False, AUDIT=False, TMA=TMA, PRECISION=PRECISION,
        )  # fmt: skip


def backward(
    do: Tensor,
    d_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    want_decay: bool = True,
    narrow: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v (in their dtype), of log_decay and of the initial state (fp32).

    Without ``want_decay`` the gradient of log_decay is empty and costs nothing, without an initial state its gradient
    is. ``narrow`` is as in forward.py.
    """
    with launch.on_device_of(q):
        q, k, v, do = launch.unit_last(q), launch.unit_last(k), launch.unit_last(v), launch.unit_last(do)
        initial_state, d_state = launch.dense_state(initial_state), launch.dense_state(d_state)
        given = do, d_state, q, k, v, log_decay, initial_state
        key = signature(*given), scale, want_decay, narrow, launch.setting(q)
        return CALLS.get(key, lambda: _prepare(*given, float(scale), want_decay, narrow))(*given)


Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Call = Callable[[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor, Tensor | None], Gradients]
CALLS: Calls[Call] = Calls()


def _prepare(
    do: Tensor,
    d_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    scale: float,
    want_decay: bool,
    narrow: str,
) -> Call:
    """A function for tensors like these."""
    heads = head_count(q, k, v, log_decay, initial_state)
    batch, _, length, dk = q.shape
    dv = v.shape[3]
    own_heads = q.shape[1], k.shape[1], v.shape[1]
    per_token, has_start = log_decay.dim() == 3, initial_state is not None
    rows, span = batch * heads, launch.span(per_token, q, v)
    dq, dk_, dv_ = (launch.grad_like(x, heads) for x in (q, k, v))
    new_gradients = [launch.Memory(x) for x in (dq, dk_, dv_)]
    none = torch.empty(0, dtype=torch.float32, device=q.device)

    def finished(dq: Tensor, dk: Tensor, dv: Tensor, d_decay: Tensor, d_initial: Tensor) -> Gradients:
        dq, dk, dv = (launch.fold(g, n) for g, n in zip((dq, dk, dv), own_heads, strict=True))
        return dq, dk, dv, d_decay, d_initial if has_start else none

    end_shape = batch, heads, dk, dv
    if rows * length == 0:
        return lambda do, d_end, q, k, v, log_decay, initial: finished(
            *(new() for new in new_gradients), torch.zeros(log_decay.shape if want_decay else (0,), device=q.device),
            torch.zeros(end_shape, device=q.device) if d_end is None else d_end.clone(),
        )  # fmt: skip

    tma = launch.use_tma(q, k, v, do, dq, dk_, dv_)
    for_v, for_k = launch.config("backward", dk, dv, q.dtype, q.device, tma, per_token, want_decay)
    chunk, precision = min(for_k.chunk, for_v.chunk), launch.precision(q.dtype, q.device, for_v.body)
    exact = launch.is_exact(precision)
    k_blocks, v_blocks = launch.blocks(dk, for_k.bv), launch.blocks(dv, for_v.bv)
    programs = rows * (2 * k_blocks + v_blocks)
    split = launch.split(length, programs, q.device, for_v, uses=3)
    states = None
    if split.count > 1:
        states = segment_states(
            k, v, log_decay, initial_state, split, precision, narrow, Backwards(q, do, d_state, scale)
        )
    # Whoever starts from a state stores one, so that the self-check runs this very kernel. And Triton 3.6 pipelines
    # heads of 256 into more shared memory than there is unless the last state is stored.
    starts = states is not None or has_start
    store_end = starts or next_power_of_2(max(dk, dv)) == 256
    decay_strides, factors = launch.decay_strides(log_decay), None
    numbers = [
        scale, rows, heads, *(heads // n for n in own_heads), length,
        split.tokens, split.count, span,
    ]  # fmt: skip
    constants = {
        "DK": dk, "DV": dv, "CHUNK": chunk, "PER_TOKEN": per_token,
        "HAS_START": starts, "HAS_D_START": states is not None or d_state is not None,
        "STORE_D_END": store_end, "DECAY_GRAD": want_decay,
    }  # fmt: skip
    columns = [(q, for_v.bk), (k, for_v.bk), (v, for_k.bk), (do, for_k.bk)]
    columns += [(q, for_k.bv), (k, for_k.bv), (do, for_v.bv), (dq, for_k.bv), (dk_, for_k.bv), (dv_, for_v.bv)]
    if for_v.body == "hopper":
        from .factors import token_factors
        from .hopper.backward import backward_kernel as kernel
        from .hopper.layouts import swizzled

        numbers = [decay_strides[1], *numbers]
        constants |= {"K_FULL": for_v.bk, "V_FULL": for_k.bk, "BV": for_v.bv} | for_v.constants
        constants |= launch.digits(q.dtype, narrow)
        boxes, options = [Box(x, chunk, n, swizzled(q.dtype)) for x, n in columns], for_v.options
        if per_token:
            factors = token_factors(log_decay, chunk, exact)
    else:
        by_descriptor = launch.portable_tma(tma, q.dtype)
        tensors = q, k, v, do, dq, dk_, dv_
        kernel, unit = backward_kernel, launch.unit(*tensors)
        numbers = [*[s for x in tensors for s in launch.strides(x, unit)], *decay_strides, *numbers]
        constants |= {"K_FULL": for_v.bk, "V_FULL": for_k.bk, "K_PART": for_k.bv, "V_PART": for_v.bv, "UNIT": unit}
        constants |= {"TMA": by_descriptor, "PRECISION": precision}
        boxes = [Box(x, chunk, n) if by_descriptor else None for x, n in columns]
        options = {"num_warps": max(for_k.warps, for_v.warps), "num_stages": min(for_k.stages, for_v.stages)}
    run = Launch(kernel, programs * split.count, [*boxes, *[None] * 8], numbers, constants, options)
    rows_shape, marks_shape = (k_blocks, rows, length), (rows, launch.blocks(length, span), dk, dv)
    d_decays = insides = None
    if want_decay:
        d_decays = decay_grad(log_decay, rows_shape, marks_shape, span, exact, has_start, d_state is not None)
        insides = inside(q, k, v, do, log_decay, scale, chunk, precision, narrow) if exact else None

    def call(
        do: Tensor, d_end: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, initial: Tensor | None
    ) -> Gradients:
        start, d_start = initial, d_end
        if states is not None:  # their scratch is free again before the gradients are made
            start, d_start = states(k, v, log_decay, initial, q, do, d_end)
        dq, dk, dv = (new() for new in new_gradients)
        d_initial = torch.empty(end_shape, dtype=torch.float32, device=q.device) if store_end else none
        q_rows = k_rows = marks = d_marks = none
        if want_decay:
            q_rows, k_rows = (torch.empty(rows_shape, dtype=torch.float32, device=q.device) for _ in range(2))
            marks, d_marks = (torch.empty(marks_shape, dtype=torch.float32, device=q.device) for _ in range(2))
        decays = log_decay if factors is None else factors(log_decay)
        run(
            q, k, v, do, q, k, do, dq, dk, dv, decays, q_rows, k_rows, q_rows if start is None else start,
            q_rows if d_start is None else d_start, marks, d_marks, d_initial,
        )  # fmt: skip
        d_decay = none
        if d_decays is not None:
            pairs = none if insides is None else insides(q, k, v, do, log_decay)
            d_decay = d_decays(q_rows, k_rows, pairs, marks, d_marks, initial, d_end)
        return finished(dq, dk, dv, d_decay, d_initial)

    def computes_integers() -> bool:
        known = Integers(dk, dv, q, per_token, aligned=tma, exact=exact, narrow=narrow)
        start = known.state if constants["HAS_START"] else None
        d_end = known.d_end if constants["HAS_D_START"] else None
        *found, d_decay, d_start = backward(
            known.do, d_end, known.q, known.k, known.v, known.log_decay, 1.0, start, want_decay, narrow
        )
        return equal([*found, d_decay, d_start], known.gradients(start, d_end))

    kind = "backward", for_k, for_v, q.dtype, tma, *constants.values(), q.device
    if not is_right(kind, q.device, computes_integers):
        return lambda do, d_end, q, k, v, log_decay, initial: cpu.backward(
            do, d_end, q, k, v, log_decay, scale, initial, want_decay
        )
    return call
