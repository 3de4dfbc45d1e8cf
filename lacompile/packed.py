"""Packed sequences: the operator for several of any lengths, one after the other in one tensor.

Two operators beside those of :mod:`.ops`, which know one length: a schema that served both would make every caller of
the plain one, the rewrite among them, carry an argument that it never has.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from .arguments import heads_of, state_dtype
from .errors import BadArgument
from .ops import as_gradient, as_output, output_like, own_precision, refuse_forward_mode
from .registration import derivative, fake, operator


@operator("packed_attention")
def packed_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    return_final_state: bool,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor]:
    """As ``lacompile::decayed_attention`` with B = 1 and states ``[S,H,Dk,Dv]``."""
    from .kernels.select import packed_implementation

    refuse_forward_mode()
    with own_precision(q):
        out, state = packed_implementation(q, v).forward(
            q, k, v, log_decay, scale, initial_state, return_final_state, cu_seqlens
        )
    o = as_output(q, out)
    return o, state if return_final_state else state.new_empty(0)


@fake(packed_attention_op)
def _(q, k, v, log_decay, scale, initial_state, return_final_state, cu_seqlens):  # type: ignore[no-untyped-def]
    refuse_forward_mode()
    heads = heads_of(q, k, v, log_decay, initial_state)
    shape = (cu_seqlens.shape[0] - 1, heads, q.shape[3], v.shape[3]) if return_final_state else (0,)
    return output_like(q, heads, v.shape[3]), q.new_empty(shape, dtype=state_dtype(q))


@operator("packed_attention_backward")
def packed_attention_backward_op(
    do: Tensor,
    d_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    decay_gradient: bool,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay and the initial states; an empty tensor where there is none or none is wanted."""
    from .kernels.select import packed_implementation

    refuse_forward_mode()
    with own_precision(q):
        dq, dk, dv, dg, ds = packed_implementation(q, v).backward(
            do, d_state, q, k, v, log_decay, scale, initial_state, decay_gradient, cu_seqlens
        )
    d_log_decay = as_gradient(log_decay, dg) if decay_gradient else log_decay.new_empty(0)
    d_initial = q.new_empty(0) if initial_state is None else as_gradient(initial_state, ds)
    return as_gradient(q, dq), as_gradient(k, dk), as_gradient(v, dv), d_log_decay, d_initial


@fake(packed_attention_backward_op)
def _(do, d_state, q, k, v, log_decay, scale, initial_state, decay_gradient, cu_seqlens):  # type: ignore[no-untyped-def]
    refuse_forward_mode()
    d_log_decay = torch.empty_like(log_decay) if decay_gradient else log_decay.new_empty(0)
    d_initial = q.new_empty(0) if initial_state is None else torch.empty_like(initial_state)
    return (*(torch.empty_like(x) for x in (q, k, v)), d_log_decay, d_initial)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, log_decay, scale, initial_state, return_final_state, cu_seqlens = inputs
    ctx.save_for_backward(q, k, v, log_decay, initial_state, cu_seqlens)
    ctx.scale, ctx.return_final_state = scale, return_final_state


def _backward(ctx: Any, do: Tensor, d_state: Tensor | None) -> tuple[Any, ...]:
    q, k, v, log_decay, initial_state, cu_seqlens = ctx.saved_tensors
    if not ctx.return_final_state:
        d_state = None
    wanted = ctx.needs_input_grad[3]
    dq, dk, dv, dg, ds = packed_attention_backward_op(
        do, d_state, q, k, v, log_decay, ctx.scale, initial_state, wanted, cu_seqlens
    )
    return dq, dk, dv, dg if wanted else None, None, ds if initial_state is not None else None, None, None


derivative(packed_attention_op, _backward, setup_context=_setup_context)


def _no_second_derivative(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
    raise NotImplementedError(
        "lacompile.decayed_attention has no second derivative for packed sequences; call it once for each sequence"
    )


derivative(packed_attention_backward_op, _no_second_derivative, setup_context=lambda ctx, inputs, output: None)


def check_packing(q: Tensor, cu_seqlens: Any) -> None:
    """Raises BadArgument for sequences that cannot be told apart.

    The numbers themselves are looked at on a CPU only: elsewhere the host would have to wait for them.
    """
    if not isinstance(cu_seqlens, Tensor):
        raise BadArgument("cu_seqlens", "a tensor [S+1]", type(cu_seqlens).__name__)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise BadArgument("cu_seqlens", "shape [S+1] for S of at least 1", f"{tuple(cu_seqlens.shape)}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise BadArgument("cu_seqlens", "int32 or int64", str(cu_seqlens.dtype))
    if cu_seqlens.device != q.device:
        raise BadArgument("cu_seqlens", f"device {q.device} like q", str(cu_seqlens.device))
    if q.shape[0] != 1:
        raise BadArgument("q", "batch 1 for packed sequences", f"{q.shape[0]}")
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    edges = cu_seqlens.tolist()
    if edges[0] != 0 or edges[-1] != q.shape[2] or any(a > b for a, b in itertools.pairwise(edges)):
        raise BadArgument("cu_seqlens", f"numbers from 0 to {q.shape[2]} that do not fall", str(edges)[:80])
