"""Functions with two pieces, cut where their argument, an index, changes its sign; and what asks for nan."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ..domain.affine import Aff
from ..domain.term import Case, Term, Val, constant, number_of, value
from ..engine import GiveUp
from . import Op, rule
from .conditions import at_least_zero, truth
from .order import decided, weakly_decided

aten = torch.ops.aten


def _piecewise(op: Op, v: Val, pick: Callable[[tuple[Term, ...], bool], tuple[Term, ...]]) -> Val | None:
    """``pick(terms, up)`` on the two sides of ``v >= 0``; None where it is not known where they are."""
    difference = _above(op, v, v.cases[0], constant(v.shape, 0.0)) if v.single and not op.engine.plain(v) else None
    if difference is None:
        return None
    mask = truth(op.engine, v.shape, [at_least_zero(difference)])
    return op.engine.zip_cases([mask, v], lambda g: pick(g[1], bool(g[0])))


def _above(op: Op, v: Val, c: Case, limit: Val) -> Aff | None:
    """Where a case of ``v`` is at least ``limit``, as a form of which that is the sign; where both are equal, it may
    have any, as all these functions are continuous there.
    """
    found = decided(op, value(v.shape, c.terms, precision=v.precision), limit)
    return weakly_decided(op, v, c, limit) if found is None else found


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
    v: Val = op.operand(0)
    packet = op.func.overloadpacket
    if packet is aten.clamp:
        low, high = op.arg(1, "min"), op.arg(2, "max")
    else:
        other = op.arg(1, "max" if packet is aten.clamp_max else "min")
        if packet in (aten.maximum, aten.minimum) and v.number is not None:
            v, other = op.operand(1), v
        low, high = (other, None) if packet in (aten.clamp_min, aten.maximum) else (None, other)
    terms = [t for c in v.cases for t in c.terms]
    of_positions = any(not t.poly.is_const or math.isinf(t.coef) for t in terms)
    if op.engine.plain(v) and not of_positions:
        return op.symbol()
    for bound, keep_above in ((low, True), (high, False)):
        if bound is None:
            continue
        limit = op.engine.broadcast(bound, op.shape) if isinstance(bound, Val) else constant(op.shape, float(bound))
        found = _clamped(op, v, limit, keep_above)
        if found is None and of_positions:
            raise GiveUp("a clamped value that is not an index")
        if found is None:
            return op.symbol()
        v = found
    return v


def _clamped(op: Op, v: Val, limit: Val, keep_above: bool) -> Val | None:
    engine = op.engine
    cases: list[Case] = []
    for c in v.cases:
        if len(c.terms) == 1 and math.isinf(c.terms[0].coef):
            cases.append(Case(c.guards, c.terms if (c.terms[0].coef > 0) == keep_above else limit.terms))
            continue
        difference = _above(op, v, c, limit)
        if difference is None:
            return None
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
    """Of a weight, or a sum of them, it is asked whether it has overflowed, which the normal form does not know."""
    numbers = [number_of(c.terms) for c in op.args[0].cases]
    if all(x is not None for x in numbers):
        infinite = (Term(1.0),)
        return op.engine.zip_cases([op.args[0]], lambda g: infinite if g[0] and math.isinf(g[0][0].coef) else ())
    weight = any(t.exp for c in op.args[0].cases for t in c.terms) or not op.engine.index_only(op.args[0])
    return constant(op.shape, 0.0) if op.engine.never_nan(op.args[0]) and not weight else op.symbol()
