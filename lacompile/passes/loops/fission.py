"""Loop fission: what a loop does to each of its results by itself is done to all of them at once, behind the loop.

A program that projects inside its loop joins ``[linear(o_t, w) for t ...]``. Those are the same numbers as
``linear(stack([o_t for t ...]), w)``, and what is projected there is one tensor, a whole attention perhaps. Only
functions of rows are moved, of values that nothing else reads, and over memory that nobody writes to in between.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ..._compat import always_equal
from ..capture.effects import NOWHERE, overlap
from ..capture.modes import switches_autocast
from ..examples import example_of, same_shape
from ..graph.calls import is_cast_call
from ..graph.layouts import REORDERS, SideBySide, order_of, reshapes, side_by_side
from ..graph.rows import BATCHED, hides, width
from ..graph.schedule import Schedule
from .joins import Join, joins
from .moves import Kept, Moved, Turned, Wider, functions, move
from .pieces import index_of_join, piece_of


def fissioned(schedule: Schedule) -> fx.GraphModule | None:
    """A copy of the graph with functions of rows behind what joined their results; None if there are none to move."""
    old = schedule.gm.graph
    moves = [] if switches_autocast(old) else _moves(schedule)
    if not moves:
        return None
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(old, mapping)).meta = copy.copy(old.output_node().meta)
    for node in reversed(schedule.nodes):  # else what they read could not go
        if node in schedule.unread:
            graph.erase_node(mapping[node])
    for join, moved in moves:
        move(schedule, join, moved, graph, mapping)
    graph.lint()
    out = fx.GraphModule(schedule.gm, graph)
    out.meta = schedule.gm.meta
    return out


def _moves(schedule: Schedule) -> list[tuple[Join, Moved | Turned]]:
    """The joins with something to move behind them; of one within another, as that of a token's heads, the other."""
    found: list[tuple[Join, Moved | Turned]] = []
    gone: set[fx.Node] = set()
    for join in sorted(joins(schedule), key=lambda j: schedule.order[j.node], reverse=True):
        moved = Search(schedule, join).found()
        parts = {n for m in functions(moved) for n in m.gone}
        if moved is not None and (moved.hides or join.ahead) and gone.isdisjoint(parts | {join.node}):
            found.append((join, moved))
            gone |= parts
    return found[::-1]


@dataclass(frozen=True)
class Column:
    """One argument of a call that each part is: one for all, or each part's own."""

    given: Sequence[Any]
    own: bool


class Search:
    """What can be moved behind one join."""

    def __init__(self, schedule: Schedule, join: Join):
        self._schedule, self._join = schedule, join
        self._stays: set[fx.Node] = set()
        self._known: dict[Any, Moved | Turned | None] = {}

    def found(self) -> Moved | Turned | None:
        """The function that all parts are the results of; None if it cannot be moved.

        What is moved is read by what is moved alone: a value that another node reads stays, and with it all that it
        is computed from.
        """
        while True:
            found = self._moved(self._join, self._join.parts)
            moved = list(functions(found))
            gone = {n for m in moved for n in m.gone}
            alone = gone.union(self._join.users, self._schedule.unread)
            read = {n for n in gone if not n.users.keys() <= alone}
            read |= gone.intersection(n for m in moved for n in m.given)
            if not read:
                return found
            self._stays |= read
            self._known.clear()

    def _moved(self, join: Join, parts: Sequence[Any]) -> Moved | Turned | None:
        """The function along a dimension of the parts, or else of what is in front of them."""
        key = (tuple(parts), join.dim, join.stacks)
        if key not in self._known:
            found = self._along(join, parts)
            if found is None and not join.in_front and _of_one_shape(parts):
                turned = self._along(join.turned, parts)
                found = Turned(turned, join) if turned is not None and turned.moves else None
            self._known[key] = found
        return self._known[key]

    def _along(self, join: Join, parts: Sequence[Any]) -> Moved | None:
        if not all(isinstance(n, fx.Node) and n not in self._stays for n in parts):
            return None
        first = parts[0]
        if not all(_alike(self._schedule, n, first) and _movable(self._schedule, n, join.node) for n in parts):
            return None

        def inside(given: Sequence[fx.Node], along: Join = join) -> Kept | Moved | Turned:
            found = self._moved(along, given)
            kept = found is None or (isinstance(found, Moved) and not found.moves)
            return Kept(tuple(given), along.dim, along.stacks) if found is None or kept else found

        if all(map(reshapes, parts)):
            sizes = _reshaped(join, parts)
            given = inside([p.args[0] for p in parts]) if sizes is not None else None
            return None if sizes is None else Moved(join, parts, "call_method", "reshape", [given, *sizes], {})
        if first.target in REORDERS:
            order = order_of(first)
            if order is None or any(order_of(n) != order for n in parts):
                return None
            whole, dim = _joined_order(join, order)
            given = inside([p.args[0] for p in parts], replace(join, dim=dim))
            return Moved(join, parts, "call_method", "permute", [given, *whole], {})
        if put := [found for p in parts if (found := side_by_side(p, self._schedule.effects)) is not None]:
            if len(put) < len(parts) or (dim := _put_behind(join, put)) is None:
                return None
            given = [inside(column) for column in zip(*(p.parts for p in put), strict=True)]
            function = torch.stack if put[0].stacks else torch.cat
            return Moved(join, parts, "call_function", function, [given, dim], {})
        if all(pieces := [piece_of(n) for n in parts]):
            through = [p.through for p in pieces if p is not None and p.through is not None]
            where = index_of_join(join, [p for p in pieces if p is not None])
            if where is None or not all(
                n not in self._stays and _movable(self._schedule, n, join.node) for n in through
            ):
                return None
            index, dim = where
            given = inside([p.of for p in pieces if p is not None], replace(join, dim=dim))
            return Moved(join, parts, "call_function", operator.getitem, [given, index], {}, through)
        rows = self._width(parts)
        columns = [
            Column(given, not all(self._same(x, given[0]) for x in given))
            for given in zip(*(n.args for n in parts), strict=True)
        ]
        if rows is None or not any(c.own for c in columns) or (rows and any(c.own for c in columns[1:])):
            return None
        if not all(_fits(join, c, parts, rows) for c in columns):
            return None
        rank = example_of(first).dim()

        def joined(given: Sequence[Any]) -> Kept | Moved | Turned | Wider:
            found, lacks = inside(given), rank - example_of(given[0]).dim()
            return Wider(found, lacks, given[0]) if lacks else found

        args = [joined(c.given) if c.own else c.given[0] for c in columns]
        opaque = hides(first, self._schedule.effects)
        return Moved(join, parts, first.op, first.target, args, first.kwargs, opaque=opaque)

    def _width(self, parts: Sequence[fx.Node]) -> int | None:
        """How many of the last dimensions each part works on, if that is one number."""
        if parts[0].target in BATCHED:
            return example_of(parts[0]).dim() - 1
        found = {width(n, self._schedule.effects) for n in parts}
        return found.pop() if len(found) == 1 else None

    def _same(self, x: Any, y: Any) -> bool:
        """Equal numbers, or one value; each step may have computed it again, as a part of the weights."""
        if isinstance(x, fx.Node) and isinstance(y, fx.Node):
            return x is y or self._schedule.numbers[x] == self._schedule.numbers[y]
        return type(x) is type(y) and x == y


def _reshaped(join: Join, parts: Sequence[fx.Node]) -> list[int] | None:
    """The sizes of a reshape of the dimensions behind that of the places: numbers, and one other at most."""
    before, behind = ([example_of(n).shape for n in nodes] for nodes in ([p.args[0] for p in parts], parts))
    dim, rest = join.dim, join.dim + (not join.stacks)
    kept = (same_shape(x[:rest], y[:rest]) for x, y in zip(before, behind, strict=True))
    if not all(kept) or not all(same_shape(_without(x, join), _without(before[0], join)) for x in before):
        return None
    length = len(parts) if join.stacks else sum(x[dim] for x in behind)
    sizes = [n if isinstance(n, int) else -1 for n in (*behind[0][:dim], length, *behind[0][rest:])]
    return sizes if sizes.count(-1) <= 1 else None


def _put_behind(join: Join, parts: Sequence[SideBySide]) -> int | None:
    """The dimension of the joined tensor along which each part is put together, as of heads; behind that of the places.

    None if it is in front of them, or if parts differ in it or in what they are put together of.
    """
    first = parts[0]
    how = {(p.dim, p.stacks, len(p.parts)) for p in parts}
    if len(how) > 1 or first.dim < join.dim + (not join.stacks):
        return None
    alike = all(_of_one_shape(column) for column in zip(*(p.parts for p in parts), strict=True))
    return first.dim + join.stacks if alike else None


def _joined_order(join: Join, order: Sequence[int]) -> tuple[list[int], int]:
    """The order of the dimensions of the joined tensor, and that along which it was joined before."""
    if not join.stacks:
        return list(order), order[join.dim]
    moved = [d + (d >= join.dim) for d in order]
    return [*moved[: join.dim], join.dim, *moved[join.dim :]], join.dim


def _alike(schedule: Schedule, node: fx.Node, first: fx.Node) -> bool:
    """Whether two calls differ in their arguments alone, all of one format, or cast from one: nothing is promoted.

    A condition is of no other format than what it is beside or compares, which it does not promote.
    """
    calls = [(n.op, n.target, len(n.args), repr(n.kwargs)) for n in (node, first)]
    if calls[0] != calls[1] or any(isinstance(x, fx.Node) for x in node.kwargs.values()):
        return False
    formats, others = ([_format(n), *map(_format, n.all_input_nodes)] for n in (node, first))
    if formats[0] is None or not all(f in (None, torch.bool) or f.is_floating_point for f in formats):
        return False
    if is_cast_call(node, schedule.effects):
        return formats == others
    fractions = set(formats + others) - {None, torch.bool}
    if torch.bool not in (*formats, *others):
        return len(fractions) == 1
    return formats == others and len(fractions) == 1 and fractions <= set(formats[1:])


def _format(node: fx.Node) -> torch.dtype | None:
    """That of a tensor; None of what is none."""
    example = example_of(node)
    return example.dtype if isinstance(example, torch.Tensor) else None


def _movable(schedule: Schedule, node: fx.Node, behind: fx.Node) -> bool:
    """Whether it computes there what it computes where it is."""
    effects, order, modes = schedule.effects, schedule.order, schedule.records_gradients
    read = NOWHERE.union(*(effects.lives.get(n, NOWHERE) for n in node.all_input_nodes))
    writes = overlap(effects.writes.get(node, NOWHERE), read)  # others are into what it makes itself
    if node in effects.impure or writes or modes[node] != modes[behind]:
        return False
    return not schedule.is_written(read, order[node], order[behind])


def _fits(join: Join, column: Column, parts: Sequence[fx.Node], rows: int) -> bool:
    """Whether the join of an argument is one of the joined results: their places are the same."""
    rank = example_of(parts[0]).dim()
    if column.own:
        given = list(map(example_of, column.given))
        if join.in_front and not rows and _of_one_shape(column.given):
            return given[0].dim() <= rank  # one that lacks dimensions in front is broadcast along these
        if not all(isinstance(x, torch.Tensor) and x.dim() == rank for x in given) or not join.leaves_alone(rank, rows):
            return False
        if join.stacks:
            return all(same_shape(x.shape, given[0].shape) for x in given)
        lengths = all(
            always_equal(x.shape[join.dim], example_of(n).shape[join.dim]) for x, n in zip(given, parts, strict=True)
        )
        return lengths and all(same_shape(_without(x.shape, join), _without(given[0].shape, join)) for x in given)
    shared = example_of(column.given[0])
    return bool(rows) or not isinstance(shared, torch.Tensor) or join.leaves_alone(rank, shared.dim())


def _of_one_shape(parts: Sequence[Any]) -> bool:
    examples = [example_of(n) for n in parts]
    return all(isinstance(x, torch.Tensor) and same_shape(x.shape, examples[0].shape) for x in examples)


def _without(shape: Sequence[Any], join: Join) -> list[Any]:
    """The sizes that all parts must have."""
    return [n for d, n in enumerate(shape) if join.stacks or d != join.dim]
