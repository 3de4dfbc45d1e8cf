"""What a loop computes for one token or chunk after another, as pieces of one tensor (see ``series.py``)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import fx

from ...capture import Capture
from ..domain.kinds import Opaque
from ..domain.term import Precision, Term, Val, value
from ..engine import Engine, GiveUp
from .known import Known, given_to
from .own import leaves_of, own_leaf
from .series import Circumstances, SeriesTable
from .windows import window

CALLS = ("call_function", "call_method", "call_module")


class LoopResults:
    """Of one graph.

    Args:
        engine: the analysis.
        capture: which runs the graph.
        known: what is known of its nodes by now.
        demand: takes the values that are read as they are.

    Attributes:
        given: the tensors of inputs and constants, of which nothing is known.
    """

    def __init__(
        self,
        engine: Engine,
        capture: Capture,
        known: Mapping[fx.Node, Known],
        demand: Callable[[Iterable[fx.Node]], None],
    ) -> None:
        self.given: dict[fx.Node, torch.Tensor] = {}
        self._engine, self._capture, self._memory, self._known = engine, capture, capture.memory, known
        self._demand = demand
        self._series = SeriesTable(engine.leaves, self._weighs_features)
        self._wholes: dict[fx.Node, Val] = {}  # of which parts are called with, as leaves

    def beside_others(self, node: fx.Node, val: Val, tensor: torch.Tensor, repeatable: bool) -> Val:
        """What a loop computes for a token or a chunk, of which no more is known, as a piece of one tensor for all."""
        t = val.taken
        if t is None or len(t.accs) != 1 or node.op not in CALLS or node in self._memory.record(tensor).root.writers:
            return val
        leaf = self._engine.leaves[t.accs[0][0]]
        kind = leaf.kind
        if not isinstance(kind, Opaque) or kind.node is not node or kind.unmerged or kind.series is not None:
            return val
        if window(self._engine, val, given_to(node, self._known)) is not None:
            return val  # a part of the features, which has a place of its own among them, is no place of the window
        call = self._circumstances(node, tensor, repeatable)
        found = self._series.piece(
            node, val.shape, tensor.dtype, self._data_of, kind, (leaf.interval, leaf.rests_on), call
        )
        if found is None:
            return val
        if (rolled := self._engine.rolled.get(t.accs[0])) is not None:
            self._engine.rolled[found] = rolled
        piece = value(val.shape, [Term(accs=(found,))], precision=Precision.EXACT)
        return piece if val.alt is None else replace(val, alt=piece.one)

    def of_a_window(self, node: fx.Node, val: Val, tensor: torch.Tensor) -> Val:
        """What a loop computes for a token from a window of them, as a piece of one tensor for all; a view is none."""
        root = self._memory.record(tensor).root
        if node.op not in CALLS or root.node is not node or node in root.writers or self._is_piece(val):
            return val
        found = window(self._engine, val, given_to(node, self._known))
        if found is None:
            return val
        kind = Opaque(None, node.name, leaves_of([val]))
        call = self._circumstances(node, tensor, repeatable=False)
        access = self._series.of_windows(node, val.shape, tensor.dtype, found, kind, call)
        if access is None:
            return val
        piece = value(val.shape, [Term(accs=(access,))], precision=Precision.EXACT)
        return piece if val.alt is None else replace(val, alt=piece.one, own=piece.one)

    def _weighs_features(self, v: Val, w: Val) -> bool:
        """Whether ``v`` weighs the features of ``w``, with what may be other numbers in each call: no whole input."""
        engine, t = self._engine, v.taken
        kinds = [engine.leaves[leaf].kind for leaf, _ in (() if t is None else t.accs)]
        given = bool(kinds) and all(isinstance(k, Opaque) and k.node in self.given for k in kinds)
        return engine.choices.weighed_whole and engine.of_features(v, w) and not (given and not engine.in_part(v))

    def _is_piece(self, val: Val) -> bool:
        """Whether it is beside others of its kind already."""
        t = val.alt or val.one
        kinds = [self._engine.leaves[leaf].kind for leaf, _ in (() if t is None else t.accs)]
        return len(kinds) == 1 and isinstance(kinds[0], Opaque) and kinds[0].series is not None

    def _circumstances(self, node: fx.Node, tensor: torch.Tensor, repeatable: bool) -> Circumstances:
        given = map(self._tensor_of, node.all_input_nodes)
        return Circumstances(
            self._capture.records_gradients,
            repeatable and node not in self._capture.effects.impure and self._memory.record(tensor).root.node is node,
            not any(t is not None and self._memory.record(t).root.writers for t in given),
        )

    def _data_of(self, node: fx.Node) -> Val | None:
        """What a node's tensor holds now, an exponential of data as the data that it is too."""
        v = self._value_of(node)
        t = None if v is None else v.taken
        if v is None or t is None or not t.exp or self._engine.index_only(v) or not self._engine.plain_term(t):
            return v
        try:
            found = self._engine.term_access(t, None)
        except GiveUp:
            return v
        return value(v.shape, [Term(accs=(found[0],))]) if isinstance(found, tuple) else v

    def _value_of(self, node: fx.Node) -> Val | None:
        """What a node's tensor holds now, whoever has written into it.

        A part of what is looked into, as the tokens of another attention or of a residual, is one of a value of the
        graph.
        """
        tensor = self._tensor_of(node)
        if tensor is None:
            return None
        record = self._memory.record(tensor)
        root = record.root
        known = self._known.get(root.node) if root.node is not None else None
        if record is root or known is None or known.tensor is not root.tensor or root.writers:
            return self._memory.read(record)
        if self._reads_places(known.value):
            return self._memory.read(record)
        if known.node not in self._wholes:
            self._wholes[known.node] = own_leaf(self._engine, known.node, known.value, known.tensor)
            self._demand([known.node])
        return self._memory.made_from(record, self._wholes[known.node])

    def _reads_places(self, v: Val) -> bool:
        """Whether each factor is read at one place where the value is, or at one token."""
        t = v.taken
        if t is None or not self._engine.plain_term(t):
            return False
        of_token = [{i for i in a[1] if not i.is_const} if self._engine.places(a) else a[1] for a in t.accs]
        return all(len(idx) <= len(v.shape) for idx in of_token)

    def _tensor_of(self, node: fx.Node) -> torch.Tensor | None:
        return self._known[node].tensor if node in self._known else self.given.get(node)
