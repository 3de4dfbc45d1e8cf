"""Triton kernels for decayed causal linear attention: ``forward``, ``backward`` and ``decode``, as in kernels/cpu.py.

One body (:mod:`.body`) computes the output and all three gradients of long sequences; see arXiv 2401.04658 for the
tiling. A few tokens are another matter (:mod:`.decode`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import head_count
from . import forward as chunked
from .backward import backward
from .decode import attend_short, is_short

__all__ = ["backward", "decode", "forward"]


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
    """As forward.py's, of any length."""
    if not is_short(q, v):
        return chunked.forward(q, k, v, log_decay, scale, initial_state, want_state, narrow)
    heads = head_count(q, k, v, log_decay, initial_state)
    shape = (q.shape[0], heads, q.shape[3], v.shape[3]) if want_state else (0,)
    state = torch.empty(shape, dtype=torch.float32, device=q.device)
    return attend_short(q, k, v, log_decay, scale, initial_state, state if want_state else None), state


def decode(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float, state: Tensor) -> Tensor:
    """Output ``[B,H,N,Dv]``; ``state`` ``[B,H,Dk,Dv]`` fp32 goes from before the first token to after the last."""
    if is_short(q, v):
        return attend_short(q, k, v, log_decay, scale, state, state)
    out, last = chunked.forward(q, k, v, log_decay, scale, state, True)
    state.copy_(last)
    return out
