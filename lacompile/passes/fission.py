"""Loop fission: what a loop does to each of its results by itself is done to all of them at once, behind the loop.

A program that projects inside its loop joins ``[linear(o_t, w) for t ...]``. Those are the same numbers as
``linear(stack([o_t for t ...]), w)``, and what is projected there is one tensor, a whole attention perhaps. Only
functions of rows are moved, of values that nothing else reads, and over memory that nobody writes to in between.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from .._compat import suppressed_guards
from .capture.modes import AUTOCAST
from .effects import NOWHERE, overlap
from .rewrite import same_strides
from .rows import OPAQUE, width
from .schedule import Schedule

RESHAPES = ("reshape", "view", "flatten", torch.reshape, torch.flatten)


def fissioned(schedule: Schedule) -> fx.GraphModule | None:
    """A copy of the graph with functions of rows behind what joined their results; None if there are none to move."""
    old = schedule.gm.graph
    found = [
        j
        for f in (torch.stack, torch.cat)
        for n in old.find_nodes(op="call_function", target=f)
        if (j := _join(schedule, n))
    ]
    joins = [j for j in found if _hidden(schedule, j, j.parts, [j.node] * len(j.parts))]
    if not joins or any(old.find_nodes(op="call_function", target=f) for f in AUTOCAST):
        return None
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(old, mapping)).meta = copy.copy(old.output_node().meta)
    for join in joins:
        _move(schedule, join, graph, mapping)
    graph.lint()
    out = fx.GraphModule(schedule.gm, graph)
    out.meta = schedule.gm.meta
    return out


@dataclass(frozen=True)
class Join:
    """Tensors side by side along dimension ``dim``, a new one where they are stacked."""

    node: fx.Node
    parts: Sequence[Any]
    dim: int
    stacks: bool

    def leaves_alone(self, rank: int, last: int) -> bool:
        """Whether the dimension is none of the last ones of a part of this rank."""
        return self.dim <= rank - last - (not self.stacks)


def _join(schedule: Schedule, node: fx.Node) -> Join | None:
    """A join whose result nobody writes into: what a function saves for its gradient must stay as it was."""
    parts, *dims = node.args or (None,)
    dim = [*dims, *(v for k, v in node.kwargs.items() if k == "dim")] or [0]
    others = len(dim) > 1 or node.kwargs.keys() - {"dim"} or node in schedule.effects.writes
    if others or not isinstance(parts, list | tuple) or len(parts) < 2 or not isinstance(dim[0], int):
        return None
    lives, order = schedule.effects.lives.get(node, NOWHERE), schedule.order[node]
    if any(True for _ in schedule.writers(lives, order, len(schedule.nodes))):
        return None
    return Join(node, parts, dim[0] % _tensor(node).dim(), node.target is torch.stack)


@dataclass(frozen=True)
class Column:
    """One argument of a call that each part is: one for all, or each part's own."""

    given: Sequence[Any]
    own: bool


@dataclass(frozen=True)
class Step:
    """The call that every part is the result of, and that can be made of joined arguments."""

    op: str
    target: Any
    columns: Sequence[Column]
    kwargs: dict[str, Any]


def _step(schedule: Schedule, join: Join, parts: Sequence[Any], users: Sequence[fx.Node]) -> Step | None:
    """The function that all parts are the results of; None if it cannot be moved behind the join."""
    if not all(isinstance(n, fx.Node) and list(n.users) == [user] for n, user in zip(parts, users, strict=True)):
        return None
    first = parts[0]
    if not all(_alike(n, first) and _movable(schedule, n, join.node) for n in parts):
        return None
    if first.target in RESHAPES:
        return _reshape(join, parts)
    rows = width(first)
    columns = [
        Column(given, not all(_same(x, given[0]) for x in given))
        for given in zip(*(n.args for n in parts), strict=True)
    ]
    if rows is None or not any(c.own for c in columns) or (rows and any(c.own for c in columns[1:])):
        return None
    fits = all(_fits(join, c, parts, rows) for c in columns)
    return Step(first.op, first.target, columns, first.kwargs) if fits else None


def _hidden(schedule: Schedule, join: Join, parts: Sequence[Any], users: Sequence[fx.Node]) -> bool:
    """Whether behind functions that the analysis looks into stands one that it does not.

    Else those of several arguments stay where they are: the parts of a sum are one attention, and none by themselves.
    """
    step = _step(schedule, join, parts, users)
    return step is not None and (
        step.target in OPAQUE or any(c.own and _hidden(schedule, join, c.given, parts) for c in step.columns)
    )


def _reshape(join: Join, parts: Sequence[fx.Node]) -> Step | None:
    """A reshape of the dimensions behind the one that is new, with numbers for their sizes and one other at most."""
    given = [p.args[0] for p in parts]
    before, behind = [_tensor(n).shape for n in given], [_tensor(n).shape for n in parts]
    dim = join.dim
    if not join.stacks or any(x != before[0] for x in before) or before[0][:dim] != behind[0][:dim]:
        return None
    sizes = [*behind[0][:dim], len(parts), *behind[0][dim:]]
    if sum(not isinstance(n, int) for n in sizes) > 1:
        return None
    columns = [Column((n if isinstance(n, int) else -1,), own=False) for n in sizes]
    return Step("call_method", "reshape", [Column(given, own=True), *columns], {})


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
    return not any(True for _ in schedule.writers(read, order[node], order[behind]))


def _fits(join: Join, column: Column, parts: Sequence[fx.Node], rows: int) -> bool:
    """Whether the join of an argument is one of the joined results: their places are the same."""
    rank = _tensor(parts[0]).dim()
    if column.own:
        given = list(map(_tensor, column.given))
        if not all(isinstance(x, torch.Tensor) and x.dim() == rank for x in given) or not join.leaves_alone(rank, rows):
            return False
        shapes = [_without(x.shape, None if join.stacks else join.dim) for x in given if x is not None]
        lengths = join.stacks or all(
            x.shape[join.dim] == _tensor(n).shape[join.dim] for x, n in zip(given, parts, strict=True) if x is not None
        )
        return all(s == shapes[0] for s in shapes) and lengths
    shared = _tensor(column.given[0])
    return bool(rows) or not isinstance(shared, torch.Tensor) or join.leaves_alone(rank, shared.dim())


def _tensor(arg: Any) -> Any:
    """The example of a value of the graph, where it is a tensor or a size; None of what is no value."""
    return arg.meta.get("example_value") if isinstance(arg, fx.Node) else None


def _without(shape: Sequence[Any], dim: int | None) -> list[Any]:
    return [n for d, n in enumerate(shape) if d != dim]


def _move(schedule: Schedule, join: Join, graph: fx.Graph, mapping: dict[fx.Node, fx.Node]) -> None:
    moved: list[fx.Node] = []
    made: dict[tuple[fx.Node, ...], fx.Node] = {}

    def joined(parts: Sequence[Any], users: Sequence[fx.Node]) -> fx.Node:
        if tuple(parts) not in made:
            made[tuple(parts)] = anew(parts, users)
        return made[tuple(parts)]

    def anew(parts: Sequence[Any], users: Sequence[fx.Node]) -> fx.Node:
        step = _step(schedule, join, parts, users)
        if step is None or (sum(c.own for c in step.columns) > 1 and not _hidden(schedule, join, parts, users)):
            own = Step(join.node.op, join.node.target, (), {})
            return _made(graph, own, ([mapping[n] for n in parts], join.dim), join.node)
        moved.extend(parts)
        args = [joined(c.given, parts) if c.own else map_arg(c.given[0], mapping.__getitem__) for c in step.columns]
        return _made(graph, step, tuple(args), parts[0])

    with graph.inserting_before(mapping[join.node]):
        new = joined(join.parts, [join.node] * len(join.parts))
        if not same_strides(new.meta["example_value"], _tensor(join.node)):
            new = _made(graph, Step("call_method", "contiguous", (), {}), (new,), join.node)
    mapping[join.node].replace_all_uses_with(new)
    for node in (join.node, *moved):
        graph.erase_node(mapping[node])
    mapping[join.node] = new


def _made(graph: fx.Graph, step: Step, args: tuple[Any, ...], like: fx.Node) -> fx.Node:
    """The call of other arguments, in the place of another node's."""
    node = graph.create_node(step.op, step.target, args, step.kwargs)
    node.meta = copy.copy(like.meta)
    fakes = map_arg(args, lambda n: n.meta["example_value"])
    mode = like.meta["example_value"].fake_mode
    with mode, suppressed_guards(mode), torch.no_grad():
        of = (lambda x, *rest, **kw: getattr(x, step.target)(*rest, **kw)) if step.op == "call_method" else step.target
        node.meta["example_value"] = of(*fakes, **step.kwargs)
    return node
