"""The operator's contract: schema, shapes, strides and derivatives. Implementations are imported when they run.

``torch.ops.lacompile.decayed_attention`` and its backward are opaque to Inductor. On CPU that is also the faster
choice: unrolled into the graph, the chunk loop would cost compile time that grows with the length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import BadArgument


def _heads(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None) -> int:
    from .kernels.reference import head_count

    return head_count(q, k, v, log_decay, state)


def _state_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _output_like(q: Tensor, heads: int, dv: int) -> Tensor:
    """o ``[B,H,N,Dv]`` laid out like q: tokens before heads in memory if q's are, so that merging heads costs nothing."""
    batch, _, length, _ = q.shape
    if q.stride(1) < q.stride(2):
        return q.new_empty(batch, length, heads, dv).transpose(1, 2)
    return q.new_empty(batch, heads, length, dv)


@torch.library.custom_op("lacompile::decayed_attention", mutates_args=())
def decayed_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    return_final_state: bool,
) -> tuple[Tensor, Tensor]:
    """The fused operator; see :func:`decayed_attention`. The state is an empty tensor unless asked for."""
    from .kernels.select import implementation

    out, state = implementation(q.device.type).forward(q, k, v, log_decay, scale, initial_state)
    o = _output_like(q, out.shape[1], out.shape[3]).copy_(out)
    return o, state if return_final_state else state.new_empty(0)


@decayed_attention_op.register_fake
def _(q, k, v, log_decay, scale, initial_state, return_final_state):  # type: ignore[no-untyped-def]
    heads = _heads(q, k, v, log_decay, initial_state)
    dtype = _state_dtype(q)
    shape = (q.shape[0], heads, q.shape[3], v.shape[3]) if return_final_state else (0,)
    return _output_like(q, heads, v.shape[3]), q.new_empty(shape, dtype=dtype)


@torch.library.custom_op("lacompile::decayed_attention_backward", mutates_args=())
def decayed_attention_backward_op(
    do: Tensor,
    d_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay and the initial state (an empty tensor where there is none)."""
    from .kernels.select import implementation

    dq, dk, dv, dg, ds = implementation(q.device.type).backward(
        do, d_state, q, k, v, log_decay, scale, initial_state
    )
    grads = [torch.empty_like(x).copy_(g) for x, g in ((q, dq), (k, dk), (v, dv), (log_decay, dg))]
    d_initial = q.new_empty(0) if initial_state is None else torch.empty_like(initial_state).copy_(ds)
    return grads[0], grads[1], grads[2], grads[3], d_initial


@decayed_attention_backward_op.register_fake
def _(do, d_state, q, k, v, log_decay, scale, initial_state):  # type: ignore[no-untyped-def]
    d_initial = q.new_empty(0) if initial_state is None else torch.empty_like(initial_state)
    return (*(torch.empty_like(x) for x in (q, k, v, log_decay)), d_initial)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, log_decay, scale, initial_state, return_final_state = inputs
    ctx.save_for_backward(q, k, v, log_decay, initial_state)
    ctx.scale, ctx.return_final_state = scale, return_final_state


def _backward(ctx: Any, do: Tensor, d_state: Tensor | None) -> tuple[Any, ...]:
    q, k, v, log_decay, initial_state = ctx.saved_tensors
    if not ctx.return_final_state:
        d_state = None
    dq, dk, dv, dg, ds = decayed_attention_backward_op(do, d_state, q, k, v, log_decay, ctx.scale, initial_state)
    return dq, dk, dv, dg, None, ds if initial_state is not None else None, None


decayed_attention_op.register_autograd(_backward, setup_context=_setup_context)


def decayed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Decayed causal linear attention: ``S_t = exp(g_t) S_{t-1} + k_t^T v_t``, ``o_t = scale q_t S_t``.

    Lightning Attention-2, arXiv 2401.04658. Gradients flow to every tensor argument.

    Args:
        q: queries ``[B,Hq,N,Dk]``; any strides.
        k: keys ``[B,Hk,N,Dk]``.
        v: values ``[B,Hv,N,Dv]``. Each of q, k, v may have fewer heads, dividing H.
        log_decay: natural logarithm of the decay, at most 0: ``[H]`` for one per head, ``[B,H,N]`` for one per token.
        scale: factor of the output.
        initial_state: ``[B,H,Dk,Dv]``, the state before the first token.
        return_final_state: also return the state after the last token.

    Returns:
        o ``[B,H,N,Dv]`` in q's dtype; with ``return_final_state`` the pair (o, state ``[B,H,Dk,Dv]`` in fp32).

    Raises:
        BadArgument: a shape, dtype or device that does not fit, or a positive log-decay given as a number.
    """
    if not isinstance(log_decay, Tensor):
        log_decay = torch.as_tensor(log_decay, dtype=torch.float32, device=q.device)
        if bool((log_decay > 0).any()):
            raise BadArgument("log_decay", "log-decays of at most 0", f"{float(log_decay.max())}")
    check(q, k, v, log_decay, initial_state)
    out, state = torch.ops.lacompile.decayed_attention(
        q, k, v, log_decay, float(scale), initial_state, return_final_state
    )
    return (out, state) if return_final_state else out


def check(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, initial_state: Tensor | None = None) -> None:
    """Raises BadArgument for the first argument that does not fit the others."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise BadArgument(name, "a tensor [B,H,N,D]", f"{x.dim()} dimensions {tuple(x.shape)}")
        if not x.is_floating_point():
            raise BadArgument(name, "a floating-point tensor", str(x.dtype))
    batch, _, length, dk = q.shape
    heads = _heads(q, k, v, log_decay, initial_state)
    for name, x in (("k", k), ("v", v)):
        if x.shape[0] != batch or x.shape[2] != length:
            raise BadArgument(name, f"batch {batch} and length {length} like q", f"{tuple(x.shape)}")
        if x.dtype != q.dtype:
            raise BadArgument(name, f"dtype {q.dtype} like q", str(x.dtype))
    if k.shape[3] != dk:
        raise BadArgument("k", f"head dimension {dk} like q", f"{k.shape[3]}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if heads % x.shape[1]:
            raise BadArgument(name, f"a number of heads that divides {heads}", f"{x.shape[1]}")
    if log_decay.dim() not in (1, 3):
        raise BadArgument("log_decay", "shape [H] or [B,H,N]", f"{tuple(log_decay.shape)}")
    want = (heads,) if log_decay.dim() == 1 else (batch, heads, length)
    if tuple(log_decay.shape) != want:
        raise BadArgument("log_decay", f"shape {want}", f"{tuple(log_decay.shape)}")
    if initial_state is not None and tuple(initial_state.shape) != (batch, heads, dk, v.shape[3]):
        raise BadArgument("initial_state", f"shape {(batch, heads, dk, v.shape[3])}", f"{tuple(initial_state.shape)}")
    for name, x in (("k", k), ("v", v), ("log_decay", log_decay), ("initial_state", initial_state)):
        if x is not None and x.device != q.device:
            raise BadArgument(name, f"device {q.device} like q", str(x.device))
