"""Calls that change no entry, only where it is: reshapes, orders of dimensions, tensors that are put side by side."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..._compat import always_equal
from ..capture.effects import Effects
from ..examples import example_of, same_shape
from .calls import joins_tensors

RESHAPES = frozenset[Any]({
    *("reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous"),
    *(torch.reshape, torch.flatten, torch.unflatten, torch.squeeze, torch.unsqueeze),
})  # fmt: skip
TRANSPOSES = ("transpose", "swapaxes", "swapdims", torch.transpose, torch.swapaxes, torch.swapdims)
REORDERS = (*TRANSPOSES, "permute", torch.permute)

aten = torch.ops.aten
KEEP_ORDER = (aten.unsqueeze, aten.view)
"""Views of all entries in their order."""


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


@dataclass(frozen=True)
class SideBySide:
    """Tensors that are put together along dimension ``dim`` of the result, a new one where they are stacked."""

    parts: Sequence[fx.Node]
    dim: int
    stacks: bool


def side_by_side(node: fx.Node, effects: Effects) -> SideBySide | None:
    """What a call puts together, by the operation that it ends in, ``cat`` or ``stack``, whatever it is called.

    ``vstack`` and its like first give each part dimensions of one entry. If the result has one dimension more, with an
    entry for each part, that is the only one which any part was given: these are stacked.
    """
    parts: Any = node.args[0] if node.args else node.kwargs.get("tensors")
    if not joins_tensors(node, effects) or not isinstance(parts, list | tuple):
        return None
    shapes = [x.shape for x in map(example_of, parts) if isinstance(x, torch.Tensor)]
    if len(shapes) != len(parts):
        return None
    *before, last = effects.ran[node]
    dim = effects.along[node]
    if not before:
        return SideBySide(parts, dim, stacks=last is aten.stack.default)
    found = example_of(node).shape
    stacked = all(same_shape([*s[:dim], len(parts), *s[dim:]], found) for s in shapes)
    certain = stacked and last is aten.cat.default and all(f.overloadpacket in KEEP_ORDER for f in before)
    return SideBySide(parts, dim, stacks=True) if certain else None
