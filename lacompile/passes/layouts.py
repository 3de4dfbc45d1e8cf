"""Calls that change no entry, only where it is: reshapes, orders of dimensions, tensors that are put side by side."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from .._compat import always_equal
from .examples import example_of

RESHAPES = frozenset[Any]({
    *("reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous"),
    *(torch.reshape, torch.flatten, torch.unflatten, torch.squeeze, torch.unsqueeze),
})  # fmt: skip
TRANSPOSES = ("transpose", "swapaxes", "swapdims", torch.transpose, torch.swapaxes, torch.swapdims)
REORDERS = (*TRANSPOSES, "permute", torch.permute)

SIDE_BY_SIDE = (torch.cat, torch.concat, torch.concatenate, torch.stack)


def reshapes(node: fx.Node) -> bool:
    """Whether the entries of its first argument are all that it has, in the same order."""
    if node.target in RESHAPES:
        return True
    if node.target is not operator.getitem or not isinstance(node.args[0], fx.Node):
        return False
    how = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    plain = all(x is None or x is Ellipsis or isinstance(x, slice) or type(x) is int for x in how)
    given = example_of(node.args[0])
    return plain and isinstance(given, torch.Tensor) and always_equal(given.numel(), example_of(node).numel())


def order_of(node: fx.Node) -> list[int] | None:
    """The dimensions of what a call is given, in the order that they have in its result."""
    x, *dims = node.args
    rank = example_of(x).dim()
    dims = dims[0] if len(dims) == 1 and isinstance(dims[0], list | tuple) else dims
    if node.kwargs or not all(isinstance(d, int) for d in dims):
        return None
    dims = [d % rank for d in dims]
    if node.target in TRANSPOSES and len(dims) == 2:
        a, b = dims
        dims = [b if d == a else a if d == b else d for d in range(rank)]
    return dims if len(dims) == rank else None


def side_by_side(node: fx.Node) -> tuple[int, int] | None:
    """The dimension along which a call puts tensors together, and how many they are."""
    tensors, *dims = node.args or (None,)
    dims += node.kwargs.values()
    if not isinstance(tensors, list | tuple) or len(dims) > 1 or node.kwargs.keys() - {"dim"}:
        return None
    dim = dims[0] if dims else 0
    return (dim % example_of(node).dim(), len(tensors)) if isinstance(dim, int) else None
