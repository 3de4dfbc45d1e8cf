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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    want_state: bool = True,
) -> tuple[Tensor, Tensor]:
    """Output ``[B,H,N,Dv]`` in q's dtype and final state ``[B,H,Dk,Dv]`` in the compute dtype.

    The state is there on the way: ``want_state`` saves nothing here.
    """
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
    size = stop - start
    causal = torch.ones(size, size, dtype=torch.bool, device=log_decay.device).tril()
    if log_decay.dim() == 1:
        g = log_decay.to(dtype).reshape(1, heads, 1)
        after = torch.arange(1, size + 1, dtype=dtype, device=g.device)
        apart, total, left = g[..., None] * (after[:, None] - after), g * after, g * (size - after)
    else:
        # Sums of many gates lose digits that their differences need.
        run = token_decay(log_decay[..., start:stop].to(torch.float64), batch, heads, size).cumsum(-1)
        apart, total, left = (x.to(dtype) for x in (run[..., :, None] - run[..., None, :], run, run[..., -1:] - run))
    within = apart.masked_fill(~causal, float("-inf")).exp()
    return within, total.exp()[..., None], left.exp()[..., None], total[..., -1:].exp()[..., None]


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay (empty unless wanted) and the initial state, in the compute dtype.

    One pass forward for the state before each chunk, one pass back for the gradient of the state after it
    (arXiv 2401.04658, algorithm 2). The gradient of a token's log-decay is the weight of everything that passes it,
    from before to after: sums only, where the difference of row and column sums would cancel.
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
        dg = zeros.new_empty(batch, heads, 0)
        if want_decay:
            weight = scores * (dc @ vc.transpose(-1, -2))
            entering, leaving = (qc * from_state).sum(-1), (kc * to_state).sum(-1)
            passing = (whole * state * ds).sum((-1, -2))
            dg = _decay_gradient(weight, entering, leaving, passing, per_head=log_decay.dim() == 1)
        parts.append((dq, dkc, dvc, dg))
        ds = whole * ds + (qc * from_start).transpose(-1, -2) @ dc
    if not parts:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), torch.zeros_like(log_decay), ds.clone()
    dq, dk_, dv, dg = (torch.cat([p[n] for p in reversed(parts)], 2) for n in range(4))
    dg = dg.sum((0, 2), dtype=torch.float64).to(dtype) if log_decay.dim() == 1 else dg
    return _fold(dq, q.shape[1]), _fold(dk_, k.shape[1]), _fold(dv, v.shape[1]), dg, ds


def _decay_gradient(weight: Tensor, entering: Tensor, leaving: Tensor, passing: Tensor, *, per_head: bool) -> Tensor:
    """What passes each token of a chunk, ``[B,H,C]``; summed over the chunk, ``[B,H,1]``, where one decay serves all.

    Args:
        weight: gradient times value of each pair of tokens of the chunk, ``[B,H,C,C]``; zero above the diagonal.
        entering: the same from the state before the chunk to each token, ``[B,H,C]``.
        leaving: from each token to the state after the chunk, ``[B,H,C]``.
        passing: from the state before to the state after, ``[B,H]``.
        per_head: only the sum is wanted: each pair counts as often as its tokens lie apart.
    """
    size = weight.shape[-1]
    after = torch.arange(1, size + 1, dtype=weight.dtype, device=weight.device)
    if per_head:
        apart = (after[:, None] - after[None, :]).tril()
        total = (weight * apart).sum((-1, -2)) + entering @ after + leaving @ (size - after) + passing * size
        return total[..., None]
    later = torch.ones(size, size, dtype=weight.dtype, device=weight.device).triu()
    inside = (later @ weight).tril(-1).sum(-1)
    return inside + entering @ later.mT + leaving @ later.triu(1) + passing[..., None]


def _fold(grad: Tensor, heads: int) -> Tensor:
    """The gradient of a tensor whose heads were shared: summed over those that shared it."""
    return grad if grad.shape[1] == heads else grad.unflatten(1, (heads, -1)).sum(2)
