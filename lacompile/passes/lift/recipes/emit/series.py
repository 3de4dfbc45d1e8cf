"""The pieces of a series, joined (see ``interpret/series.py``), or computed at once where the function is one of rows.

``torch.stack([linear(x[:, t], w, b) for t in range(N)], 1)`` is right for any function; of this one it is known that
``linear(x, w, b)`` are the same numbers, and one call.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ....capture.modes import switches_autocast
from ....facts import Call, Expr, Value
from ....graph.rows import width_of_rows
from ...domain.affine import ONE, ZERO, Aff
from ...domain.kinds import HERE, Opaque, Series
from ...domain.leaves import Leaves
from .pieces import CannotEmit, held_by


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
    before = bisect(series.starts, first)
    start = series.starts[before - 1] if before else first
    nodes: list[fx.Node] = []
    end = start
    while end <= last:
        if end not in series.pieces:
            raise CannotEmit("a value for every place", f"none for place {end}")
        node, length = series.pieces[end]
        nodes.append(node)
        end += length
    expr = _at_once(leaves, series, nodes, start, end) if len(nodes) > 1 else None
    return Joined(_side_by_side(nodes, series) if expr is None else expr, start, end - start)


def _side_by_side(nodes: Sequence[fx.Node], series: Series) -> Expr:
    if len(nodes) == 1 and not series.stacked:
        return Value(nodes[0])
    return Call(torch.stack if series.stacked else torch.cat, ([Value(n) for n in nodes], series.dim))


def _at_once(leaves: Leaves, series: Series, nodes: Sequence[fx.Node], start: int, end: int) -> Expr | None:
    """One call for all places: of a function of the dimensions behind that of the places, of whose arguments none but
    the first differs, and none was written into.
    """
    first, last_dims = nodes[0], width_of_rows(nodes[0])
    given = [n.args[0] if n.args else None for n in nodes]
    tensors = [x for x in given if isinstance(x, fx.Node)]
    if not last_dims or not callable(first.target) or not series.as_made or len(tensors) < len(nodes):
        return None
    if any(n.args[1:] != first.args[1:] or n.kwargs != first.kwargs for n in nodes):
        return None
    if switches_autocast(first.graph):
        return None
    examples = [x.meta["example_value"] for x in tensors]
    if series.dim > examples[0].dim() - last_dims - (not series.stacked):
        return None
    rows = _rows(leaves, series, examples, start, end) or _side_by_side(tensors, series)
    return Call(first.target, (rows, *map(_recipe, first.args[1:])), _recipe(first.kwargs))


def _rows(leaves: Leaves, series: Series, examples: Sequence[torch.Tensor], start: int, end: int) -> Expr | None:
    """What the function is called with at all places, if that is a part of one tensor of the graph as it is."""
    if series.of is None:
        return None
    (leaf, idx), dim = series.of, series.dim
    found = leaves[leaf]
    kind, shape = found.kind, found.shape
    own = [ZERO if n == ONE else Aff.var(d - (series.stacked and d > dim)) for d, n in enumerate(shape)]
    if not isinstance(kind, Opaque) or list(idx) != [*own[:dim], HERE, *own[dim + 1 :]]:
        return None
    if any(x.dtype != found.dtype or x.dim() != len(shape) - series.stacked for x in examples):
        return None
    if kind.series is not None:
        if (kind.series.dim, kind.series.stacked) != (dim, series.stacked):
            return None
        inner = joined_pieces(leaves, kind.series, start, end - 1)
        return Call(torch.narrow, (inner.expr, dim, start - inner.start, end - start))
    if kind.node is None:
        return None
    whole = start == 0 and shape[dim] == Aff.lit(end)
    return held_by(kind) if whole else Call(torch.narrow, (held_by(kind), dim, start, end - start))


def _recipe(arg: Any) -> Any:
    """An argument of a call of the graph, as one of a recipe."""
    if isinstance(arg, fx.Node):
        return Value(arg)
    if isinstance(arg, list | tuple):
        return type(arg)(map(_recipe, arg))
    return {k: _recipe(v) for k, v in arg.items()} if isinstance(arg, dict) else arg
