"""Layers inside one loop over tokens or chunks: what a layer leaves of all is computed before the next layer begins.

``for t: h, S = layer(x[:, t], S); y, T = layer(h, T)`` needs no result of the second layer for the first one. So the
second layer may as well read ``stack([h for each t])[t]``, and the graph runs all of the first layer's nodes before
all of the second's. No number changes. What the second layer projects is then part of one tensor, as in a loop of one
layer. Chunks are put side by side along the dimension along which the program joins them in the end.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from ..capture.effects import NOWHERE, overlap
from ..capture.modes import switches_autocast
from ..examples import ONE_TENSOR, example_of, same_shape
from ..graph.rows import OPAQUE, width
from ..graph.schedule import Schedule
from ..graph.strides import same_strides
from .joins import joins
from .moves import made_like

FEWEST = 3  # tokens


def one_after_the_other(schedule: Schedule) -> fx.GraphModule | None:
    """A copy of the graph in which layers do not alternate any more; None if there are none that do."""
    if switches_autocast(schedule.gm.graph):
        return None
    cuts = list(_cuts(schedule))
    if not cuts:
        return None
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    instead: dict[fx.Node, fx.Node] = {}
    copy_nodes(schedule, graph, mapping, instead, schedule.inputs)
    for cut in reversed(cuts):
        copy_nodes(schedule, graph, mapping, instead, cut.before)
        # What the next layer reads is data to it, however it was computed.
        read = read_of_whole(graph, cut, mapping, ONE_TENSOR, _dimension(schedule, cut))
        if read is None:
            return None
        instead |= read
    copy_nodes(schedule, graph, mapping, instead, schedule.nodes)
    return result(schedule, graph)


def result(schedule: Schedule, graph: fx.Graph) -> fx.GraphModule:
    """The module of another graph of the same program."""
    graph.lint()
    out = fx.GraphModule(schedule.gm, graph)
    out.meta = schedule.gm.meta
    return out


def read_of_whole(
    graph: fx.Graph, cut: Cut, mapping: dict[fx.Node, fx.Node], mark: str, dim: int | None = None
) -> dict[fx.Node, fx.Node] | None:
    """The values of a cut, read of one tensor that is marked so; None if they lie in memory in another way there.

    Tokens are stacked, chunks are put side by side along a dimension.
    """
    function = torch.stack if dim is None else torch.cat
    whole = made_like(graph, "call_function", function, ([mapping[n] for n in cut.of], dim or 0), {}, cut.of[0])
    whole.meta[mark] = True
    read: dict[fx.Node, fx.Node] = {}
    start = 0
    for place, node in enumerate(cut.of):
        if dim is None:
            part = made_like(graph, "call_function", operator.getitem, (whole, place), {}, node)
        else:
            tokens = example_of(node).shape[dim]
            part = made_like(graph, "call_function", torch.narrow, (whole, dim, start, tokens), {}, node)
            part = made_like(graph, "call_method", "contiguous", (part,), {}, node)
            start += tokens
        if not same_strides(example_of(part), example_of(node)):
            return None
        read[node] = part
    return read


def _dimension(schedule: Schedule, cut: Cut) -> int | None:
    """The dimension of tokens of what a layer leaves of each chunk; None if it is one token each.

    As many values of that rank are joined along it.
    """
    rank = example_of(cut.of[0]).dim()
    for join in joins(schedule):
        parts = [example_of(p) for p in join.parts]
        if not join.stacks and len(parts) == len(cut.of) and all(x is not None and x.dim() == rank for x in parts):
            lengths = [[x.shape[join.dim] for x in found] for found in (parts, map(example_of, cut.of))]
            if lengths[0] == lengths[1] and all(isinstance(n, int) for n in lengths[0]):
                return join.dim
    return None


def copy_nodes(
    schedule: Schedule,
    graph: fx.Graph,
    mapping: dict[fx.Node, fx.Node],
    instead: dict[fx.Node, fx.Node],
    nodes: Collection[fx.Node],
) -> None:
    """Copies those that are not there yet, in the order of the program."""
    for node in sorted(set(nodes) - mapping.keys(), key=schedule.order.__getitem__):
        mapping[node] = graph.node_copy(node, lambda n: instead.get(n, mapping[n]))
        if node.op == "output":
            mapping[node].meta = copy.copy(node.meta)


# ------------------------------------------------------------------------------------------------------ where to cut


@dataclass(frozen=True)
class Cut:
    """What a layer leaves of each token, and all that is computed before that."""

    of: tuple[fx.Node, ...]
    before: set[fx.Node]


Row = tuple[fx.Node, ...]
"""One call for each token, the same one in each step but for what it is given."""


@dataclass(frozen=True)
class Family:
    """One function for each token: what it is called with, and its calls."""

    of: Row
    calls: Row

    def grows(self, depth: dict[fx.Node, int]) -> bool:
        """Whether a state is behind what it is called with."""
        return grows(self.of, depth)


def grows(row: Row, depth: dict[fx.Node, int]) -> bool:
    """Whether each is computed from more than the one before it, as where a state is behind it."""
    return all(n in depth for n in row) and all(depth[a] < depth[b] for a, b in pairwise(row))


def readers(row: Row, unread: set[fx.Node]) -> Iterator[Row]:
    """The calls that read each of a row in the same way."""
    found = [[u for u in n.users if u not in unread and u.op != "output"] for n in row]
    for column in zip(*found, strict=False):
        function = (column[0].op, column[0].target, len(column[0].args))
        if all((n.op, n.target, len(n.args)) == function for n in column) and len(set(column)) == len(row):
            yield column


def _cuts(schedule: Schedule) -> Iterator[Cut]:
    """The last cut first: each splits what is before the one behind it."""
    of_rows = list(families(schedule))
    others = list(_above(schedule, of_rows))
    inside: Collection[fx.Node] = schedule.nodes
    while len(of_rows) > 1 and (found := _last_cut(schedule, of_rows, others, inside)) is not None:
        yield found
        inside = sorted(found.before, key=schedule.order.__getitem__)


def families(schedule: Schedule) -> Iterator[Family]:
    """Functions of rows with the same weights, computed again perhaps, of other values each time."""
    calls: dict[Any, list[fx.Node]] = {}
    # What is computed in another mode has another number: its steps would be a family of some tokens only.
    again = len(set(schedule.records_gradients.values())) == 1
    for node in schedule.nodes:
        rest = node.args[1:]
        if node.target in OPAQUE and isinstance(node.args[0], fx.Node) and any(isinstance(a, fx.Node) for a in rest):
            same = tuple(schedule.numbers[a] if isinstance(a, fx.Node) and again else repr(a) for a in rest)
            calls.setdefault((node.op, node.target, same, repr(node.kwargs)), []).append(node)
    for group in calls.values():
        of = tuple(n.args[0] for n in group if isinstance(n.args[0], fx.Node))
        if len(of) >= FEWEST and len(set(of)) == len(of):
            yield Family(of, tuple(group))


def _above(schedule: Schedule, families: Sequence[Family]) -> Iterator[Family]:
    """What families are called with is itself a function of rows perhaps, as a written out norm: what that is of.

    There a layer may begin, where its residual reads what its norm does.
    """
    seen = {f.of for f in families}
    work = [f.of for f in families]
    while work:
        calls = work.pop()
        first = calls[0]
        function = (first.op, first.target, len(first.args))
        if width(first, schedule.effects) is None or any((n.op, n.target, len(n.args)) != function for n in calls):
            continue
        for given in zip(*(n.args for n in calls), strict=True):
            of = tuple(n for n in given if isinstance(n, fx.Node))
            if len(of) == len(set(of)) == len(calls) and of not in seen:
                seen.add(of)
                work.append(of)
                yield Family(of, calls)


def _last_cut(
    schedule: Schedule, families: Iterable[Family], others: Iterable[Family], inside: Collection[fx.Node]
) -> Cut | None:
    """The last one that something with a state is behind, which may be made; there are ``others`` to cut at."""
    depth = depths(inside)

    def growing_of(found: Iterable[Family]) -> list[Family]:
        return [f for f in found if f.grows(depth) and all(n in depth for n in f.calls)]

    growing = growing_of(families)
    for family in sorted([*growing, *growing_of(others)], key=lambda f: depth[f.of[0]], reverse=True):
        before = above(family.of)
        if not before.isdisjoint(family.calls) or not _is_all_that_is_read(family, before, depth, schedule.unread):
            continue
        behind = depths([n for n in inside if n not in before])
        state = any(f.grows(behind) for f in growing if before.isdisjoint(f.of))
        if not state and not _makes_a_state(family.of, behind, schedule.unread):
            continue
        cut = Cut(family.of, before)
        if may_be_cut(schedule, cut, _dimension(schedule, cut)):
            return cut
    return None


def _makes_a_state(of: Row, depth: dict[fx.Node, int], unread: set[fx.Node]) -> bool:
    """Whether a state is behind what is computed from these, as what a last layer reads and returns as it is."""
    work, seen = [of], {of}
    while work:
        for row in readers(work.pop(), unread):
            if grows(row, depth):
                return True
            if row not in seen and all(n in depth for n in row):
                seen.add(row)
                work.append(row)
    return False


def depths(nodes: Iterable[fx.Node]) -> dict[fx.Node, int]:
    """How long the longest way to each of these nodes is among them."""
    found: dict[fx.Node, int] = {}
    for node in nodes:
        found[node] = 1 + max((found.get(n, 0) for n in node.all_input_nodes), default=0)
    return found


def above(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    work, seen = list(nodes), set[fx.Node]()
    while work:
        node = work.pop()
        if node not in seen:
            seen.add(node)
            work += node.all_input_nodes
    return seen


def _is_all_that_is_read(family: Family, before: set[fx.Node], depth: dict[fx.Node, int], unread: set[fx.Node]) -> bool:
    """Whether no other value behind a state is read by what comes after; last states may be, by what is returned."""
    least, behind = depth[family.of[0]], set(family.of)
    for node in depth:  # in order
        if not behind.isdisjoint(node.all_input_nodes) and node not in before:
            behind.add(node)
    after = [u for u in behind.difference(family.of) if u.op != "output" and u not in unread]
    read = {n for u in after for n in u.all_input_nodes if n in before}.difference(family.of)
    return all(depth[n] <= least for n in read)


# ------------------------------------------------------------------------------------------------------- may it be so?


def _may_run_before(schedule: Schedule, cut: Cut) -> bool:
    """Whether what is before a cut computes the same before all else."""
    effects, order, modes = schedule.effects, schedule.order, schedule.records_gradients
    others = [order[n] for n in schedule.nodes if n not in cut.before and n not in schedule.inputs]
    first = min(others)
    moved = [n for n in cut.before if order[n] > first]
    end = max((order[n] for n in moved), default=first)
    if schedule.impure_between(first - 1, end) or len({modes[schedule.nodes[at]] for at in range(first, end + 1)}) > 1:
        return False
    for node in moved:
        read = [effects.lives.get(n, NOWHERE) for n in (node, *node.all_input_nodes)]
        if node in effects.writes or any(schedule.is_written(r, first - 1, order[node] - 1) for r in read):
            return False
    return True


def may_be_cut(schedule: Schedule, cut: Cut, dim: int | None = None) -> bool:
    """Whether parts of one tensor, made before all else, do for the values of a cut."""
    alone = _of_one_kind(cut.of, dim) and not any(_is_seen_otherwise(schedule, n) for n in cut.of)
    return alone and _may_run_before(schedule, cut)


def _of_one_kind(nodes: Sequence[fx.Node], dim: int | None) -> bool:
    """Tensors without gaps of one format, and of one shape but for what they have along a dimension."""
    examples = [example_of(n) for n in nodes]
    if not all(isinstance(x, torch.Tensor) and x.is_floating_point() and x.is_contiguous() for x in examples):
        return False
    dtype, device = examples[0].dtype, examples[0].device
    sizes = [[n for at, n in enumerate(x.shape) if at != dim] for x in examples]
    return all((x.dtype, x.device) == (dtype, device) for x in examples) and all(same_shape(s, sizes[0]) for s in sizes)


def _is_seen_otherwise(schedule: Schedule, node: fx.Node) -> bool:
    """Whether somebody writes into a value, or sees the memory that it lies in."""
    effects = schedule.effects
    lives = effects.lives.get(node, NOWHERE)
    outputs = schedule.gm.graph.output_node().all_input_nodes
    return schedule.is_written(lives, schedule.order[node], len(schedule.nodes)) or any(
        overlap(lives, effects.lives.get(n, NOWHERE)) for n in outputs
    )
