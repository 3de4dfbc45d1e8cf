"""Functions with two pieces, cut where their argument, an index, changes its sign; and what asks for nan."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ..engine import GiveUp
from ..term import Case, Term, Val, constant, value
from . import Op, rule
from .arith import operand
from .conditions import at_least_zero, decided, truth

aten = torch.ops.aten


def _piecewise(op: Op, v: Val, pick: Callable[[tuple[Term, ...], bool], tuple[Term, ...]]) -> Val | None:
    """``pick(terms, up)`` on the two sides of ``v >= 0`` where ``v`` is index-valued (or a signed leaf times one)."""
    t = v.one
    if t is None or t.poly.is_const or t.exp or t.guards:
        return None
    difference = decided(op, v, constant(v.shape, 0.0))
    if difference is None:
        return None
    mask = truth(op.engine, v.shape, [at_least_zero(difference)])
    return op.engine.zip_cases([mask, v], lambda g: pick(g[1], bool(g[0])))


@rule(aten.abs)
def absolute(op: Op) -> Val:
    out = _piecewise(op, op.args[0], lambda ts, up: ts if up else tuple(t.but(coef=-t.coef) for t in ts))
    return op.symbol() if out is None else out


@rule(aten.relu)
def relu(op: Op) -> Val:
    out = _piecewise(op, op.args[0], lambda ts, up: ts if up else ())
    return op.symbol() if out is None else out


@rule(aten.clamp, aten.clamp_min, aten.clamp_max, aten.maximum, aten.minimum)
def clamp(op: Op) -> Val:
    v: Val = operand(op, 0)
    packet = op.func.overloadpacket
    low = op.arg(1, "min") if packet in (aten.clamp, aten.clamp_min, aten.maximum) else None
    high = (
        op.arg(2, "max")
        if packet is aten.clamp
        else op.arg(1, "max")
        if packet in (aten.clamp_max, aten.minimum)
        else None
    )
    if not all(t.poly.is_const for c in v.cases for t in c.terms) or any(
        math.isinf(t.coef) for c in v.cases for t in c.terms
    ):
        for bound, keep_above in ((low, True), (high, False)):
            if bound is None:
                continue
            limit = op.engine.broadcast(bound, op.shape) if isinstance(bound, Val) else constant(op.shape, float(bound))
            v = _clamped(op, v, limit, keep_above)
        return v
    return op.symbol()


def _clamped(op: Op, v: Val, limit: Val, keep_above: bool) -> Val:
    engine = op.engine
    cases: list[Case] = []
    for c in v.cases:
        piece = value(v.shape, c.terms, precision=v.precision)
        if len(c.terms) == 1 and math.isinf(c.terms[0].coef):
            cases.append(Case(c.guards, c.terms if (c.terms[0].coef > 0) == keep_above else limit.terms))
            continue
        difference = decided(op, piece, limit)
        if difference is None:
            raise GiveUp("a clamped value that is not an index")
        keep = at_least_zero(difference if keep_above else -difference)
        for guard, terms in ((keep, c.terms), (-keep - 1, limit.terms)):
            inside = engine.prune(c.guards | {guard}, v.shape)
            if inside is not None:
                cases.append(Case(inside, terms))
    return engine.join_cases(Val(v.shape, tuple(cases)))


@rule(aten.nan_to_num)
def nan_to_num(op: Op) -> Val:
    return op.args[0] if op.engine.never_nan(op.args[0]) else op.symbol()


@rule(aten.isnan)
def isnan(op: Op) -> Val:
    return constant(op.shape, 0.0) if op.engine.never_nan(op.args[0]) else op.symbol()


@rule(aten.isinf)
def isinf(op: Op) -> Val:
    """Of a weight it is asked whether it has overflowed, which the normal form does not know."""
    weight = any(t.exp for c in op.args[0].cases for t in c.terms)
    return constant(op.shape, 0.0) if op.engine.never_nan(op.args[0]) and not weight else op.symbol()
