"""A tensor after a write into a view of it: what it was, where the view is, and what was written."""

from __future__ import annotations

import torch

from ...capture import ViewStep
from ..domain.term import Val
from ..engine import Engine, GiveUp
from ..transfer import Op
from ..transfer.reshaping import view_map
from ..transfer.scatter import written, written_at
from ..transfer.views import permutation, reorder, slice_bounds

aten = torch.ops.aten


def written_through(engine: Engine, base: Val, view: ViewStep, new: Val, made_together: bool) -> Val:
    """``base`` with ``new`` where ``view`` looks.

    ``made_together``: whether the program only ever saw the view, as of what ``zeros_like`` makes and detaches.

    Raises:
        GiveUp: the view is of a kind that is not written through.
    """
    packet, rank = view.func.overloadpacket, len(base.shape)
    op = Op(engine, view.func, [base, *view.args[1:]], view.kwargs, view.out, [None] * len(view.args))
    if packet is aten.select:
        d = op.dim(op.args[1], rank)
        return written_at(engine, base, new, d, op.position(2, base.shape[d]))
    if packet is aten.slice:
        d = op.arg(1, "dim", 0) % rank
        start, _, step = slice_bounds(op, base.shape[d])
        if step != 1:
            raise GiveUp("a strided write")
        return written(engine, base, new, d, start, new.shape[d])
    if packet is aten.alias or (packet is aten.detach and made_together):
        return new
    if packet in (aten.view, aten._unsafe_view, aten.unsqueeze, aten.squeeze):
        return engine.index(new, view_map(engine, new.shape, base.shape), base.shape)
    if packet in (aten.permute, aten.transpose, aten.t):
        order = permutation(op)
        return reorder(engine, new, [order.index(d) for d in range(rank)])
    raise GiveUp(f"a write through {packet}")
