"""Calls of joined arguments, in the place of one call for each part of a join (see ``fission.py``)."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from ..._compat import of_fakes
from ..examples import ONE_TENSOR, example_of, same_shape
from ..graph.rows import BATCHED
from ..graph.schedule import Schedule
from ..graph.strides import same_strides
from .joins import Join


@dataclass(frozen=True)
class Kept:
    """Parts that are joined as they are."""

    parts: tuple[fx.Node, ...]
    dim: int
    stacks: bool


@dataclass(frozen=True)
class Moved:
    """Parts that are one function each, which is called of joined arguments instead.

    ``join``: how the parts would be joined. ``through``: nodes of several tensors each, of which a part is one.
    ``opaque``: whether it is a function that the analysis does not look into, and ``hides``: it, or one inside of it.
    Else those of several joined arguments stay where they are: the parts of a sum are one attention together, and none
    by themselves. Where no state is behind them there is none.
    """

    join: Join
    parts: Sequence[fx.Node]
    op: str
    target: Any
    args: Sequence[Any]
    kwargs: dict[str, Any]
    through: Sequence[fx.Node] = ()
    opaque: bool = False

    @property
    def gone(self) -> Iterator[fx.Node]:
        """The nodes in the place of which it is called."""
        yield from self.parts
        yield from self.through

    @cached_property
    def joined(self) -> list[Kept | Moved | Turned]:
        inner = [a.of if isinstance(a, Wider) else a for a in self._each]
        return [a for a in inner if isinstance(a, Kept | Moved | Turned)]

    @cached_property
    def hides(self) -> bool:
        return self.opaque or any(isinstance(a, Moved | Turned) and a.hides for a in self.joined)

    @property
    def given(self) -> Iterator[fx.Node]:
        """The values of the graph that it is called with where it is called then."""
        for arg in self._each:
            a = arg.of if isinstance(arg, Wider) else arg
            yield from a.parts if isinstance(a, Kept) else (a,) if isinstance(a, fx.Node) else ()

    @cached_property
    def _each(self) -> list[Any]:
        """The arguments, those in a list of tensors one by one."""
        return [x for a in self.args for x in (a if isinstance(a, list) else [a])]

    @property
    def moves(self) -> bool:
        return self.hides or len(self.joined) == 1 or self.join.ahead


@dataclass(frozen=True)
class Wider:
    """Stacked parts with dimensions of one entry behind the first, as those beside which a part lacks some."""

    of: Kept | Moved | Turned
    ones: int
    like: fx.Node


@dataclass(frozen=True)
class Turned:
    """Parts that are stacked along a dimension in front of all of theirs, and brought from there to where they belong.

    A function or a reshape of one part may reach every dimension that the part has, and none in front of them.
    """

    of: Moved
    join: Join

    @property
    def hides(self) -> bool:
        return self.of.hides


def functions(found: Moved | Turned | Kept | None) -> Iterator[Moved]:
    """All that are moved with one."""
    if isinstance(found, Turned):
        yield from functions(found.of)
    if isinstance(found, Moved):
        yield found
        for inner in found.joined:
            yield from functions(inner)


def move(
    schedule: Schedule, join: Join, moved: Moved | Turned, graph: fx.Graph, mapping: dict[fx.Node, fx.Node]
) -> None:
    made: dict[Any, fx.Node] = {}  # several functions may be called with the same

    def call(arg: Any) -> Any:
        if isinstance(arg, list) and any(isinstance(a, Kept | Moved | Turned) for a in arg):
            return [call(a) for a in arg]
        if isinstance(arg, Wider):
            wider = call(arg.of)
            for _ in range(arg.ones):
                wider = made_like(graph, "call_method", "unsqueeze", (wider, 1), {}, arg.like)
            return wider
        if not isinstance(arg, Kept | Moved | Turned):
            return map_arg(arg, mapping.__getitem__)
        key = arg if isinstance(arg, Kept) else id(arg)
        if key not in made:
            made[key] = new_call(arg)
        return made[key]

    def new_call(arg: Kept | Moved | Turned) -> fx.Node:
        if isinstance(arg, Kept):
            function = torch.stack if arg.stacks else torch.cat
            parts = [mapping[n] for n in arg.parts]
            return made_like(graph, "call_function", function, (parts, arg.dim), {}, arg.parts[0])
        if isinstance(arg, Turned):
            return _turned_back(graph, call(arg.of), arg)
        args = tuple(call(a) for a in arg.args)
        if arg.target in BATCHED:
            return _at_once(graph, arg, args)
        return made_like(graph, arg.op, arg.target, args, arg.kwargs, arg.parts[0])

    with graph.inserting_before(mapping[join.node]):
        new = call(moved)
        if not _is_as_joined(example_of(new), join):
            raise ValueError("of joined arguments the function is another tensor")
        if join.into is not None:
            places = (*[slice(None)] * join.dim, slice(join.into.start, join.into.stop))
            graph.call_function(operator.setitem, (mapping[join.into.tensor], places, new)).meta = join.node.meta.copy()
        elif not same_strides(new.meta["example_value"], example_of(join.node)):
            new = made_like(graph, "call_method", "contiguous", (new,), {}, join.node)
            if not same_strides(new.meta["example_value"], example_of(join.node)):
                raise ValueError("the join has a layout of its own")
    if join.into is None:
        mapping[join.node].replace_all_uses_with(new)
        if ONE_TENSOR in join.node.meta:
            new.meta[ONE_TENSOR] = True
    behind = {n for m in functions(moved) for n in m.gone}
    for node in (*join.needless, *sorted(behind, key=schedule.order.__getitem__, reverse=True)):
        graph.erase_node(mapping[node])
    mapping[join.node] = new


def _is_as_joined(new: torch.Tensor, join: Join) -> bool:
    """Whether it has the format and the shape of the joined parts, where a write would make room for any other."""
    parts = list(map(example_of, join.parts))
    shape = list(parts[0].shape)
    if join.stacks:
        shape.insert(join.dim, len(parts))
    else:
        shape[join.dim] = sum(p.shape[join.dim] for p in parts)
    return new.dtype == parts[0].dtype and same_shape(new.shape, shape)


def _turned_back(graph: fx.Graph, stacked: fx.Node, turned: Turned) -> fx.Node:
    """What is stacked along the first dimension, along that of the join."""
    join, like = turned.join, turned.of.parts[0]
    order = list(range(1, example_of(stacked).dim()))
    order.insert(join.dim, 0)
    there = made_like(graph, "call_method", "permute", (stacked, *order), {}, like)
    return (
        there if join.stacks else made_like(graph, "call_method", "flatten", (there, join.dim, join.dim + 1), {}, like)
    )


def _at_once(graph: fx.Graph, moved: Moved, args: tuple[Any, ...]) -> fx.Node:
    """A call of a function that has one dimension for all its rows."""
    join, like = moved.join, moved.parts[0]
    if not join.stacks:
        return made_like(graph, moved.op, moved.target, args, moved.kwargs, like)
    rows = made_like(graph, "call_method", "flatten", (args[0], 0, 1), {}, like)
    rows = made_like(graph, moved.op, moved.target, (rows, *args[1:]), moved.kwargs, like)
    n = len(moved.parts)
    return made_like(graph, "call_method", "unflatten", (rows, 0, (-1, n) if join.dim else (n, -1)), {}, like)


def made_like(
    graph: fx.Graph, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: fx.Node
) -> fx.Node:
    """A call in the place of another node's."""
    node = graph.create_node(op, target, args, kwargs)
    node.meta = copy.copy(like.meta)
    fakes = map_arg(args, lambda n: n.meta["example_value"])
    with of_fakes(like.meta["example_value"].fake_mode):
        called = getattr(fakes[0], target)(*fakes[1:], **kwargs) if op == "call_method" else target(*fakes, **kwargs)
        node.meta["example_value"] = called
    return node
