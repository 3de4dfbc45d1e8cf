"""The pieces of a series, joined (see ``lift/series.py``), or computed at once where the function is one of rows.

``torch.stack([linear(x[:, t], w, b) for t in range(N)], 1)`` is right for any function; of this one it is known that
``linear(x, w, b)`` are the same numbers, and one call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.amp.autocast_mode import _enter_autocast

from ...facts import Call, Expr, Value
from ..affine import ONE, ZERO, Aff
from ..leaves import HERE, Leaves, Opaque, Series
from .pieces import CannotEmit

ON_ROWS = {
    torch.nn.functional.linear: 1,
    torch.nn.functional.layer_norm: None,
    torch.nn.functional.rms_norm: None,
    torch.rms_norm: None,
}
"""Functions of the last dimensions of their first argument, and of how many: None, of those that the second names."""


@dataclass(frozen=True)
class Joined:
    """A recipe for the places from ``start`` on."""

    expr: Expr
    start: int
    length: int


def joined_pieces(leaves: Leaves, series: Series, first: int, last: int) -> Joined:
    """Those that hold the places from the first to the last.

    Raises:
        CannotEmit: the program does not compute one of them.
    """
    start = max((s for s in series.pieces if s <= first), default=first)
    nodes: list[fx.Node] = []
    end = start
    while end <= last:
        if end not in series.pieces:
            raise CannotEmit("a value for every place", f"none for place {end}")
        node, length = series.pieces[end]
        nodes.append(node)
        end += length
    if len(nodes) > 1 and _is_on_rows(series, nodes):
        rest = nodes[0].args[1:]
        rows = _rows(leaves, series, start, end) or _side_by_side([n.args[0] for n in nodes], series)
        return Joined(
            Call(_function(nodes[0]), (rows, *map(_recipe, rest)), _recipe(nodes[0].kwargs)), start, end - start
        )
    return Joined(_side_by_side(nodes, series), start, end - start)


def _function(node: fx.Node) -> Callable[..., Any]:
    assert callable(node.target)
    return node.target


def _side_by_side(nodes: Sequence[Any], series: Series) -> Expr:
    if len(nodes) == 1 and not series.stacked:
        return Value(nodes[0])
    return Call(torch.stack if series.stacked else torch.cat, ([Value(n) for n in nodes], series.dim))


def _is_on_rows(series: Series, nodes: Sequence[fx.Node]) -> bool:
    """Whether all are one function of the dimensions behind that of the series, and nothing else tells them apart."""
    first = nodes[0]
    if first.target not in ON_ROWS or not first.args or not isinstance(first.args[0], fx.Node):
        return False
    if any(n.args[1:] != first.args[1:] or n.kwargs != first.kwargs for n in nodes):
        return False
    if first.graph.find_nodes(op="call_function", target=_enter_autocast):
        return False  # in another region the same call may round in another way
    count = ON_ROWS[first.target]
    if count is None:
        named = first.args[1] if len(first.args) > 1 else None
        if not isinstance(named, list | tuple):
            return False
        count = len(named)
    return series.dim <= first.args[0].meta["example_value"].dim() - count


def _rows(leaves: Leaves, series: Series, start: int, end: int) -> Expr | None:
    """What the function is called with at all places, if that is a part of one tensor of the graph."""
    if series.of is None:
        return None
    leaf, idx = series.of
    kind = leaves[leaf].kind
    dim = series.dim
    own = [ZERO if n == ONE else Aff.var(d - (series.stacked and d > dim)) for d, n in enumerate(leaves[leaf].shape)]
    if not isinstance(kind, Opaque) or list(idx) != [*own[:dim], HERE, *own[dim + 1 :]]:
        return None
    if kind.series is not None:
        inner = joined_pieces(leaves, kind.series, start, end - 1)
        return Call(torch.narrow, (inner.expr, dim, start - inner.start, end - start))
    whole = leaves[leaf].shape[dim] == Aff.lit(end) and start == 0
    if kind.node is None:
        return None
    return Value(kind.node) if whole else Call(torch.narrow, (Value(kind.node), dim, start, end - start))


def _recipe(arg: Any) -> Any:
    """An argument of a call of the graph, as one of a recipe."""
    if isinstance(arg, fx.Node):
        return Value(arg)
    if isinstance(arg, list | tuple):
        return type(arg)(map(_recipe, arg))
    return {k: _recipe(v) for k, v in arg.items()} if isinstance(arg, dict) else arg
