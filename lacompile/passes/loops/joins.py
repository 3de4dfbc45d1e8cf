"""Joins: where a program puts what its loop has computed side by side, by one call for all or place by place."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ..capture.effects import NOWHERE
from ..examples import AHEAD
from ..graph.layouts import side_by_side
from ..graph.schedule import Schedule
from .filled import Filled, fillings


@dataclass(frozen=True)
class Join:
    """Tensors side by side along dimension ``dim``, a new one where they are stacked.

    ``node``: by which all of them are read. ``users``: what reads each of them. ``needless``: the nodes that nobody
    needs when the parts are joined in another way, users before what they use. ``into``: the places of a tensor that
    they are written to, where the program has no result for them alone. ``ahead``: whether no state is behind them.
    """

    node: fx.Node
    parts: Sequence[Any]
    users: Sequence[fx.Node]
    dim: int
    stacks: bool
    needless: Sequence[fx.Node]
    into: Filled | None = None
    ahead: bool = False

    @property
    def in_front(self) -> bool:
        """Whether the parts are stacked along a dimension in front of theirs."""
        return self.stacks and self.dim == 0

    @property
    def turned(self) -> Join:
        """The same with parts that are stacked along a dimension in front of theirs."""
        return replace(self, dim=0, stacks=True)

    def leaves_alone(self, rank: int, last: int) -> bool:
        """Whether the dimension is none of the last ones of a part of this rank."""
        return self.dim <= rank - last - (not self.stacks)


def joins(schedule: Schedule) -> Iterator[Join]:
    """Those of the graph."""
    for node in schedule.effects.along:
        if node not in schedule.unread and (join := _join(schedule, node)) is not None:
            yield _stacked(join)
    for f in fillings(schedule):
        yield _stacked(Join(f.last, f.parts, f.writes, f.dim, f.selects, [*f.writes, *f.views], f))


def _join(schedule: Schedule, node: fx.Node) -> Join | None:
    """A join whose result nobody writes into: what a function saves for its gradient must stay as it was."""
    found = side_by_side(node, schedule.effects)
    if found is None or len(found.parts) < 2 or node in schedule.effects.writes:
        return None
    lives, order = schedule.effects.lives.get(node, NOWHERE), schedule.order[node]
    if schedule.is_written(lives, order, len(schedule.nodes)):
        return None
    users = [node] * len(found.parts)
    return Join(node, found.parts, users, found.dim, found.stacks, [node], ahead=AHEAD in node.meta)


def _stacked(join: Join) -> Join:
    """The same with parts that were given a dimension to be joined along as they were without it."""
    if join.stacks or not all(isinstance(p, fx.Node) and _adds_dimension(p) == join.dim for p in join.parts):
        return join
    if any(list(p.users) != [user] for p, user in zip(join.parts, join.users, strict=True)):
        return join
    parts = [p.args[0] for p in join.parts]
    return replace(join, parts=parts, users=join.parts, stacks=True, needless=[*join.needless, *join.parts])


def _adds_dimension(node: fx.Node) -> int | None:
    """The dimension of length 1 that a view of a tensor has and the tensor has not."""
    example = node.meta.get("example_value")
    if node.kwargs or len(node.args) != 2 or not isinstance(example, torch.Tensor):
        return None
    how = node.args[1]
    if how is None:
        return 0 if node.target is operator.getitem else None
    if node.target in ("unsqueeze", torch.unsqueeze) and isinstance(how, int):
        return how % example.dim()
    if node.target is operator.getitem and isinstance(how, tuple) and how.count(None) == 1:
        at = how.index(None)
        if all(x is Ellipsis or x == slice(None) for x in how if x is not None):
            return example.dim() - len(how) + at if Ellipsis in how[:at] else at
    return None
