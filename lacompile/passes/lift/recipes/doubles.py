"""Values that a recipe reads in place of others, because their normal forms are the same.

A function of the same leaves may be computed at several places of a program, and a recipe reads the one that it finds.
That the two are one is then a step of the proof: it rests on the numbers that either form was made with, and it says
nothing of a format that only the one that is read has been through.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import fx

from ..domain.kinds import Opaque, Symbol
from ..domain.term import Val
from ..interpret import Interpreter


class Doubles:
    """Of the values of one graph."""

    def __init__(self, interpreter: Interpreter):
        self.known, self.leaves = interpreter.known, interpreter.engine.leaves
        self.data: dict[fx.Node, frozenset[int]] = {}

    def among(self, read: Iterable[fx.Node], region: Collection[fx.Node]) -> Iterable[tuple[set[fx.Node], ...]]:
        """For each value that is read in place of one in the region: what the former was made of, and what the latter.

        Both reach as far as their form does, that is to values of which nothing is known.
        """
        holding: dict[int, list[fx.Node]] = {}
        for node in read:
            if (leaf := self._named(node)) is not None:
                holding.setdefault(leaf, []).append(node)
        for node in region if holding else ():
            for leaf in (holding.keys() & self._all_in(node)) - self._given(node):
                made = self._made_of(node)
                yield from ((self._made_of(r), made) for r in holding[leaf] if r not in made)

    def rounds_more(self, one: Iterable[fx.Node], other: Iterable[fx.Node]) -> bool:
        """Whether the one has been through a floating format that the other has not."""
        return not self._formats(one) <= self._formats(other)

    def _named(self, node: fx.Node) -> int | None:
        """The leaf that a value is, where that does not stand for this very value."""
        leaf = self._leaf(node)
        kind = None if leaf is None else self.leaves[leaf].kind
        return leaf if isinstance(kind, Symbol) or (isinstance(kind, Opaque) and kind.series is not None) else None

    def _all_in(self, node: fx.Node) -> frozenset[int]:
        """The leaves that a value is made of."""
        found = self.data.get(node)
        if found is None:
            leaves = self.leaves.data(_leaves(self.known[node].value)) if node in self.known else ()
            found = self.data[node] = frozenset(leaves)
        return found

    def _given(self, node: fx.Node) -> frozenset[int]:
        """The leaves of what it is computed from; a tuple has those of what that is computed from."""
        given = node.all_input_nodes
        values = [n for g in given for n in ((g,) if g in self.known else g.all_input_nodes)]
        return frozenset().union(*map(self._all_in, values))

    def _made_of(self, node: fx.Node) -> set[fx.Node]:
        """The value and those that its form was made from; one that is a leaf of its own was made from nothing."""
        seen: set[fx.Node] = set()
        work = [node]
        while work:
            at = work.pop()
            if at not in seen and not (at is not node and self._is_its_own(at)):
                seen.add(at)
                work += at.all_input_nodes
        return seen

    def _is_its_own(self, node: fx.Node) -> bool:
        leaf = self._leaf(node)
        kind = None if leaf is None else self.leaves[leaf].kind
        return isinstance(kind, Opaque) and kind.node is node

    def _leaf(self, node: fx.Node) -> int | None:
        """The only leaf that a value is a product of, if it is of one."""
        known = self.known.get(node)
        t = None if known is None else known.value.taken
        return None if t is None or len(t.accs) != 1 else t.accs[0][0]

    def _formats(self, nodes: Iterable[fx.Node]) -> set[torch.dtype]:
        found = {self.known[n].tensor.dtype for n in nodes if n in self.known}
        return {dtype for dtype in found if dtype.is_floating_point}


def _leaves(v: Val) -> set[int]:
    terms = [t for c in v.cases for t in c.terms] + ([] if v.alt is None else [v.alt])
    return {leaf for t in terms for mono in (t.accs, *t.exp.monos) for leaf, _ in mono}
