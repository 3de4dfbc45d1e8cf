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
from functools import cached_property
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from .._compat import always_equal, suppressed_guards
from .capture.modes import switches_autocast
from .effects import NOWHERE, overlap
from .joins import Join, joins
from .rewrite import same_strides
from .rows import BATCHED, OPAQUE, width
from .schedule import Schedule

RESHAPES = ("reshape", "view", "flatten", torch.reshape, torch.flatten)
TRANSPOSES = ("transpose", torch.transpose)
REORDERS = (*TRANSPOSES, "permute", torch.permute)


def fissioned(schedule: Schedule) -> fx.GraphModule | None:
    """A copy of the graph with functions of rows behind what joined their results; None if there are none to move."""
    old = schedule.gm.graph
    moves = [(j, m) for j in joins(schedule) if (m := _moved(schedule, j, j.parts, j.users)) and m.hides]
    if not moves or switches_autocast(old):
        return None
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(old, mapping)).meta = copy.copy(old.output_node().meta)
    for join, moved in moves:
        _move(join, moved, graph, mapping)
    graph.lint()
    out = fx.GraphModule(schedule.gm, graph)
    out.meta = schedule.gm.meta
    return out


@dataclass(frozen=True)
class Column:
    """One argument of a call that each part is: one for all, or each part's own."""

    given: Sequence[Any]
    own: bool


@dataclass(frozen=True)
class Kept:
    """Parts that are joined as they are, along this dimension."""

    parts: tuple[fx.Node, ...]
    dim: int


@dataclass(frozen=True)
class Moved:
    """Parts that are one function each, which is called of joined arguments instead.

    ``hides``: whether it, or one inside of it, is a function that the analysis does not look into. Else those of
    several joined arguments stay where they are: the parts of a sum are one attention together, and none by themselves.
    """

    parts: Sequence[fx.Node]
    op: str
    target: Any
    args: Sequence[Any]
    kwargs: dict[str, Any]

    @cached_property
    def joined(self) -> list[Kept | Moved]:
        return [a for a in self.args if isinstance(a, Kept | Moved)]

    @cached_property
    def hides(self) -> bool:
        return (
            self.target in OPAQUE
            or self.target in BATCHED
            or any(isinstance(a, Moved) and a.hides for a in self.joined)
        )


def _moved(schedule: Schedule, join: Join, parts: Sequence[Any], users: Sequence[fx.Node]) -> Moved | None:
    """The function that all parts are the results of; None if it cannot be moved behind the join."""
    if not all(isinstance(n, fx.Node) and list(n.users) == [user] for n, user in zip(parts, users, strict=True)):
        return None
    first = parts[0]
    if not all(_alike(n, first) and _movable(schedule, n, join.node) for n in parts):
        return None

    def inside(given: Sequence[fx.Node], along: Join = join) -> Kept | Moved:
        found = _moved(schedule, along, given, parts)
        kept = found is None or not (found.hides or len(found.joined) == 1)
        return Kept(tuple(given), along.dim) if found is None or kept else found

    if first.target in RESHAPES:
        sizes = _reshaped(join, parts)
        given = inside([p.args[0] for p in parts]) if sizes is not None else None
        return None if sizes is None else Moved(parts, "call_method", "reshape", [given, *sizes], {})
    if first.target in REORDERS:
        order = _order(first)
        if order is None or any(_order(n) != order for n in parts):
            return None
        whole, dim = _joined_order(join, order)
        given = inside([p.args[0] for p in parts], replace(join, dim=dim))
        return Moved(parts, "call_method", "permute", [given, *whole], {})
    rows = _tensor(first).dim() - 1 if first.target in BATCHED else width(first)
    columns = [
        Column(given, not all(_same(x, given[0]) for x in given))
        for given in zip(*(n.args for n in parts), strict=True)
    ]
    if rows is None or not any(c.own for c in columns) or (rows and any(c.own for c in columns[1:])):
        return None
    if not all(_fits(join, c, parts, rows) for c in columns):
        return None
    args = [inside(c.given) if c.own else c.given[0] for c in columns]
    return Moved(parts, first.op, first.target, args, first.kwargs)


def _reshaped(join: Join, parts: Sequence[fx.Node]) -> list[int] | None:
    """The sizes of a reshape of the dimensions behind that of the places: numbers, and one other at most."""
    before, behind = ([_tensor(n).shape for n in nodes] for nodes in ([p.args[0] for p in parts], parts))
    dim, rest = join.dim, join.dim + (not join.stacks)
    kept = (_equal(x[:rest], y[:rest]) for x, y in zip(before, behind, strict=True))
    if not all(kept) or not all(_equal(_without(x, join), _without(before[0], join)) for x in before):
        return None
    length = len(parts) if join.stacks else sum(x[dim] for x in behind)
    sizes = [n if isinstance(n, int) else -1 for n in (*behind[0][:dim], length, *behind[0][rest:])]
    return sizes if sizes.count(-1) <= 1 else None


def _order(node: fx.Node) -> list[int] | None:
    """The dimensions of what a call is given, in the order that they have in its result."""
    x, *dims = node.args
    rank = _tensor(x).dim()
    dims = dims[0] if len(dims) == 1 and isinstance(dims[0], list | tuple) else dims
    if node.kwargs or not all(isinstance(d, int) for d in dims):
        return None
    dims = [d % rank for d in dims]
    if node.target in TRANSPOSES and len(dims) == 2:
        a, b = dims
        dims = [b if d == a else a if d == b else d for d in range(rank)]
    return dims if len(dims) == rank else None


def _joined_order(join: Join, order: Sequence[int]) -> tuple[list[int], int]:
    """The order of the dimensions of the joined tensor, and that along which it was joined before."""
    if not join.stacks:
        return list(order), order[join.dim]
    moved = [d + (d >= join.dim) for d in order]
    return [*moved[: join.dim], join.dim, *moved[join.dim :]], join.dim


def _alike(node: fx.Node, first: fx.Node) -> bool:
    """Whether two calls differ in their arguments alone, all of one format: nothing is promoted."""
    tensors = [x for n in (node, first) for x in map(_tensor, (n, *n.all_input_nodes)) if isinstance(x, torch.Tensor)]
    dtype = tensors[0].dtype if tensors else None
    return (
        (node.op, node.target, len(node.args), repr(node.kwargs))
        == (first.op, first.target, len(first.args), repr(first.kwargs))
        and not any(isinstance(x, fx.Node) for x in node.kwargs.values())
        and isinstance(_tensor(node), torch.Tensor)
        and dtype is not None
        and dtype.is_floating_point
        and all(x.dtype == dtype for x in tensors)
    )


def _same(x: Any, y: Any) -> bool:
    return type(x) is type(y) and x == y


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
    rank = _tensor(parts[0]).dim()
    if column.own:
        given = list(map(_tensor, column.given))
        if not all(isinstance(x, torch.Tensor) and x.dim() == rank for x in given) or not join.leaves_alone(rank, rows):
            return False
        if join.stacks:
            return all(_equal(x.shape, given[0].shape) for x in given)
        lengths = all(
            always_equal(x.shape[join.dim], _tensor(n).shape[join.dim]) for x, n in zip(given, parts, strict=True)
        )
        return lengths and all(_equal(_without(x.shape, join), _without(given[0].shape, join)) for x in given)
    shared = _tensor(column.given[0])
    return bool(rows) or not isinstance(shared, torch.Tensor) or join.leaves_alone(rank, shared.dim())


def _tensor(arg: Any) -> Any:
    """The example of a value of the graph, where it is a tensor or a size; None of what is no value."""
    return arg.meta.get("example_value") if isinstance(arg, fx.Node) else None


def _equal(shape: Sequence[Any], other: Sequence[Any]) -> bool:
    return len(shape) == len(other) and all(map(always_equal, shape, other))


def _without(shape: Sequence[Any], join: Join) -> list[Any]:
    """The sizes that all parts must have."""
    return [n for d, n in enumerate(shape) if join.stacks or d != join.dim]


def _move(join: Join, moved: Moved, graph: fx.Graph, mapping: dict[fx.Node, fx.Node]) -> None:
    behind: list[fx.Node] = []
    made: dict[Kept, fx.Node] = {}  # several functions may be called with the same parts

    def call(arg: Any) -> Any:
        if isinstance(arg, Kept):
            if arg not in made:
                function = torch.stack if join.stacks else torch.cat
                parts = [mapping[n] for n in arg.parts]
                made[arg] = _made(graph, "call_function", function, (parts, arg.dim), {}, arg.parts[0])
            return made[arg]
        if isinstance(arg, Moved):
            behind.extend(arg.parts)
            args = tuple(map(call, arg.args))
            if arg.target in BATCHED:
                return _at_once(graph, join, arg, args)
            return _made(graph, arg.op, arg.target, args, arg.kwargs, arg.parts[0])
        return map_arg(arg, mapping.__getitem__)

    with graph.inserting_before(mapping[join.node]):
        new = call(moved)
        if join.into is not None:
            places = (*[slice(None)] * join.dim, slice(join.into.start, join.into.stop))
            graph.call_function(operator.setitem, (mapping[join.into.tensor], places, new)).meta = join.node.meta.copy()
        elif not same_strides(new.meta["example_value"], _tensor(join.node)):
            new = _made(graph, "call_method", "contiguous", (new,), {}, join.node)
    if join.into is None:
        mapping[join.node].replace_all_uses_with(new)
    for node in (*join.needless, *behind):
        graph.erase_node(mapping[node])
    mapping[join.node] = new


def _at_once(graph: fx.Graph, join: Join, moved: Moved, args: tuple[Any, ...]) -> fx.Node:
    """A call of a function that has one dimension for all its rows."""
    like = moved.parts[0]
    if not join.stacks:
        return _made(graph, moved.op, moved.target, args, moved.kwargs, like)
    rows = _made(graph, "call_method", "flatten", (args[0], 0, 1), {}, like)
    rows = _made(graph, moved.op, moved.target, (rows, *args[1:]), moved.kwargs, like)
    n = len(moved.parts)
    return _made(graph, "call_method", "unflatten", (rows, 0, (-1, n) if join.dim else (n, -1)), {}, like)


def _made(
    graph: fx.Graph, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: fx.Node
) -> fx.Node:
    """A call in the place of another node's."""
    node = graph.create_node(op, target, args, kwargs)
    node.meta = copy.copy(like.meta)
    fakes = map_arg(args, lambda n: n.meta["example_value"])
    mode = like.meta["example_value"].fake_mode
    with mode, suppressed_guards(mode), torch.no_grad():
        called = getattr(fakes[0], target)(*fakes[1:], **kwargs) if op == "call_method" else target(*fakes, **kwargs)
        node.meta["example_value"] = called
    return node
