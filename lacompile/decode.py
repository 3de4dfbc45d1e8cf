"""Decoding: the same operator for tokens that come one by one, on a state that is overwritten."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import as_log_decay, as_scale, check, state_dtype
from .errors import BadArgument
from .ops import as_output, output_like, own_precision, refuse_forward_mode


@torch.library.custom_op("lacompile::decode_step", mutates_args=("state",))
def decode_step_op(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float, state: Tensor) -> Tensor:
    """The fused step; see :func:`decode_step`."""
    from .kernels.select import implementation

    refuse_forward_mode()
    with own_precision(q):
        out = implementation(q, v).decode(q, k, v, log_decay, scale, state)
    return as_output(q, out)


@decode_step_op.register_fake
def _(q, k, v, log_decay, scale, state):  # type: ignore[no-untyped-def]
    refuse_forward_mode()
    return output_like(q, state.shape[1], v.shape[3])


def decode_step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, *, scale: float = 1.0) -> Tensor:
    """One token or a few more: ``S <- exp(g_t) S + k_t^T v_t`` in place and ``o_t = scale q_t S``, for each in turn.

    Made for inference: it has no derivative. On a GPU up to 16 tokens are one kernel, which reads and writes the state
    once and nothing else of that size.

    Args:
        q, k, v, log_decay, scale: as in :func:`lacompile.decayed_attention`; N is 1 for a single token.
        state: ``[B,H,Dk,Dv]`` of any strides, fp32 (fp64 for inputs in fp64). It holds the state before the first
            token, and afterwards the one after the last.

    Returns:
        o ``[B,H,N,Dv]`` in q's dtype.

    Raises:
        BadArgument: a shape, dtype or device that does not fit; a state whose elements share memory; a tensor that
            wants a gradient while gradients are recorded.
    """
    log_decay, scale = as_log_decay(log_decay, q), as_scale(scale)
    if not isinstance(state, Tensor):
        raise BadArgument("state", "a tensor [B,H,Dk,Dv]", type(state).__name__)
    check(q, k, v, log_decay, state, state_name="state")
    if state.dtype != state_dtype(q):
        raise BadArgument("state", f"dtype {state_dtype(q)}", str(state.dtype))
    if any(size > 1 and stride == 0 for size, stride in zip(state.shape, state.stride(), strict=True)):
        raise BadArgument("state", "memory of its own for each element", f"strides {state.stride()}")
    if torch.is_grad_enabled():
        for name, x in (("q", q), ("k", k), ("v", v), ("log_decay", log_decay), ("state", state)):
            if x.requires_grad:
                raise BadArgument(name, "no gradient to be wanted (torch.no_grad())", "requires_grad=True")
    return torch.ops.lacompile.decode_step(q, k, v, log_decay, scale, state)
