"""The chunked form in ATen: linear time and memory, any device, any dtype; what runs on CPU.

Tokens are taken ``CHUNK`` at a time: inside a chunk as attention, between chunks through the state (Lightning
Attention-2, arXiv 2401.04658, algorithm 1). Up to ``BLOCK`` chunks are computed at once, as batched products that keep
every core busy; their states are one product with the decays between chunks. Memory does not grow with the length
beyond what is returned.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .reference import expand_heads, head_count

CHUNK = 64
BLOCK = 64
NOTHING = {torch.float64: -800.0, torch.float32: -110.0}
"""Log-decays whose exponential is 0 in the format they are computed in: lower ones are no other decay."""


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 stays fp64; everything else accumulates in fp32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


@dataclass(frozen=True)
class Block:
    """``count`` chunks of ``size`` tokens each, from token ``start``."""

    start: int
    count: int
    size: int

    @property
    def stop(self) -> int:
        return self.start + self.count * self.size

    def of(self, x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
        """The block of ``[B,*,N,D]`` as ``[B,H,count,size,D]``, contiguous: every product it is in would copy it."""
        part = expand_heads(x[:, :, self.start : self.stop], heads).to(dtype)
        return part.reshape(*part.shape[:2], self.count, self.size, part.shape[3]).contiguous()


def blocks(length: int) -> Iterator[Block]:
    """Whole chunks, at most BLOCK at a time, and then what is left as a chunk of its own."""
    whole = length // CHUNK
    for first in range(0, whole, BLOCK):
        yield Block(first * CHUNK, min(BLOCK, whole - first), CHUNK)
    if length % CHUNK:
        yield Block(whole * CHUNK, 1, length % CHUNK)


@dataclass(frozen=True)
class Decays:
    """The decay factors of one block; ``b`` is the batch or 1, ``c`` the number of chunks or 1.

    within ``[b,H,c,C,C]`` between the tokens of a chunk (0 above the diagonal), from_start ``[b,H,c,C,1]`` from the
    state before a chunk to each token, to_end ``[b,H,c,C,1]`` from each token to the state after it, whole ``[b,H,c]``
    over a chunk; between ``[b,H,count+1,count]`` from the state after chunk j to the state before chunk i (0 where
    i <= j), and from_first ``[b,H,count+1]`` from the state before the block to the one before chunk i.
    """

    within: Tensor
    from_start: Tensor
    to_end: Tensor
    whole: Tensor
    between: Tensor
    from_first: Tensor


def decays(log_decay: Tensor, block: Block, dtype: torch.dtype) -> Decays:
    """Differences are masked before the exponential: for log-decays of at most 0 no exponent is ever positive.

    A full reset (-inf, or a number that stands for it) is taken for NOTHING: the difference of two sums that hold it
    would be no number, or what is left of the decays behind it.
    """
    size, device = block.size, log_decay.device
    log_decay = log_decay.clamp(min=NOTHING[dtype])
    if log_decay.dim() == 1:
        g = log_decay.to(dtype)[None, :, None, None]
        after = torch.arange(1, size + 1, dtype=dtype, device=device)
        apart, run, left = g[..., None] * (after[:, None] - after), g * after, g * (size - after)
        ends = log_decay.to(torch.float64)[None, :, None] * size
        passed = ends * torch.arange(block.count + 1, dtype=torch.float64, device=device)
    else:
        # Sums of many gates lose digits that their differences need.
        gates = log_decay[..., block.start : block.stop].to(torch.float64).unflatten(-1, (block.count, size))
        total = gates.cumsum(-1)
        apart = (total[..., :, None] - total[..., None, :]).to(dtype)
        run, left = total.to(dtype), (total[..., -1:] - total).to(dtype)
        ends = total[..., -1]
        passed = torch.nn.functional.pad(ends.cumsum(-1), (1, 0))
    between = passed[..., :, None] - passed[..., None, 1:]
    return Decays(
        apart.masked_fill(~_lower(size, size, 0, device), float("-inf")).exp(),
        run.exp()[..., None],
        left.exp()[..., None],
        ends.exp().to(dtype),
        between.masked_fill(~_lower(block.count + 1, block.count, -1, device), float("-inf")).exp().to(dtype),
        passed.exp().to(dtype),
    )


def _lower(rows: int, columns: int, diagonal: int, device: torch.device) -> Tensor:
    return torch.ones(rows, columns, dtype=torch.bool, device=device).tril(diagonal)


def _states(d: Decays, k: Tensor, v: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
    """The states before each chunk, ``[B,H,count,Dk,Dv]``, and the one after the last, ``[B,H,Dk,Dv]``."""
    own = (k * d.to_end).mT @ v
    flat = own.flatten(-2)
    before = (d.between[..., :-1, :] @ flat).unflatten(-1, own.shape[-2:])
    last = (d.between[..., -1:, :] @ flat).unflatten(-1, own.shape[-2:])[:, :, 0]
    if first is None:
        return before, last
    carried = d.from_first[..., None, None] * first[:, :, None]
    return before.add_(carried[:, :, :-1]), last + carried[:, :, -1]


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
    """Output ``[B,H,N,Dv]`` in q's dtype and final state ``[B,H,Dk,Dv]`` in the compute dtype.

    The state is there on the way: ``want_state`` saves nothing here, nor does knowing which are ``narrow``.
    """
    heads = head_count(q, k, v, log_decay, initial_state)
    dtype = compute_dtype(q, k, v)
    state = None if initial_state is None else _first_state(q, v, heads, dtype, initial_state)
    parts = []
    for block in blocks(q.shape[2]):
        d = decays(log_decay, block, dtype)
        qb, kb, vb = (block.of(x, heads, dtype) for x in (q, k, v))
        before, state = _states(d, kb, vb, state)
        o = (qb @ kb.mT).mul_(d.within * scale) @ vb
        o += (qb * (d.from_start * scale)) @ before
        parts.append(o.flatten(2, 3).to(q.dtype))
    if state is None or not parts:
        return q.new_zeros(q.shape[0], heads, 0, v.shape[3]), _first_state(q, v, heads, dtype, initial_state)
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2), state


def decode(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float, state: Tensor) -> Tensor:
    """Output ``[B,H,N,Dv]``; ``state`` ``[B,H,Dk,Dv]`` goes from before the first token to after the last."""
    if q.shape[2] != 1:
        o, last = forward(q, k, v, log_decay, scale, state)
        state.copy_(last)
        return o
    heads = state.shape[1]
    qt, kt, vt = (expand_heads(x, heads).to(state.dtype) for x in (q, k, v))
    factor = log_decay.to(state.dtype).exp()
    state.mul_(factor[:, None, None] if factor.dim() == 1 else factor[..., None])
    state.addcmul_(kt.mT, vt)
    return ((qt @ state) * scale).to(q.dtype)


def _first_state(q: Tensor, v: Tensor, heads: int, dtype: torch.dtype, given: Tensor | None) -> Tensor:
    zeros = torch.zeros(q.shape[0], heads, q.shape[3], v.shape[3], dtype=dtype, device=q.device)
    return zeros if given is None else zeros + given.to(dtype)


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
    narrow: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay (empty unless wanted) and the initial state, in the compute dtype.

    One pass forward for the state before each block, one pass back for the gradient of the state after it
    (arXiv 2401.04658, algorithm 2). The gradient of a token's log-decay is the weight of everything that passes it,
    from before to after: sums only, where the difference of row and column sums would cancel.
    """
    heads = head_count(q, k, v, log_decay, initial_state)
    dtype = compute_dtype(q, k, v)
    per_head = log_decay.dim() == 1
    parts_of = list(blocks(q.shape[2]))
    firsts = [_first_state(q, v, heads, dtype, initial_state)]
    for block in parts_of[:-1]:
        d = decays(log_decay, block, dtype)
        kb, vb = (block.of(x, heads, dtype) for x in (k, v))
        firsts.append(_states(d, kb, vb, firsts[-1])[1])
    d_last = _first_state(q, v, heads, dtype, d_state)
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for block, first in zip(reversed(parts_of), reversed(firsts[: len(parts_of)]), strict=True):
        d = decays(log_decay, block, dtype)
        qb, kb, vb = (block.of(x, heads, dtype) for x in (q, k, v))
        db = block.of(do, heads, dtype) * scale
        before, _ = _states(d, kb, vb, first)
        # What reaches the state before each chunk, and from there the states before it.
        arriving = (qb * d.from_start).mT @ db
        later = (d.between[..., :-1, :].mT @ arriving.flatten(-2)).unflatten(-1, arriving.shape[-2:])
        after = later + d.between[..., -1, :, None, None] * d_last[:, :, None]
        scores = (qb @ kb.mT) * d.within
        d_scores = (db @ vb.mT) * d.within
        from_state = d.from_start * (db @ before.mT)
        to_state = d.to_end * (vb @ after.mT)
        dq = d_scores @ kb + from_state
        dk = d_scores.mT @ qb + to_state
        dv = scores.mT @ db + (kb * d.to_end) @ after
        dg = qb.new_empty(*qb.shape[:2], 0)
        if want_decay:
            weight = scores * (db @ vb.mT)
            entering, leaving = (qb * from_state).sum(-1), (kb * to_state).sum(-1)
            passing = d.whole * (before * after).sum((-1, -2))
            dg = _decay_gradient(weight, entering, leaving, passing, per_head=per_head).flatten(2)
        parts.append((dq.flatten(2, 3), dk.flatten(2, 3), dv.flatten(2, 3), dg))
        reaching = (d.from_first[..., :-1, None, None] * arriving).sum(2)
        d_last = reaching + d.from_first[..., -1, None, None] * d_last
    if not parts:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), torch.zeros_like(log_decay), d_last
    dq, dk, dv, dg = (torch.cat([p[n] for p in reversed(parts)], 2) for n in range(4))
    dg = dg.sum((0, 2), dtype=torch.float64).to(dtype) if per_head else dg
    return _fold(dq, q.shape[1]), _fold(dk, k.shape[1]), _fold(dv, v.shape[1]), dg, d_last


def _decay_gradient(weight: Tensor, entering: Tensor, leaving: Tensor, passing: Tensor, *, per_head: bool) -> Tensor:
    """What passes each token of a chunk, ``[B,H,c,C]``; its sum, ``[B,H,c,1]``, where one decay serves all tokens.

    Args:
        weight: gradient times value of each pair of tokens of a chunk, ``[B,H,c,C,C]``; zero above the diagonal.
        entering: the same from the state before the chunk to each token, ``[B,H,c,C]``.
        leaving: from each token to the state after the chunk, ``[B,H,c,C]``.
        passing: from the state before to the state after, ``[B,H,c]``.
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
