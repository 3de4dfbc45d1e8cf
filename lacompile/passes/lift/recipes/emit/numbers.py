"""What no value of the graph holds: numbers of the program and positions, as pieces."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from operator import add

import torch

from ....facts import Call, Const, Expr
from ...domain.affine import FIRST_SYMBOL, Aff
from ...engine import Engine
from .digits import Digits
from .lengths import size_of
from .pieces import CannotEmit, Piece


@dataclass
class Numbers:
    """Those of one emitter: on the device of ``like``, positions in the format ``exact``."""

    engine: Engine
    digits: Digits
    like: Expr
    exact: torch.dtype

    def constant(self, c: float, dtype: torch.dtype) -> Piece:
        expr: Expr = Const(c, self.like, dtype)
        for _ in self.digits.order:
            expr = Call(torch.unsqueeze, (expr, 0))
        return Piece(expr, frozenset(), dtype)

    def index(self, form: Aff) -> Piece:
        """The numbers of an index form over roles, and sizes."""
        over = self.digits.over(form)
        if not over.terms:
            return self.constant(float(over.const), self.exact)
        parts = [(self._size(v) if v >= FIRST_SYMBOL else self._counted(v)).scaled(c) for v, c in over.terms]
        total = reduce(add, parts)
        return replace(total, expr=Call(torch.add, (total.expr, float(over.const)))) if over.const else total

    def _size(self, v: int) -> Piece:
        return self.constant(1.0, self.exact).scaled(size_of(self.engine, Aff.var(v)))

    def _counted(self, digit: int) -> Piece:
        """0, 1, 2, ... along one digit."""
        if digit not in self.digits.order:
            raise CannotEmit("a form of positions", f"a form that holds {Aff.var(digit)}")
        lengths = [size_of(self.engine, self.digits.sizes[d]) if d == digit else 1 for d in self.digits.order]
        ones = Call(torch.broadcast_to, (self.constant(1.0, self.exact).expr, lengths))
        counted = Call(torch.sub, (Call(torch.cumsum, (ones, self.digits.order.index(digit))), 1.0))
        return Piece(counted, frozenset({digit}), self.exact)
