"""The chunked form in ATen: linear time and memory, any device, any dtype; what runs on CPU.

Tokens are taken ``CHUNK`` at a time: inside a chunk as attention, between chunks through the running state
(Lightning Attention-2, arXiv 2401.04658, algorithm 1). A plain loop over chunks is as fast on CPU as the batched form
at short lengths and faster at long ones, where the batched form has to store every chunk's state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import expand_heads, head_count, token_decay

CHUNK = 64


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 stays fp64; everything else accumulates in fp32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output ``[B,H,N,Dv]`` in q's dtype and final state ``[B,H,Dk,Dv]`` in the compute dtype."""
    heads = head_count(q, k, v, log_decay, initial_state)
    batch, _, length, dk = q.shape
    dv = v.shape[-1]
    dtype = compute_dtype(q, k, v)
    out = []
    state = torch.zeros(batch, heads, dk, dv, dtype=dtype, device=q.device)
    if initial_state is not None:
        state = state + initial_state.to(dtype)
    weights = None
    for start in range(0, length, CHUNK):
        stop = min(start + CHUNK, length)
        qc, kc, vc = (expand_heads(x[:, :, start:stop], heads).to(dtype) for x in (q, k, v))
        if weights is None or log_decay.dim() > 1 or stop - start != CHUNK:
            weights = _weights(log_decay, batch, heads, start, stop, dtype)
        within, from_start, to_end, whole = weights
        scores = (qc @ kc.transpose(-1, -2)) * within
        out.append(scores @ vc + (qc * from_start) @ state)
        state = state * whole + (kc * to_end).transpose(-1, -2) @ vc
    if not out:
        return q.new_zeros(batch, heads, 0, dv), state
    return (torch.cat(out, 2) * scale).to(q.dtype), state


def _weights(
    log_decay: Tensor, batch: int, heads: int, start: int, stop: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Decay factors of one chunk: between its tokens, from its start, to its end, and over all of it.

    Differences are masked before the exponential, so that for log-decays <= 0 no exponent is ever positive.
    """
    if log_decay.dim() == 1:
        g = token_decay(log_decay.to(dtype), 1, heads, stop - start).cumsum(-1)
    else:
        g = token_decay(log_decay[..., start:stop].to(dtype), batch, heads, stop - start).cumsum(-1)
    causal = torch.ones(stop - start, stop - start, dtype=torch.bool, device=g.device).tril()
    within = (g[..., :, None] - g[..., None, :]).masked_fill(~causal, float("-inf")).exp()
    last = g[..., -1:]
    return within, g.exp()[..., None], (last - g).exp()[..., None], last.exp()[..., None]


def backward(
    do: Tensor,
    d_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v, log_decay and the initial state: the chunk loop run again and differentiated.

    The loop keeps one state per chunk, so memory stays linear in the length.
    """
    inputs = [x.detach().requires_grad_() for x in (q, k, v, log_decay)]
    state = None if initial_state is None else initial_state.detach().requires_grad_()
    with torch.enable_grad():
        out, final = forward(*inputs, scale, state)
        wanted = [*inputs, *([] if state is None else [state])]
        outputs, grads = [out], [do.to(out.dtype)]
        if d_state is not None:
            outputs.append(final)
            grads.append(d_state.to(final.dtype))
        found = torch.autograd.grad(outputs, wanted, grads, allow_unused=True)
    full = [torch.zeros_like(x) if g is None else g for g, x in zip(found, wanted, strict=True)]
    return full[0], full[1], full[2], full[3], full[4] if state is not None else None
