"""The operator's contract: schema, shapes, strides and derivatives. Implementations are imported when they run.

``torch.ops.lacompile.decayed_attention`` and its backward are opaque to Inductor. On CPU that is also the faster
choice: unrolled into the graph, the chunk loop would cost compile time that grows with the length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._compat import functorch_active
from .arguments import as_log_decay, as_scale, check, heads_of, state_dtype
from .errors import LacompileError
from .registration import derivative, fake, operator


class ForwardModeRefused(LacompileError, NotImplementedError):
    """The operator was called under forward-mode AD, which it does not support."""

    def __init__(self) -> None:
        super().__init__(
            "lacompile.decayed_attention has no forward-mode derivative (torch.func.jvp, jacfwd, dual tensors); "
            "its tangent would be zero without a word. Use reverse mode, or lacompile.kernels.reference.quadratic"
        )


def refuse_forward_mode() -> None:
    """Below autograd a tangent is gone already, so that an active level is all there is to see.

    Transforms other than forward mode have been taken off the stack when an operator's body runs.
    """
    if functorch_active():
        raise ForwardModeRefused


def output_like(q: Tensor, heads: int, dv: int) -> Tensor:
    """o ``[B,H,N,Dv]`` laid out like q: tokens before heads in memory if q's are, so that merging heads is free.

    The chunked form makes heads before tokens whatever q is; what reads o on a CPU reorders it on the way.
    """
    batch, _, length, _ = q.shape
    if _tokens_first(q):
        return q.new_empty(batch, length, heads, dv).transpose(1, 2)
    return q.new_empty(batch, heads, length, dv)


def _tokens_first(q: Tensor) -> bool:
    return q.device.type != "cpu" and q.stride(1) < q.stride(2)


def as_output(q: Tensor, made: Tensor) -> Tensor:
    """``made`` in q's dtype and with the strides of :func:`output_like`; a copy only where it has others."""
    _, heads, length, dv = made.shape
    dense = (length * heads * dv, dv, heads * dv, 1) if _tokens_first(q) else (heads * length * dv, length * dv, dv, 1)
    if made.dtype == q.dtype and made.stride() == dense:
        return made
    return output_like(q, heads, dv).copy_(made)


def as_gradient(x: Tensor, made: Tensor) -> Tensor:
    """``made`` with the dtype and strides of ``empty_like(x)``; a copy only where it has others."""
    if made.dtype == x.dtype and made.stride() == _dense(x.shape, x.stride()):
        return made
    return torch.empty_like(x).copy_(made)


@lru_cache(maxsize=4096)
def _dense(shape: Sequence[int], stride: Sequence[int]) -> Sequence[int]:
    """Strides of ``empty_like`` of a tensor."""
    return torch.empty_like(torch.empty_strided(shape, stride, device="meta")).stride()


AS_IT_IS = nullcontext()


def own_precision(q: Tensor) -> AbstractContextManager[object]:
    """Implementations choose their own precision: autocast would round fp32 operands inside them."""
    kind = q.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else AS_IT_IS


@operator("decayed_attention")
def decayed_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    return_final_state: bool,
    narrow: str,
) -> tuple[Tensor, Tensor]:
    """The fused operator; see :func:`decayed_attention`. The state is an empty tensor unless asked for.

    ``narrow`` names those of q, k and v ("qk", say) that hold numbers of bf16 in whatever dtype they have: kernels that
    would split an fp32 number into several of bf16 need not. It changes no result.
    """
    from .kernels.select import implementation

    refuse_forward_mode()
    with own_precision(q):
        out, state = implementation(q, v).forward(q, k, v, log_decay, scale, initial_state, return_final_state, narrow)
    return as_output(q, out), state if return_final_state else state.new_empty(0)


@fake(decayed_attention_op)
def _(q, k, v, log_decay, scale, initial_state, return_final_state, narrow):  # type: ignore[no-untyped-def]
    refuse_forward_mode()
    heads = heads_of(q, k, v, log_decay, initial_state)
    dtype = state_dtype(q)
    shape = (q.shape[0], heads, q.shape[3], v.shape[3]) if return_final_state else (0,)
    return output_like(q, heads, v.shape[3]), q.new_empty(shape, dtype=dtype)


@operator("decayed_attention_backward")
def decayed_attention_backward_op(
    do: Tensor,
    d_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    decay_gradient: bool,
    narrow: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay and the initial state; an empty tensor where there is none or none is wanted."""
    from .kernels.select import implementation

    refuse_forward_mode()
    with own_precision(q):
        dq, dk, dv, dg, ds = implementation(q, v).backward(
            do, d_state, q, k, v, log_decay, scale, initial_state, decay_gradient, narrow
        )
    d_log_decay = as_gradient(log_decay, dg) if decay_gradient else log_decay.new_empty(0)
    d_initial = q.new_empty(0) if initial_state is None else as_gradient(initial_state, ds)
    return as_gradient(q, dq), as_gradient(k, dk), as_gradient(v, dv), d_log_decay, d_initial


@fake(decayed_attention_backward_op)
def _(do, d_state, q, k, v, log_decay, scale, initial_state, decay_gradient, narrow):  # type: ignore[no-untyped-def]
    refuse_forward_mode()
    d_log_decay = torch.empty_like(log_decay) if decay_gradient else log_decay.new_empty(0)
    d_initial = q.new_empty(0) if initial_state is None else torch.empty_like(initial_state)
    return (*(torch.empty_like(x) for x in (q, k, v)), d_log_decay, d_initial)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, log_decay, scale, initial_state, return_final_state, narrow = inputs
    ctx.save_for_backward(q, k, v, log_decay, initial_state)
    ctx.scale, ctx.return_final_state, ctx.narrow = scale, return_final_state, narrow


def _backward(ctx: Any, do: Tensor, d_state: Tensor | None) -> tuple[Any, ...]:
    q, k, v, log_decay, initial_state = ctx.saved_tensors
    if not ctx.return_final_state:
        d_state = None
    wanted = ctx.needs_input_grad[3]
    dq, dk, dv, dg, ds = decayed_attention_backward_op(
        do, d_state, q, k, v, log_decay, ctx.scale, initial_state, wanted, ctx.narrow
    )
    return dq, dk, dv, dg if wanted else None, None, ds if initial_state is not None else None, None, None


derivative(decayed_attention_op, _backward, setup_context=_setup_context)


def _setup_backward_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    do, d_state, q, k, v, log_decay, scale, initial_state, decay_gradient, _ = inputs
    ctx.save_for_backward(do, d_state, q, k, v, log_decay, initial_state)
    ctx.scale, ctx.decay_gradient = scale, decay_gradient


def _double_backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
    """Derivatives of the gradients, of any order: those of the chunked form in plain PyTorch, on any device.

    Right rather than fast: it keeps what autograd keeps of every chunk, memory that grows with N Dk Dv / 64.
    """
    from .kernels import cpu

    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), own_precision(ctx.saved_tensors[2]):
        saved = [None if x is None else _own_leaf(x) for x in ctx.saved_tensors]
        do, d_state, q, k, v, log_decay, initial_state = saved
        assert do is not None and q is not None and k is not None and v is not None and log_decay is not None
        results = cpu.forward(q, k, v, log_decay, ctx.scale, initial_state)
        inputs = [x for x in (q, k, v, log_decay, initial_state) if x is not None]
        grads = _vector_jacobian(results, inputs, (do, d_state), create_graph=True)
        wanted = [x for x in saved if x is not None]
        weights = [c if n != 3 or ctx.decay_gradient else None for n, c in enumerate(cotangents)]
        found = iter(_vector_jacobian(grads, wanted, weights, create_graph=create_graph))
    d_do, d_d_state, d_q, d_k, d_v, d_log_decay, d_initial = (None if x is None else next(found) for x in saved)
    return d_do, d_d_state, d_q, d_k, d_v, d_log_decay, None, d_initial, None, None


def _own_leaf(x: Tensor) -> Tensor:
    """``x`` as a tensor of its own that requires a gradient, so that one passed twice is not counted twice."""
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()


def _vector_jacobian(
    outputs: Sequence[Tensor | None], inputs: Sequence[Tensor], vectors: Sequence[Tensor | None], *, create_graph: bool
) -> Sequence[Tensor | None]:
    """Gradients of ``inputs``, None where nothing depends on one."""
    pairs = [
        (o, w) for o, w in zip(outputs, vectors, strict=False) if o is not None and o.requires_grad and w is not None
    ]
    if not pairs:
        return [None] * len(inputs)
    kept, weights = zip(*pairs, strict=True)
    return torch.autograd.grad(kept, inputs, weights, create_graph=create_graph, allow_unused=True)


derivative(decayed_attention_backward_op, _double_backward, setup_context=_setup_backward_context)


PROMISED_IN = ("ops.py", "arguments.py", "registration.py")
_promised = b"".join(Path(__file__).with_name(name).read_bytes() for name in PROMISED_IN)
CACHE_TAG = "lacompile-" + hashlib.sha256(_promised).hexdigest()[:16]
"""What compiled code relies on: schema, shapes, dtypes and strides as these files promise them."""


def decayed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
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
        cu_seqlens: for S sequences packed one after the other along N, with B = 1: where they begin, and N;
            ``[S+1]`` of int32 or int64, on q's device. States are then ``[S,H,Dk,Dv]``. No second derivatives.

    Returns:
        o ``[B,H,N,Dv]`` in q's dtype; with ``return_final_state`` the pair (o, state ``[B,H,Dk,Dv]`` in fp32).

    Raises:
        BadArgument: a shape, dtype or device that does not fit, or a positive log-decay given as a number.
    """
    log_decay, scale = as_log_decay(log_decay, q), as_scale(scale)
    if cu_seqlens is None:
        check(q, k, v, log_decay, initial_state)
        out, state = decayed_attention_op(q, k, v, log_decay, scale, initial_state, return_final_state, "")
    else:
        from .packed import check_packing, packed_attention_op

        check_packing(q, cu_seqlens)
        check(q, k, v, log_decay, initial_state, states=cu_seqlens.shape[0] - 1)
        out, state = packed_attention_op(q, k, v, log_decay, scale, initial_state, return_final_state, cu_seqlens)
    return (out, state) if return_final_state else out
