"""The order in which the nodes of a graph run, and what happens between two of them: found once for all matches.

Every match asks about its own part of the graph alone, so no question may cost a walk over the whole of it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from functools import cached_property
from typing import Any

from torch import fx

from ..._compat import changes_mode
from ..capture.effects import ANYWHERE, NOWHERE, Effects, Storages
from ..capture.gradients import Gradients
from ..capture.modes import AUTOCAST, grad_modes, sets_grad_mode
from .lenders import numbers_read


class Schedule:
    """One graph and the effects of its nodes."""

    def __init__(self, gm: fx.GraphModule, effects: Effects, gradients: Gradients):
        self.gm, self.effects, self.gradients = gm, effects, gradients
        self.nodes: list[fx.Node] = list(gm.graph.nodes)
        self.order: dict[fx.Node, int] = {n: i for i, n in enumerate(self.nodes)}
        self.inputs: dict[fx.Node, int] = {n: i for i, n in enumerate(n for n in self.nodes if n.op == "placeholder")}
        self.last_input = max((self.order[n] for n in self.inputs), default=-1)
        self.records_gradients = grad_modes(gm)
        self._impure = sorted(self.order[n] for n in effects.impure)
        self._writing = sorted(self.order[n] for n in effects.writes)
        self._writers: dict[int, list[int]] = {}  # by storage: where it is written to, in order
        for at in self._writing:
            for storage in effects.writes[self.nodes[at]]:
                self._writers.setdefault(storage, []).append(at)
        self._living: dict[int, list[fx.Node]] = {}  # by storage
        for node, storages in effects.lives.items():
            for storage in storages:
                self._living.setdefault(storage, []).append(node)

    @cached_property
    def numbers(self) -> dict[fx.Node, int]:
        """Nodes with the same number compute the same value from the same inputs, with the same gradients.

        What is impure, or reads memory that is written to anywhere, is like no other.
        """
        found: dict[fx.Node, int] = {}
        known: dict[Hashable, int] = {}
        era = 0  # operations before and behind a switch of modes differ in their derivatives or their precision

        def same(arg: Any) -> Hashable:
            if isinstance(arg, fx.Node):
                return fx.Node, found[arg]
            if isinstance(arg, list | tuple):
                return type(arg), tuple(map(same, arg))
            if isinstance(arg, dict):
                return dict, tuple((k, same(x)) for k, x in arg.items())
            if isinstance(arg, slice):
                return slice, same((arg.start, arg.stop, arg.step))
            return type(arg), repr(arg)

        for node in self.nodes:
            era += node.op == "call_function" and (node.target in AUTOCAST or changes_mode(node.target))
            alone = node.op == "placeholder" or node in self.effects.impure or self._is_rewritten(node)
            what: Hashable = node if alone else (node.op, node.target, era, same(node.args), same(node.kwargs))
            found[node] = known.setdefault(what, len(known))
        return found

    def _is_rewritten(self, node: fx.Node) -> bool:
        """Whether the memory of a node's result, or of what it reads, is ever written to."""
        if not self._writing:
            return False
        touched = [self.effects.lives.get(n, NOWHERE) for n in (node, *node.all_input_nodes)]
        return any(self.is_written(storages, -1, len(self.nodes)) for storages in touched)

    @cached_property
    def unread(self) -> set[fx.Node]:
        """The calls that neither a result nor an effect of the graph is computed from."""
        found: set[fx.Node] = set()
        for node in reversed(self.nodes):
            acts = node in self.effects.writes or node in self.effects.impure
            if node.op.startswith("call_") and not acts and found.issuperset(node.users):
                found.add(node)
        return found

    def between(self, start: fx.Node, end: fx.Node) -> list[fx.Node]:
        """The nodes behind ``start``, up to ``end``."""
        return self.nodes[self.order[start] + 1 : self.order[end] + 1]

    def impure_between(self, start: int, end: int) -> bool:
        """Whether an impure node stands behind place ``start``, up to ``end``."""
        return bisect_right(self._impure, start) < bisect_right(self._impure, end)

    def impure_nodes(self, start: int, end: int) -> Iterator[fx.Node]:
        """The impure nodes behind place ``start``, up to ``end``, in order."""
        for at in self._impure[bisect_right(self._impure, start) : bisect_right(self._impure, end)]:
            yield self.nodes[at]

    def is_one_mode(self, start: int, end: int, with_gradients: bool) -> bool:
        """Whether what runs right behind place ``start`` runs in the mode of what does behind ``end``.

        What autograd knows nothing of (not ``with_gradients``) is the same whether gradients are recorded or not. Any
        other impure node may switch any mode.
        """
        between = list(self.impure_nodes(start, end))
        return not between or (not with_gradients and all(map(sets_grad_mode, between)))

    def writers(self, storages: Storages, start: int, end: int) -> Iterator[fx.Node]:
        """The nodes behind place ``start``, up to ``end``, that may write into one of these storages."""
        if not storages:
            return
        if ANYWHERE in storages:
            places: Iterable[list[int]] = (self._writing,)
        else:
            places = (self._writers.get(s, []) for s in (*storages, ANYWHERE))
        for found in places:
            for at in found[bisect_right(found, start) : bisect_right(found, end)]:
                yield self.nodes[at]

    def is_written(self, storages: Storages, start: int, end: int) -> bool:
        """Whether one of these storages may be written into behind place ``start``, up to ``end``."""
        return any(True for _ in self.writers(storages, start, end))

    def sharing(self, node: fx.Node) -> Iterator[fx.Node]:
        """The nodes, this one among them, whose results may share memory with that of ``node``."""
        storages = self.effects.lives.get(node, NOWHERE)
        if not storages:
            return
        if ANYWHERE in storages:
            yield from (n for n, lives in self.effects.lives.items() if lives)
            return
        for storage in (*storages, ANYWHERE):
            yield from self._living.get(storage, ())

    def ancestors(
        self,
        node: fx.Node,
        given: Collection[fx.Node],
        alike: Callable[[fx.Node, fx.Node], bool] = lambda copy, original: True,
    ) -> set[fx.Node]:
        """The nodes that a value's numbers are computed by other than through ``given`` values; graph inputs too.

        A value that the program computes once more is a given one as well where ``alike`` finds the two so: else the
        region of a match would be open to all that stands before it.
        """
        by_number = {self.numbers[g]: g for g in given}
        seen: set[fx.Node] = set()
        work = [node]
        while work:
            at = work.pop()
            original = by_number.get(self.numbers[at])
            if at in seen or at in given or (original is not None and alike(at, original)):
                continue
            seen.add(at)
            work += numbers_read(at)
        return seen

    @cached_property
    def _reads(self) -> dict[fx.Node, int]:
        """The inputs of the graph that a node is computed from: a bit for each."""
        found: dict[fx.Node, int] = {}
        for node in self.nodes:
            found[node] = 1 << self.inputs[node] if node in self.inputs else 0
            for arg in node.all_input_nodes:
                found[node] |= found[arg]
        return found

    def computed_from(self, node: fx.Node, others: Collection[fx.Node]) -> bool:
        """Whether a node is computed from one of the others, by way of values and not of memory."""
        if any(self._reads[node] >> self.inputs[n] & 1 for n in others if n in self.inputs):
            return True
        made = {n for n in others if n not in self.inputs}
        first = min((self.order[n] for n in made), default=len(self.nodes))
        seen: set[fx.Node] = set()
        work = list(node.all_input_nodes)
        while work:
            at = work.pop()
            if at in made:
                return True
            if at not in seen and self.order[at] > first:
                seen.add(at)
                work += at.all_input_nodes
        return False
