"""Views as calls: none where nothing would change, and none where one made before is undone instead."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch

from ....facts import Call, Expr


def permuted(expr: Expr, order: Sequence[int]) -> Expr:
    """``expr`` with its dimensions in this order."""
    order = list(order)
    return expr if order == list(range(len(order))) else Call(torch.permute, (expr, order))


def squeezed(expr: Expr, dim: int) -> Expr:
    """``expr`` without its dimension ``dim`` of length 1; an unsqueeze that made it is undone instead."""
    if isinstance(expr, Call) and expr.op is torch.unsqueeze:
        inner, made = expr.args
        if made == dim:
            return inner
        shift = 1 if made < dim else 0
        return Call(torch.unsqueeze, (squeezed(inner, dim - shift), made - 1 + shift))
    by_number = isinstance(expr, Call) and expr.op is torch.mul and isinstance(expr.args[1], float)
    if isinstance(expr, Call) and (by_number or expr.op is torch.Tensor.to):
        return Call(expr.op, (squeezed(expr.args[0], dim), expr.args[1]))
    return Call(torch.squeeze, (expr, dim))


def with_zeros(expr: Expr, dim: int, before: int, after: int) -> Expr:
    """Zeros in front and behind; fewer of them than there are entries, and where less than none, entries less."""

    def part(start: int | None, end: int | None) -> Expr:
        return Call(operator.getitem, (expr, (*[slice(None)] * dim, slice(start, end))))

    kept = part(max(-before, 0) or None, min(after, 0) or None) if min(before, after) < 0 else expr
    front = [Call(torch.zeros_like, (part(0, before),))] if before > 0 else []
    behind = [Call(torch.zeros_like, (part(0, after),))] if after > 0 else []
    return Call(torch.cat, ([*front, kept, *behind], dim))
