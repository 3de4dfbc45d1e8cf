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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay and the initial state, in the compute dtype.

    One pass forward for the state before each chunk, one pass back for the gradient of the state after it
    (arXiv 2401.04658, algorithm 2). The decay's gradient is collected as that of the cumulative log-decay inside each
    chunk, which never subtracts large sums over the whole length.
    """
    heads = head_count(q, k, v, log_decay, initial_state)
    batch, _, length, dk = q.shape
    dtype = compute_dtype(q, k, v)
    zeros = torch.zeros(batch, heads, dk, v.shape[-1], dtype=dtype, device=q.device)
    starts = list(range(0, length, CHUNK))
    state = zeros if initial_state is None else initial_state.to(dtype)
    states = []
    for start in starts:
        stop = min(start + CHUNK, length)
        _, _, to_end, whole = _weights(log_decay, batch, heads, start, stop, dtype)
        states.append(state)
        kc, vc = (expand_heads(x[:, :, start:stop], heads).to(dtype) for x in (k, v))
        state = state * whole + (kc * to_end).transpose(-1, -2) @ vc
    ds = zeros if d_state is None else d_state.to(dtype)
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for start, state in zip(reversed(starts), reversed(states), strict=True):
        stop = min(start + CHUNK, length)
        within, from_start, to_end, whole = _weights(log_decay, batch, heads, start, stop, dtype)
        qc, kc, vc = (expand_heads(x[:, :, start:stop], heads).to(dtype) for x in (q, k, v))
        dc = do[:, :, start:stop].to(dtype) * scale
        scores = (qc @ kc.transpose(-1, -2)) * within
        d_scores = (dc @ vc.transpose(-1, -2)) * within
        from_state = from_start * (dc @ state.transpose(-1, -2))
        to_state = to_end * (vc @ ds.transpose(-1, -2))
        dq = d_scores @ kc + from_state
        dkc = d_scores.transpose(-1, -2) @ qc + to_state
        dvc = scores.transpose(-1, -2) @ dc + (kc * to_end) @ ds
        leaving = (kc * to_state).sum(-1)
        weight = scores * (dc @ vc.transpose(-1, -2))
        d_cum = weight.sum(-1) - weight.sum(-2) + (qc * from_state).sum(-1) - leaving
        d_cum[..., -1] += leaving.sum(-1) + (whole * state * ds).sum((-1, -2))
        parts.append((dq, dkc, dvc, d_cum.flip(-1).cumsum(-1).flip(-1)))
        ds = whole * ds + (qc * from_start).transpose(-1, -2) @ dc
    if not parts:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), torch.zeros_like(log_decay), ds
    dq, dk_, dv, dg = (torch.cat([p[n] for p in reversed(parts)], 2) for n in range(4))
    dg = dg.sum((0, 2)) if log_decay.dim() == 1 else dg
    return _fold(dq, q.shape[1]), _fold(dk_, k.shape[1]), _fold(dv, v.shape[1]), dg, ds


def _fold(grad: Tensor, heads: int) -> Tensor:
    """The gradient of a tensor whose heads were shared: summed over those that shared it."""
    return grad if grad.shape[1] == heads else grad.unflatten(1, (heads, -1)).sum(2)
