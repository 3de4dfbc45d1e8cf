"""What the nodes of a graph do besides computing a result: what they write into, and where their results live.

Known from running the graph (``capture``), by operator schemas and storages, never by the names of functions: a
write through ``relu(inplace=True)``, a foreach operation or running statistics is a write like any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

Storages = frozenset[int]
NOWHERE: Storages = frozenset()
ANYWHERE = 0
"""Stands for a storage that cannot be asked for: it may be any."""
JOINS = (torch.ops.aten.cat.default, torch.ops.aten.stack.default)
"""The operations that put tensors side by side."""
PLAIN = (torch.Tensor, int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)
"""What a node may yield and be known whole."""


@dataclass
class Effects:
    """The effects of one graph; a node that is not a key of ``lives`` or ``writes`` has none of that kind.

    What a node writes into memory that it makes itself, before anybody else sees it, is no effect.

    ``impure`` nodes must stay for another reason than a write: they draw random numbers, could not be run on fake
    tensors, or change a mode. ``outside`` are the storages of inputs and constants.

    ``ran`` are the ATen operations of each node, in order; ``along``: the dimension of its result along which the last
    of these puts tensors side by side.
    """

    lives: dict[fx.Node, Storages] = field(default_factory=dict)
    writes: dict[fx.Node, Storages] = field(default_factory=dict)
    impure: set[fx.Node] = field(default_factory=set)
    outside: Storages = NOWHERE
    ran: dict[fx.Node, list[Any]] = field(default_factory=dict)
    along: dict[fx.Node, int] = field(default_factory=dict)

    def alias(self, a: fx.Node, b: fx.Node) -> bool:
        """Whether the results of two nodes may share memory."""
        return overlap(self.lives.get(a, NOWHERE), self.lives.get(b, NOWHERE))

    def note_operation(
        self, node: fx.Node, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any
    ) -> None:
        self.ran.setdefault(node, []).append(func)
        if func in JOINS:
            dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
            self.along[node] = dim % out.dim()

    def note_write(self, node: fx.Node, tensors: Iterable[Any]) -> None:
        if found := storages(tensors):
            self.writes[node] = self.writes.get(node, NOWHERE) | found

    def note_result(self, node: fx.Node, result: Any) -> None:
        leaves = [result] if isinstance(result, torch.Tensor) else tree_leaves(result)
        self.lives[node] = self.lives.get(node, NOWHERE) | storages(leaves)
        if node not in self.writes and not (leaves and all(isinstance(x, PLAIN) for x in leaves)):
            self.impure.add(node)

    def boundary(self, gm: fx.GraphModule) -> Boundary:
        """What ``gm``, the graph of these effects, does to the one that calls it."""
        inputs = [self.lives.get(n, NOWHERE) for n in gm.graph.find_nodes(op="placeholder")]
        written = frozenset().union(*self.writes.values())
        writes = tuple(n for n, lives in enumerate(inputs) if overlap(written, lives))
        elsewhere = self.outside - frozenset().union(*inputs)
        results = [self.lives.get(n, NOWHERE) for n in gm.graph.output_node().all_input_nodes]
        return Boundary(
            writes,
            impure=bool(self.impure) or overlap(written, elsewhere),
            aliases=any(overlap(r, self.outside) for r in results),
        )


@dataclass(frozen=True)
class Boundary:
    """What a graph does to the one that calls it.

    ``writes`` are positions of the inputs that it may write into; ``aliases``: a result may share memory with an input
    or a constant; ``impure``: running it twice, or not at all, is not the same.
    """

    writes: tuple[int, ...]
    impure: bool
    aliases: bool


def overlap(a: Storages, b: Storages) -> bool:
    """Whether two sets of storages have one in common."""
    return bool(a and b and (ANYWHERE in a or ANYWHERE in b or a & b))


def storages(tensors: Iterable[Any]) -> Storages:
    """The storages of the tensors among these values."""
    return frozenset(_storage(t) for t in tensors if isinstance(t, torch.Tensor))


def _storage(tensor: torch.Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse tensors and wrappers have none
        return ANYWHERE
