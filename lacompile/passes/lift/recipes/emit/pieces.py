"""Recipes with one dimension for each digit of an emitter, so that any two of them broadcast against each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ....facts import Call, Expr, Value
from ...domain.kinds import Opaque


class CannotEmit(Exception):
    """An access that no chain of views yields, or a leaf that is no value of the graph."""

    def __init__(self, expected: str, found: str):
        super().__init__(found)
        self.expected, self.found = expected, found


@dataclass(frozen=True)
class Piece:
    """A recipe with one dimension per digit, in the emitter's order; ``present`` tells which are not of size 1."""

    expr: Expr
    present: frozenset[int]
    dtype: torch.dtype

    def to(self, dtype: torch.dtype) -> Piece:
        if self.dtype == dtype:
            return self
        return Piece(Call(torch.Tensor.to, (self.expr, dtype)), self.present, dtype)

    def at_least(self, dtype: torch.dtype) -> Piece:
        """In this floating format where it is in a shorter one."""
        return self.to(torch.promote_types(self.dtype, dtype)) if self.dtype.is_floating_point else self

    def scaled(self, c: float | Expr) -> Piece:
        return self if c == 1 else replace(self, expr=Call(torch.mul, (self.expr, c)))

    def exp(self) -> Piece:
        return replace(self, expr=Call(torch.exp, (self.expr,)))

    def where(self, condition: Piece) -> Piece:
        """Zero elsewhere, also where this is not a number."""
        chosen = Call(torch.where, (condition.expr, self.expr, 0.0))
        return Piece(chosen, self.present | condition.present, self.dtype)

    def above_zero(self) -> Piece:
        """What is positive, kept so for its logarithm.

        Where it has underflowed, so has what its gradient is multiplied by.
        """
        wide = self.at_least(torch.float32)
        return replace(wide, expr=Call(torch.clamp, (wide.expr, torch.finfo(wide.dtype).tiny)))

    def __mul__(self, other: Piece) -> Piece:
        return self._with(torch.mul, other)

    def __add__(self, other: Piece) -> Piece:
        return self._with(torch.add, other)

    def _with(self, op: Callable[..., torch.Tensor], other: Piece) -> Piece:
        dtype = torch.promote_types(self.dtype, other.dtype)
        return Piece(Call(op, (self.expr, other.expr)), self.present | other.present, dtype)


def held_by(kind: Opaque) -> Expr:
    """The value of the graph that is this leaf."""
    assert kind.node is not None
    return joined(Value(kind.node), kind)


def joined(of: Expr, kind: Opaque) -> Expr:
    """With the two dimensions that are one of this leaf as one."""
    if kind.joined is None:
        return of
    outer, inner = kind.joined
    at = inner - (outer < inner)
    moved = of if outer == at else Call(torch.movedim, (of, outer, at))
    return Call(torch.flatten, (moved, at, at + 1))
