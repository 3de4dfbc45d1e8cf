"""Products of accesses, and their digits laid out as the dimensions of an operand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import mul
from typing import Any

import torch
from torch import fx

from ....facts import Call, Expr, Value
from ...domain.affine import ONE, Aff
from ...domain.exponent import Access, Mono
from ...domain.kinds import Scalar
from ...engine import Engine
from ..holders import Place
from .calls import permuted, squeezed
from .digits import Digits
from .lengths import number_of, size_of
from .numbers import Numbers
from .pieces import CannotEmit, Piece
from .reader import Reader
from .views import Views


class Emitter:
    """Emits accesses over a fixed list of roles.

    Args:
        engine: the analysis the accesses belong to.
        roles: role variable -> its length.
        accesses: every access that will be emitted, so that roles are split into digits once and for all.
        held: leaf -> (node, index) of graph nodes that hold a symbol leaf already.
        like: a value of the graph; what is made of known numbers alone lives on its device.
        compute: the format that products are formed in, or a longer one: factors may have been cast to it before.
        exact: the format of known numbers, and of rates.
        computed: how a leaf that no node holds, but of which it is known what it is, is computed.
    """

    def __init__(
        self,
        engine: Engine,
        roles: Mapping[int, Aff],
        accesses: Sequence[Access],
        held: Mapping[int, Place],
        like: fx.Node,
        compute: torch.dtype,
        exact: torch.dtype,
        computed: Callable[[int], Expr],
    ):
        self.engine, self.compute = engine, compute
        self.digits = Digits(engine.space, roles, accesses)
        self.numbers = Numbers(engine, self.digits, Value(like), exact)
        self.reader = Reader(engine, Views(engine, self.digits), held, self.numbers, computed)

    # ----------------------------------------------------------------------------------------------------- products

    def product(self, accesses: Sequence[Access], factors: Sequence[Piece] = (), *, rate: bool = False) -> Piece | None:
        """The product of accesses; None for the empty product. Where a condition does not hold nothing is read.

        That of a ``rate`` will be exponentiated. Numbers of the program multiply what is there, in its format.
        """
        kinds = [self.engine.leaves[leaf].kind for leaf, _ in accesses]
        numbers = [number_of(self.engine, kind) for kind in kinds if isinstance(kind, Scalar)]
        read = [a for a, kind in zip(accesses, kinds, strict=True) if not isinstance(kind, Scalar)]
        pieces = [*(self.reader.read(a, rate) for a in read), *factors]
        wide = self.numbers.exact if rate else self.compute
        data = [p.at_least(wide) for p in pieces if p.dtype is not torch.bool]
        conditions = [p for p in pieces if p.dtype is torch.bool]
        if not data and not numbers:
            return reduce(mul, conditions) if conditions else None
        product = reduce(Piece.scaled, numbers, reduce(mul, data or [self.numbers.constant(1.0, self.numbers.exact)]))
        return reduce(Piece.where, conditions, product)

    def exponential(self, mono: Mono, coef: float) -> Piece:
        """In fp32 at least: what the program computed it in is not known, and it grows with the number of steps."""
        inner = self.product(mono, rate=True)
        assert inner is not None
        return inner.at_least(torch.float32).scaled(coef).exp()

    def summed(self, piece: Piece, roles: Sequence[int]) -> Piece:
        """The sum over those of the roles that the piece has."""
        digits = piece.present.intersection(self.digits.of(roles))
        if not digits:
            return piece
        dims = [n for n, d in enumerate(self.digits.order) if d in digits]
        return Piece(Call(torch.sum, (piece.expr, dims, True)), piece.present - digits, piece.dtype)

    # ----------------------------------------------------------------------------------------------------- operands

    def operand(
        self,
        accesses: Sequence[Access],
        weights: Sequence[tuple[Mono, float]],
        groups: Sequence[Sequence[int]],
        dtype: torch.dtype,
        shared: bool = True,
    ) -> Expr:
        """A product of accesses and exponentials; of one head for several, where it is ``shared`` and has no more."""
        piece = self.product(accesses, [self.exponential(m, c) for m, c in weights])
        if piece is None:
            piece = self.numbers.constant(1.0, dtype)
        return self.assemble(piece.to(dtype), groups, shrink=(1,) if shared else ())

    def assemble(self, piece: Piece, groups: Sequence[Sequence[int]], shrink: Sequence[int] = ()) -> Expr:
        """One dimension per group of roles. Groups in ``shrink`` keep absent trailing digits unexpanded."""
        of_group = [self.digits.of(g) for g in groups]
        lengths = [n for at, digits in enumerate(of_group) for n in self._lengths(piece, digits, at in shrink)]
        expr = self._in_order(piece, [d for digits in of_group for d in digits])
        if any(n not in (-1, 1) for n in lengths):
            expr = Call(torch.broadcast_to, (expr, lengths))
        for at, digits in enumerate(of_group):
            if not digits:
                expr = Call(torch.unsqueeze, (expr, at))
            elif len(digits) > 1:
                expr = Call(torch.flatten, (expr, at, at + len(digits) - 1))
        return expr

    def _lengths(self, piece: Piece, digits: Sequence[int], shrink: bool) -> list[Any]:
        """The length that each digit is expanded to, -1 where it stays as it is."""
        sizes = self.digits.sizes
        trailing = 1 + max((n for n, d in enumerate(digits) if d in piece.present), default=-1)
        lengths: list[Any] = []
        for n, d in enumerate(digits):
            if d in piece.present or sizes[d] == ONE:
                lengths.append(-1)
            elif shrink and n >= trailing:
                lengths.append(1)
            else:
                lengths.append(size_of(self.engine, sizes[d]))
        return lengths

    def _in_order(self, piece: Piece, digits: Sequence[int]) -> Expr:
        """The piece with a dimension for each of these digits, in this order, and for no others."""
        expr, order = piece.expr, self.digits.order
        lost = [d for d in order if d in piece.present and d not in digits]
        if lost:
            raise CannotEmit("a factor over the dimensions of its operand", f"one that also holds {Aff.var(lost[0])}")
        for n in range(len(order) - 1, -1, -1):
            if order[n] not in digits:
                expr = squeezed(expr, n)
        kept = [d for d in order if d in digits]
        return permuted(expr, [kept.index(d) for d in digits])
