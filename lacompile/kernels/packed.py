"""Packed sequences one by one, by whatever serves a single one. The lengths are read on the host, which waits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from .select import implementation


def _parts(cu_seqlens: Tensor) -> Iterator[tuple[int, slice]]:
    edges = cu_seqlens.tolist()
    for n, (begin, end) in enumerate(itertools.pairwise(edges)):
        yield n, slice(begin, end)


def _of(x: Tensor, part: slice) -> Tensor:
    """The part of ``[1,H,N,...]``; log-decays ``[H]`` are the same for all."""
    return x if x.dim() == 1 else x[:, :, part]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    want_state: bool,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor]:
    """Output ``[1,H,N,Dv]`` in q's dtype and final states ``[S,H,Dk,Dv]``."""
    one = implementation(q, v)
    outs, states = [], []
    for n, part in _parts(cu_seqlens):
        first = None if initial_state is None else initial_state[n : n + 1]
        o, state = one.forward(*(_of(x, part) for x in (q, k, v, log_decay)), scale, first, want_state)
        outs.append(o)
        states.append(state)
    return torch.cat(outs, 2), torch.cat(states)


def backward(
    do: Tensor,
    d_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    want_decay: bool,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay (empty unless wanted) and the initial states (empty without them)."""
    one = implementation(q, v)
    grads = []
    for n, part in _parts(cu_seqlens):
        first = None if initial_state is None else initial_state[n : n + 1]
        last = None if d_state is None else d_state[n : n + 1]
        args = (_of(x, part) for x in (q, k, v, log_decay))
        grads.append(one.backward(do[:, :, part], last, *args, scale, first, want_decay))
    dq, dk, dv = (torch.cat([g[n] for g in grads], 2) for n in range(3))
    if not want_decay:
        dg = log_decay.new_empty(0)
    elif log_decay.dim() == 1:
        dg = torch.stack([g[3] for g in grads]).sum(0)
    else:
        dg = torch.cat([g[3] for g in grads], 2)
    ds = do.new_empty(0) if initial_state is None else torch.cat([g[4] for g in grads])
    return dq, dk, dv, dg, ds
