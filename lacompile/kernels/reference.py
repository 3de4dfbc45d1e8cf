"""The definition of correct: decayed causal linear attention as its recurrence and as its quadratic form.

Both work in the dtype they are given (fp64 in tests) and are differentiable by autograd. Shapes as in
:func:`lacompile.decayed_attention`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def expand_heads(x: Tensor, heads: int) -> Tensor:
    """``x`` ``[B,Hx,...]`` with each of its heads repeated to make ``heads`` (grouped queries)."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def token_decay(log_decay: Tensor, batch: int, heads: int, length: int) -> Tensor:
    """``[H]`` or ``[B,H,N]`` log-decays as ``[B,H,N]``."""
    if log_decay.dim() == 1:
        return log_decay[None, :, None].expand(batch, heads, length)
    return log_decay.expand(batch, heads, length)


def head_count(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None) -> int:
    """The number of heads of a call: the largest of its tensors."""
    decay_heads = log_decay.shape[0] if log_decay.dim() == 1 else log_decay.shape[1]
    return max(q.shape[1], k.shape[1], v.shape[1], decay_heads, 0 if state is None else state.shape[1])


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``S_t = exp(g_t) S_{t-1} + k_t^T v_t``, ``o_t = scale q_t S_t``, token by token (arXiv 2401.04658, eq. 6)."""
    heads = head_count(q, k, v, log_decay, initial_state)
    q, k, v = (expand_heads(x, heads) for x in (q, k, v))
    batch, _, length, dk = q.shape
    decay = token_decay(log_decay, batch, heads, length).to(q.dtype).exp()
    state = q.new_zeros(batch, heads, dk, v.shape[-1]) if initial_state is None else initial_state.to(q.dtype)
    out = []
    for t in range(length):
        state = state * decay[:, :, t, None, None] + k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append(scale * (q[:, :, t, :, None] * state).sum(-2))
    return torch.stack(out, 2) if out else v.new_zeros(*q.shape[:3], v.shape[-1]), state


def quadratic(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``o = scale (q k^T * exp(G_i - G_j) [j <= i]) v`` plus the decayed initial state; N x N work."""
    heads = head_count(q, k, v, log_decay, initial_state)
    q, k, v = (expand_heads(x, heads) for x in (q, k, v))
    batch, _, length, _ = q.shape
    g = token_decay(log_decay, batch, heads, length).to(q.dtype).cumsum(-1)
    causal = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    weight = (g[..., :, None] - g[..., None, :]).masked_fill(~causal, float("-inf")).exp()
    out = (q @ k.transpose(-1, -2) * weight) @ v
    state = (k * (g[..., -1:] - g).exp()[..., None]).transpose(-1, -2) @ v
    if initial_state is not None:
        out = out + g.exp()[..., None] * (q @ initial_state.to(q.dtype))
        state = state + g[..., -1].exp()[..., None, None] * initial_state.to(q.dtype)
    return scale * out, state
