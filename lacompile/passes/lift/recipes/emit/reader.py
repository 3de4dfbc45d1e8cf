"""What one access reads: a value of the graph, one that holds the leaf, or its function computed again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import fx

from ....._compat import takes_no_number
from ....facts import Call, Const, Expr, Value
from ...domain.affine import ZERO, Aff
from ...domain.exponent import Access
from ...domain.kinds import Extended, Number, Opaque, Positions, Scalar, Symbol, Table
from ...engine import Engine
from ..holders import Place, place_of
from .lengths import number_of
from .numbers import Numbers
from .pieces import CannotEmit, Piece, held_by, joined
from .series import joined_pieces
from .views import Views

aten = torch.ops.aten


OF_RATES = (
    aten.where.self, aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.neg.default, aten._to_copy.default,
)  # fmt: skip
"""Functions whose result for minus infinity and for a large negative number is, exponentiated, the same."""


class Reader:
    """Reads accesses of leaves; the arguments are those of the emitter."""

    def __init__(
        self,
        engine: Engine,
        views: Views,
        held: Mapping[int, Place],
        numbers: Numbers,
        computed: Callable[[int], Expr],
    ):
        self.engine, self.leaves, self.views, self.held = engine, engine.leaves, views, held
        self.numbers, self.computed = numbers, computed

    def read(self, access: Access, rate: bool = False) -> Piece:
        """What an access reads; of a ``rate``, which is exponentiated, logarithms stay finite."""
        leaf_id, idx = access
        leaf = self.leaves[leaf_id]
        kind = leaf.kind
        if isinstance(kind, Opaque) and kind.series is not None:
            return self._beside(kind, leaf.shape, idx, leaf.dtype)
        if isinstance(kind, Opaque):
            return self.views.indexed(self._value(leaf_id, kind), leaf.shape, idx, leaf.dtype)
        if leaf_id in self.held:
            node, pattern = self.held[leaf_id]
            with suppress(CannotEmit):  # a part of it is held, and another read: then it is computed
                found = self._through(node, pattern, idx)
                if found is not None:
                    return found
        if isinstance(kind, Table):
            exact = self.numbers.exact
            numbers = Const(_nested(self.leaves.made(leaf_id)), self.numbers.like, exact)
            return self.views.indexed(numbers, leaf.shape, idx, exact)
        if isinstance(kind, Positions):
            return self.numbers.index(idx[0])
        if isinstance(kind, Extended):
            return self._extended(kind.of, idx)
        if isinstance(kind, Scalar):
            return self.numbers.constant(1.0, self.numbers.exact).scaled(number_of(self.engine, kind))
        assert isinstance(kind, Symbol)
        return self._symbol(kind, idx, leaf.dtype, rate)

    def _value(self, leaf_id: int, kind: Opaque) -> Expr:
        """An opaque leaf as it is in the graph, or computed if it is known what it is."""
        if kind.node is not None:
            return held_by(kind)
        if kind.reading is not None:
            return self.computed(leaf_id)
        raise CannotEmit("a value of the traced graph", f"a value inside an operation ({kind.label})")

    def _beside(self, kind: Opaque, shape: tuple[Aff, ...], idx: tuple[Aff, ...], dtype: torch.dtype) -> Piece:
        """The pieces of a series that an access reads, joined."""
        series = kind.series
        assert series is not None
        at, dim = idx[series.dim], series.dim
        first, last = self.views.bounds(at)
        pieces = joined_pieces(self.leaves, series, first, last)
        shape = (*shape[:dim], Aff.lit(pieces.length), *shape[dim + 1 :])
        idx = (*idx[:dim], at - pieces.start, *idx[dim + 1 :])
        return self.views.indexed(joined(pieces.expr, kind), shape, idx, dtype)

    def _extended(self, leaf_id: int, idx: tuple[Aff, ...]) -> Piece:
        """A leaf read beyond its ends too, where it is zero: a value of the graph, padded."""
        leaf = self.leaves[leaf_id]
        if isinstance(leaf.kind, Opaque) and leaf.kind.node is not None:
            return self.views.indexed(held_by(leaf.kind), leaf.shape, idx, leaf.dtype, padded=True)
        if leaf_id in self.held:
            node, pattern = self.held[leaf_id]
            has_all = self._has_all(node, pattern, leaf.shape, idx)
            if has_all and (found := self._through(node, pattern, idx, padded=True)) is not None:
                return found
        return self.read((leaf_id, idx))

    def _has_all(self, node: fx.Node, pattern: tuple[Aff, ...], sizes: tuple[Aff, ...], idx: tuple[Aff, ...]) -> bool:
        """Whether a node, which may hold the first places of a leaf alone, has all of it that is read."""
        shape = self.engine.shape(node.meta["example_value"])
        ends = [
            (shape[d], size, i)
            for p, size, i in zip(pattern, sizes, idx, strict=True)
            if (d := place_of(p)) is not None
        ]
        return all(end == size or self.views.ends_by(i, end) for end, size, i in ends)

    def _through(
        self, node: fx.Node, pattern: tuple[Aff, ...], idx: tuple[Aff, ...], padded: bool = False
    ) -> Piece | None:
        """Reads a symbol leaf from a node that holds it: pattern tells which dimension of the node each index is."""
        example = node.meta.get("example_value")
        if not isinstance(example, torch.Tensor):
            return None
        at: dict[int, Aff] = {}
        for p, i in zip(pattern, idx, strict=True):
            if (d := place_of(p)) is not None and at.setdefault(d, i) != i:
                return None
        if any(self.engine.space.sub(p, at) != i for p, i in zip(pattern, idx, strict=True)):
            return None
        shape = self.engine.shape(example)
        index = tuple(at.get(d, ZERO) for d in range(len(shape)))
        return self.views.indexed(Value(node), shape, index, example.dtype, padded)

    def _symbol(self, kind: Symbol, idx: tuple[Aff, ...], dtype: torch.dtype, rate: bool) -> Piece:
        args: list[Any] = []
        present: frozenset[int] = frozenset()
        chosen = kind.op is aten.where.self
        tensors = len(self.leaves.tensors(a[0] for a in kind.given(idx) if isinstance(a, tuple)))
        for n, arg in enumerate(kind.given(idx)):
            if isinstance(arg, tuple):
                access, used = arg
                of = self.leaves[access[0]].kind
                if isinstance(of, Scalar) and tensors and not takes_no_number(kind.op, n):
                    args.append(number_of(self.engine, of))  # as in the program, where it has no format
                    continue
                piece = self.read(access, rate and kind.op in OF_RATES and not (chosen and n == 0))
                if used is not None:
                    piece = piece.to(used)
                if kind.op is aten.exp.default:  # of a weight, of which it is not known what it was computed in
                    piece = piece.at_least(torch.float32)
                    dtype = piece.dtype
                if rate and kind.op is aten.log.default and not self.leaves.truth(access[0]):
                    piece = piece.above_zero()
                    dtype = piece.dtype
                args.append(piece.expr)
                present |= piece.present
            elif isinstance(arg, Number):
                args.append(Const(arg.value if arg.scalar else (arg.value,), self.numbers.like, arg.dtype))
            else:
                args.append(arg)
        return Piece(Call(kind.op, tuple(args), dict(kind.kwargs)), present, dtype)


def _nested(array: Any) -> Any:
    return float(array) if array.ndim == 0 else tuple(_nested(x) for x in array)
