"""What nobody reads in a rewritten copy of a graph: pure nodes, and writes into memory that only they are about."""

from __future__ import annotations

from torch import fx

from ..capture.effects import ANYWHERE, NOWHERE
from ..graph.schedule import Schedule


class CopiedMemory:
    """Which memory each node of the copy lives in or writes into.

    What stands in for a target has memory of its own, and from there on it is that which the program's views of the
    target and its writes into it are about: storages are counted anew behind each such place.
    """

    def __init__(
        self, origin: dict[fx.Node, fx.Node], stand_ins: dict[fx.Node, tuple[fx.Node, int]], schedule: Schedule
    ):
        self.origin, self.order, self.effects = origin, schedule.order, schedule.effects
        self.stand_ins = {new: (target, at) for target, (new, at) in stand_ins.items()}
        self.cuts: dict[int, set[int]] = {}
        for target, at in self.stand_ins.values():
            for storage in self.effects.lives.get(target, NOWHERE):
                self.cuts.setdefault(storage, set()).add(at)

    def of(self, node: fx.Node) -> frozenset[tuple[int, int]]:
        """The storages of a node, each with how often it had been replaced by then."""
        if node in self.stand_ins:
            target, at = self.stand_ins[node]
            storages, behind = self.effects.lives.get(target, NOWHERE), at + 1
        elif (old := self.origin.get(node)) is not None:
            storages = self.effects.lives.get(old, NOWHERE) | self.effects.writes.get(old, NOWHERE)
            behind = self.order[old]
        else:
            return frozenset()
        return frozenset((s, sum(cut < behind for cut in self.cuts.get(s, ()))) for s in storages)

    def writes(self, node: fx.Node) -> bool:
        return self.origin.get(node) in self.effects.writes

    def is_impure(self, node: fx.Node) -> bool:
        return self.origin.get(node) in self.effects.impure

    def is_outside(self, storage: tuple[int, int]) -> bool:
        """Whether it may be seen from outside of the graph."""
        return storage[0] == ANYWHERE or storage[0] in self.effects.outside


def erase_dead(graph: fx.Graph, memory: CopiedMemory) -> None:
    """Removes what nobody reads: pure nodes, and writes into tensors made in this graph that nobody reads."""
    while True:
        for node in reversed(graph.nodes):
            pure = not memory.is_impure(node) and not memory.writes(node)
            if pure and not node.users and node.op not in ("placeholder", "output"):
                graph.erase_node(node)
        dead = _dead_memory(graph, memory)
        if not dead:
            return
        for node in reversed(dead):
            graph.erase_node(node)


def _dead_memory(graph: fx.Graph, memory: CopiedMemory) -> list[fx.Node]:
    """The nodes, in order, of storages made in this graph whose every user only views or writes the same storage."""
    where = {node: memory.of(node) for node in graph.nodes}
    members: dict[tuple[int, int], list[fx.Node]] = {}
    for node, storages in where.items():
        for storage in storages:
            members.setdefault(storage, []).append(node)
    dead = {
        storage
        for storage, nodes in members.items()
        if not memory.is_outside(storage)
        and any(memory.writes(n) for n in nodes)
        and all(
            not memory.is_impure(n) and where[n] == {storage} and all(where.get(u) == {storage} for u in n.users)
            for n in nodes
        )
    }
    return [n for n in graph.nodes if where[n] & dead]
