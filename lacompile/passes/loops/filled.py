"""Tensors that a loop fills: each place is written once, and nobody looks before the last one is.

``out[:, t] = y_t`` for one ``t`` after another leaves in ``out`` what ``out[:, a:b] = stack([y_t for t ...])`` leaves
there, if the places are those from ``a`` to ``b``. The tensor, its format and its layout are the program's in both.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import fx

from ..capture.effects import ANYWHERE, NOWHERE, overlap
from ..examples import example_of, same_shape
from ..graph.schedule import Schedule

FACTORIES = frozenset[Any]({
    *(getattr(torch, f + like) for f in ("empty", "zeros", "ones", "full") for like in ("", "_like")),
    *("new_" + f for f in ("empty", "zeros", "ones", "full")),
})  # fmt: skip
"""What makes a tensor of its own, no two entries of which share memory."""


@dataclass(frozen=True)
class Place:
    """``length`` places along a dimension; one without a dimension of its own where it is selected."""

    dim: int
    start: int
    length: int
    selects: bool


@dataclass(frozen=True)
class Filled:
    """Places ``start`` to ``stop`` of a tensor, and what is written there by each write, in order of the places."""

    tensor: fx.Node
    dim: int
    start: int
    stop: int
    selects: bool
    parts: Sequence[fx.Node]
    writes: Sequence[fx.Node]
    last: fx.Node
    """The write behind which all of them have been made."""
    views: Sequence[fx.Node]
    """What the writes are made through, and nothing else is."""


@dataclass(frozen=True)
class Write:
    """What one node writes into a tensor, directly or through a ``view`` of it."""

    node: fx.Node
    tensor: fx.Node
    view: fx.Node | None
    place: Place
    part: fx.Node


def fillings(schedule: Schedule) -> Iterator[Filled]:
    """Writes in a row, into places in a row."""
    tensors: dict[int, list[fx.Node]] = {}
    for node in schedule.nodes:
        for storage in schedule.effects.writes.get(node, NOWHERE):
            tensors.setdefault(storage, []).append(node)
    for writers in tensors.values():
        for _, found in groupby(map(_write, writers), lambda w: w and (w.tensor, w.place.dim, w.place.selects)):
            writes = [w for w in found if w is not None]
            if len(writes) > 1 and (filled := _filled(writes)) and _undisturbed(schedule, writes):
                yield filled


def _filled(writes: Sequence[Write]) -> Filled | None:
    ordered = sorted(writes, key=lambda w: w.place.start)
    if any(a.place.start + a.place.length != b.place.start for a, b in pairwise(ordered)):
        return None
    first, last = ordered[0].place, ordered[-1].place
    return Filled(
        writes[0].tensor,
        first.dim,
        first.start,
        last.start + last.length,
        first.selects,
        [w.part for w in ordered],
        [w.node for w in ordered],
        writes[-1].node,
        [w.view for w in ordered if w.view is not None],
    )


def _undisturbed(schedule: Schedule, writes: Sequence[Write]) -> bool:
    """Whether nothing but the writes touches the tensor's memory while it is filled, or what is written there."""
    effects, order, modes = schedule.effects, schedule.order, schedule.records_gradients
    memory, nodes = effects.lives.get(writes[0].tensor, NOWHERE), {w.node for w in writes}
    first, last = order[writes[0].node], order[writes[-1].node]
    if len(memory) != 1 or ANYWHERE in memory or overlap(memory, effects.outside):
        return False
    for w in writes:
        written = effects.lives.get(w.part, NOWHERE)
        alone = w.view is None or list(w.view.users) == [w.node]
        if not alone or w.node.users or effects.writes[w.node] != memory or overlap(memory, written):
            return False
        if schedule.is_written(written, order[w.node], last):
            return False
        if any(modes[n] != modes[writes[-1].node] for n in (w.node, w.view) if n is not None):
            return False
    if any(n not in nodes for n in schedule.writers(memory, first - 1, last)):
        return False
    expected = nodes.union(w.view for w in writes if w.view is not None)
    between = (n for n in schedule.nodes[first : last + 1] if n not in expected)
    return not any(overlap(memory, effects.lives.get(a, NOWHERE)) for n in between for a in n.all_input_nodes)


def _write(node: fx.Node) -> Write | None:
    """A write of a tensor into places of another one, of its shape; None for one of another kind."""
    if node.kwargs or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    view: fx.Node | None = None
    if node.target is operator.setitem:
        tensor, index, part = node.args
    elif node.target == "copy_" and len(node.args) == 2:
        view, part = node.args  # type: ignore[assignment]
        if view is None or view.kwargs or not view.args:
            return None
        tensor, *how = view.args
        index = _index(view.target, how)
    else:
        return None
    if not isinstance(tensor, fx.Node) or tensor.target not in FACTORIES or tensor.kwargs.get("requires_grad"):
        return None
    whole, given = example_of(tensor), example_of(part)
    if not isinstance(part, fx.Node) or not isinstance(whole, torch.Tensor) or not isinstance(given, torch.Tensor):
        return None
    place = _place(index, whole.shape)
    if place is None or given.device != whole.device or given.layout != whole.layout:
        return None
    kept = [n for d, n in enumerate(whole.shape) if d != place.dim]
    shape = kept if place.selects else [*kept[: place.dim], place.length, *kept[place.dim :]]
    return Write(node, tensor, view, place, part) if same_shape(shape, given.shape) else None


def _index(target: Any, how: Sequence[Any]) -> Any:
    """What a tensor is indexed by for the view that a call makes of it; None if it is no such call."""
    if target is operator.getitem:
        return how[0]
    if target not in ("select", torch.select, "narrow", torch.narrow) or not all(_is_number(n) for n in how):
        return None
    dim, start, *length = how
    if dim < 0:
        return None
    return (*[slice(None)] * dim, slice(start, start + length[0]) if length else start)


def _place(index: Any, shape: Sequence[Any]) -> Place | None:
    """The one dimension of which an index takes a part."""
    index = index if isinstance(index, tuple) else (index,)
    if any(not (_is_number(x) or isinstance(x, slice) or x is Ellipsis) for x in index):
        return None
    if Ellipsis in index:
        at = index.index(Ellipsis)
        index = (*index[:at], *[slice(None)] * (len(shape) - len(index) + 1), *index[at + 1 :])
    parts = [(d, x) for d, x in enumerate(index) if x != slice(None)]
    if len(parts) != 1 or len(index) > len(shape):
        return None
    (dim, x), size = parts[0], shape[parts[0][0]]
    if not isinstance(size, int):
        return None
    if not isinstance(x, slice):
        return Place(dim, x % size, 1, selects=True)
    if not all(n is None or _is_number(n) for n in (x.start, x.stop, x.step)):
        return None
    start, stop, step = x.indices(size)
    return Place(dim, start, stop - start, selects=False) if step == 1 and stop > start else None


def _is_number(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)
