"""The part of a program that is computed from numbers alone, run as it stands where its numbers are asked for.

A mask may be written down in more ways than there are rules for: at ``tril_indices``, diagonal by diagonal, as strides
over a vector, as an inverse. What it is in each call is what it is in this one, and its numbers are read as those of a
buffer are. So what is wanted here is more than that a node reads no input, of which validation knows by itself
(``region.py: rounded_numbers``): it can be run, and its result is what was written into it too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from ...._compat import outside_modes
from ...capture import Capture, Record
from ...capture.effects import NOWHERE, overlap
from ...graph.lenders import numbers_read
from ..domain.kinds import Opaque
from ..domain.term import Val
from ..engine import FEW_CASES, Engine
from ..inputs.fitted import fitted_constant
from .known import Known
from .own import leaves_of

MAX_NUMBERS = 2**26
"""Of one tensor."""


class Constants:
    """Of one graph: nodes in its order, which are numbers of the program or functions of such.

    Attributes:
        fitted: those that are known by their numbers.
    """

    def __init__(self, engine: Engine, capture: Capture, results: Mapping[fx.Node, Known]) -> None:
        self.engine, self.capture, self.results = engine, capture, results
        self.fitted: dict[fx.Node, None] = {}
        self._looked_at: set[tuple[Record, int]] = set()  # and how often they had been written into
        self._rests_on: dict[fx.Node, frozenset[fx.Node]] = {}
        self._given: dict[fx.Node, torch.Tensor] = {}
        self._waiting: list[fx.Node] = []
        self._held: dict[fx.Node, Any] = {}

    def hold(self, node: fx.Node, real: torch.Tensor) -> None:
        """A tensor that belongs to the graph; the program may write into it, so another one is written into here."""
        if real.numel() <= MAX_NUMBERS:
            self._rests_on[node], self._given[node] = frozenset(), real
            self._waiting.append(node)

    def are_read_by(self, node: fx.Node) -> bool:
        """Whether a node is computed from nothing but numbers that the program writes, and no input."""
        return all(n in self._rests_on for n in numbers_read(node))

    def note(self, node: fx.Node, makes: bool) -> None:
        """A call of operations of PyTorch on such nodes alone; ``makes``: it has made tensors."""
        effects, memory = self.capture.effects, self.capture.memory
        writes = effects.writes.get(node, NOWHERE)
        if not (makes or writes) or not _is_small(node):
            return
        read = list(numbers_read(node))
        given = [self.results[n].tensor for n in read if n in self.results]
        writers = {w for t in given for w in memory.record(t).root.writers} - {node}
        outside = node in effects.impure or overlap(writes, effects.outside)
        if not outside and self._rests_on.keys() >= writers:
            self._rests_on[node] = frozenset(writers.union(read))
            self._waiting.append(node)

    # -------------------------------------------------------------------------------------------------------- reading

    def settle(self, node: fx.Node) -> None:
        """A result that no rule looks into, or that is made of many pieces, is the weights that its numbers are."""
        if node not in self._rests_on or node not in self.results:
            return
        memory = self.capture.memory
        record = memory.record(self.results[node].tensor)
        if not self._is_unread(memory.read(record)):
            return
        base = self._made_of(record)
        if base is not record and self._is_fitted(base):
            record.value = memory.made_from(record, base.value, base)
        else:
            self._is_fitted(record)

    def _made_of(self, record: Record) -> Record:
        """The tensor that a node has made and that another one is a view of."""
        at: Record | None = record
        while at is not None:
            if self._is_result(at):
                record = at
            at = at.parent
        return record

    def _is_result(self, record: Record) -> bool:
        own = None if record.node is None else self.results.get(record.node)
        return own is not None and own.tensor is record.tensor

    def _is_unread(self, v: Val) -> bool:
        leaves = self.engine.leaves
        kinds = (leaves[leaf].kind for leaf in leaves.data(leaves_of([v])))
        return len(v.shape) > 1 and (len(v.cases) > FEW_CASES or any(isinstance(k, Opaque) for k in kinds))

    def _is_fitted(self, record: Record) -> bool:
        """Whether a tensor of numbers alone is, or has now become, the weights that its numbers are."""
        known, writers, node = self.capture.memory.read(record), record.root.writers, record.node
        if not self._is_unread(known):
            return node in self.fitted
        if node is None or not self._is_result(record) or (record, len(writers)) in self._looked_at:
            return False
        self._looked_at.add((record, len(writers)))
        numbers = self._numbers(node, writers)
        weights = None if numbers is None else fitted_constant(self.engine, known.shape, numbers, node.graph)
        if weights is None:
            return False
        record.value, self.fitted[node] = weights, None
        return True

    def _numbers(self, node: fx.Node, writers: Iterable[fx.Node]) -> torch.Tensor | None:
        """What a node's tensor holds now that these have written into it; None if that is not known."""
        waiting, self._waiting = self._waiting, []
        with outside_modes(), torch.no_grad():
            for at in waiting:
                if self._rests_on[at] <= self._held.keys():
                    self._run(at)
        found = self._held.get(node)
        return found if isinstance(found, torch.Tensor) and self._held.keys() >= set(writers) else None

    def _run(self, node: fx.Node) -> None:
        """A node that cannot run here costs those that read its result, or what it has written into."""
        if node in self._given:
            self._held[node] = self._given[node].detach().clone()
            return
        try:
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: self._held[n] if n in self._held else _lent(n))
            if node.op == "call_function":
                result = node.target(*args, **kwargs)  # type: ignore[operator]
            else:
                result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        except Exception:
            return
        if _alike(result, node.meta.get("example_value")):
            self._held[node] = result


def _lent(node: fx.Node) -> torch.Tensor:
    """The shape and format of a value that is read for these alone, without its memory.

    Raises:
        ValueError: it lies in memory in another order, which ``zeros_like`` keeps, so that a view may see it.
    """
    example = node.meta["example_value"]
    if not example.is_contiguous():
        raise ValueError(f"{node.name} is not contiguous")
    return torch.zeros((), dtype=example.dtype, device=example.device).expand(example.shape)


def _is_small(node: fx.Node) -> bool:
    """Whether all tensors that a call makes are of known sizes, and none has more than MAX_NUMBERS elements."""
    tensors = [x for x in tree_leaves(node.meta.get("example_value")) if isinstance(x, torch.Tensor)]
    return node.op in ("call_function", "call_method") and all(
        all(isinstance(n, int) for n in t.shape) and t.numel() <= MAX_NUMBERS for t in tensors
    )


def _alike(result: Any, example: Any) -> bool:
    """Whether each tensor is of the kind that Dynamo saw, as under another autocast it may not be."""
    pairs = zip(tree_leaves(result), tree_leaves(example), strict=False)
    return all(
        a.dtype == b.dtype and a.shape == b.shape and a.device.type == b.device.type
        for a, b in pairs
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    )
