"""Sizes as numbers, or as recipes that compute them from the sizes among the inputs of the graph; and other numbers."""

from __future__ import annotations

import operator
from typing import Any

from ....facts import Call, Expr, Value
from ...domain.affine import FIRST_DIV, FIRST_MIXED, Aff
from ...domain.kinds import Scalar
from ...engine import Engine
from .pieces import CannotEmit


def number_of(engine: Engine, kind: Scalar) -> Expr:
    """A number of the traced program, by the value of the graph that it is."""
    number = Value(engine.number_nodes[kind.of])
    return Call(operator.truediv, (1.0, number)) if kind.inverse else number


def size_of(engine: Engine, size: Aff) -> Any:
    """A number, or a recipe that computes it from the sizes among the inputs of the graph.

    Raises:
        CannotEmit: they do not say it.
    """
    if size in engine.size_nodes:
        return Value(engine.size_nodes[size])
    out: Any = int(size.const)
    for v, c in size.terms:
        part = _variable(engine, v)
        part = part if c == 1 else Call(operator.mul, (part, int(c)))
        out = part if isinstance(out, int) and out == 0 else Call(operator.add, (part, out))
    return out


def _variable(engine: Engine, v: int) -> Any:
    for known, node in engine.size_nodes.items():
        if len(known.terms) == 1 and known.terms[0][0] == v and known.terms[0][1] > 0 and not known.const:
            times = int(known.terms[0][1])
            return Value(node) if times == 1 else Call(operator.floordiv, (Value(node), times))
    factors = engine.space.factors_of(v)
    if factors:
        out = size_of(engine, factors[0])
        for f in factors[1:]:
            out = Call(operator.mul, (out, size_of(engine, f)))
        return out
    if FIRST_DIV <= v < FIRST_MIXED:
        inner, m = engine.space.div_of[v]
        return Call(operator.floordiv, (size_of(engine, inner), m))
    shown = engine.symints.get(Aff.var(v), Aff.var(v))
    raise CannotEmit("lengths computed from sizes and numbers", f"the symbolic length {shown}")
