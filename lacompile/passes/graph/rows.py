"""Functions of rows: those of the last dimensions of their first argument, and how many dimensions that are."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ..capture.effects import Effects
from ..examples import example_of
from .calls import computes_other_than, is_pointwise_call


def width(node: fx.Node, effects: Effects) -> int | None:
    """How many of the last dimensions a call works on; for each place in those before it does the same.

    None where that is not known. The other arguments must be the same for all places.
    """
    return 0 if is_pointwise_call(node, effects) else width_of_rows(node)


def width_of_rows(node: fx.Node) -> int | None:
    """The same of a function that is none of single entries."""
    found = WIDTHS.get(node.target)
    return None if found is None else found(node)


def hides(node: fx.Node, effects: Effects) -> bool:
    """Whether the analysis of sums does not look into a function of rows, or not if what it is given is one."""
    if node.target in OPAQUE or node.target in BATCHED:
        return True
    return is_pointwise_call(node, effects) and computes_other_than(node, effects, ALGEBRA)


def _argument(node: fx.Node, n: int, name: str) -> Any:
    return node.args[n] if n < len(node.args) else node.kwargs.get(name)


def _kept(node: fx.Node) -> int | None:
    """The width of a sum or a mean along dimensions that are counted from the end, and kept."""
    dims = _argument(node, 1, "dim")
    dims = [dims] if isinstance(dims, int) else dims
    if not _argument(node, 2, "keepdim") or not isinstance(dims, list | tuple) or not dims or any(d >= 0 for d in dims):
        return None
    return -min(dims)


def _named(node: fx.Node) -> int | None:
    shape = _argument(node, 1, "normalized_shape")
    return len(shape) if isinstance(shape, list | tuple) else None


def _along(n: int, default: Any = None) -> Callable[[fx.Node], int | None]:
    """The width of a function along a dimension that is counted from the end."""

    def found(node: fx.Node) -> int | None:
        dim = _argument(node, n, "dim")
        dim = default if dim is None else dim
        return -dim if isinstance(dim, int) and dim < 0 else None

    return found


def _times_a_matrix(node: fx.Node) -> int | None:
    example = example_of(node.args[1]) if len(node.args) == 2 else None
    return 1 if isinstance(example, torch.Tensor) and example.dim() == 2 else None


WIDTHS: dict[Any, Callable[[fx.Node], int | None]] = {
    F.linear: lambda node: 1,
    **dict.fromkeys((operator.matmul, torch.matmul, "matmul"), _times_a_matrix),
    F.layer_norm: _named,
    F.rms_norm: _named,
    torch.rms_norm: _named,
    F.softmax: _along(1),
    torch.softmax: _along(1),
    "softmax": _along(1),
    F.normalize: _along(2),
    F.glu: _along(1, -1),
    **dict.fromkeys((torch.mean, "mean", torch.sum, "sum"), _kept),
}
OPAQUE = frozenset[Any]({f for f in WIDTHS if f not in (torch.sum, "sum")})
"""Functions of rows that the analysis of sums does not look into, or not if what they are given is one."""
BATCHED = frozenset[Any]({F.group_norm, torch.group_norm})
"""Functions of all dimensions behind the first one, of which there is one alone for all rows."""
ALGEBRA = frozenset[Any](
    getattr(torch.ops.aten, name) for name in (
        "add", "sub", "rsub", "mul", "div", "neg", "lerp", "addcmul", "addcdiv", "where", "masked_fill",
        "pow", "square", "sqrt", "rsqrt", "reciprocal", "exp",
    )
)  # fmt: skip
"""Pointwise operations of which the analysis knows what they make of sums; moved, they would take one apart."""
