"""Logarithms, and powers, which are exponentials of them."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import reduce

import torch

from ..domain.affine import TAU, Aff
from ..domain.kinds import Opaque
from ..domain.precision import EXACT_UP_TO, SHORT, in_format
from ..domain.term import Case, Term, Val, constant, value
from ..engine import GiveUp
from ..normal.logs import known_positive, log_summands
from . import Op, rule
from .exponentials import exponential

aten = torch.ops.aten

SMALL_POWERS = (2, 3, 4)


@rule(aten.log)
def log(op: Op) -> Val:
    v: Val = op.args[0]
    if not any(t.exp for c in v.cases for t in c.terms) or any(len(c.terms) > 1 for c in v.cases):
        t = op.engine.pick(v).one
        if t is not None and op.engine.plain_term(t) and len(t.accs) == 1 and t.coef == 1:
            summands = log_summands(op.engine.leaves, t.accs[0])
            if known_positive(op.engine.leaves, summands):
                for _, access in summands:
                    if access is not None:
                        op.engine.interval(access[0])  # the signs of what is taken apart are relied on
                return value(v.shape, op.engine.log_terms(t.accs[0]))
        return op.symbol()
    cases = []
    for c in v.cases:
        if not c.terms:
            cases.append(Case(c.guards, (Term(-math.inf),)))
            continue
        (t,) = c.terms
        if t.accs or t.guards or t.coef <= 0 or not t.poly.is_const:
            return op.symbol()
        terms = [Term(1.0, f, mono) for mono, f in t.exp.lin]
        for (mono, pos), coef in t.exp.sums:
            b = Aff.var(-1)
            summed = Term(coef, accs=mono).sub(op.engine.space, {TAU: b})
            terms.append(summed.but(guards={b, pos - 1 - b}))
        if t.coef != 1:
            terms.append(Term(math.log(t.coef)))
        cases.append(Case(c.guards, op.engine.merged(terms, v.shape)))
    return Val(v.shape, tuple(cases))


@rule(aten.log_sigmoid_forward)
def log_sigmoid(op: Op) -> list[Val]:
    out, buffer = op.out
    kept = op.engine.pointwise(aten.log_sigmoid.default, op.args, op.kwargs, out)
    return [kept, op.engine.leaf(buffer, Opaque(None, "log_sigmoid_forward"))]


@rule(aten.pow)
def power(op: Op) -> Val:
    engine = op.engine
    a, b = op.operand(0), op.operand(1)
    exponent = b.number
    if not op.out.dtype.is_floating_point and engine.index_only(a) and engine.index_only(b):
        return op.symbol()  # whole numbers, and no weight
    if exponent in SMALL_POWERS and engine.scores(a):
        return multiplied_out(op, a, int(exponent))
    if exponent is not None and engine.contracts(a):
        a = engine.held(a)
    if exponent is not None and not any(t.exp for c in a.cases for t in c.terms):
        if exponent == 1:
            return a
        if exponent == 0:
            return constant(op.shape, 1.0)
        return op.symbol()
    base = a.number
    if _rounds_its_base(op, base):
        raise GiveUp(f"a base that is rounded to {op.out.dtype}, which each step of a power loses again")
    if base is not None:
        if base <= 0:
            raise GiveUp("a power of a number that is not positive")
        if engine.contracts(b) or (not engine.index_only(b) and engine.plain(b) and len(b.terms) != 1):
            return op.symbol()
        return exponential(op, b, math.log(base))
    if not engine.index_only(b) and engine.plain(b):
        return op.symbol()  # of data, whose base may be negative
    logarithm = _log_base(op, a)
    return exponential(op, engine.multiply(logarithm, b), 1.0)


def _rounds_its_base(op: Op, base: float | None) -> bool:
    """Whether a power is computed in a shorter format than its base has, as a number has none beside a tensor."""
    if op.out.dtype not in SHORT:
        return False
    wider = op.dtypes[0] is not None and EXACT_UP_TO.get(op.dtypes[0], 0) > EXACT_UP_TO[op.out.dtype]
    return in_format(base, op.out.dtype) != base if base is not None else wider


def multiplied_out(op: Op, scores: Val, times: int) -> Val:
    """A power of scores as the product that it is; to who does not look into them, it is one function of them."""
    out = reduce(op.engine.multiply, [replace(scores, alt=None)] * times)
    return out if scores.alt is None else replace(out, alt=op.symbol().one)


def _log_base(op: Op, base: Val) -> Val:
    """log of the base of a power: data stays a leaf, and must be positive."""
    engine = op.engine
    t = engine.pick(base).one
    if t is not None and not t.accs and t.exp and t.coef == 1 and not t.guards and not t.exp.sums:
        return value(base.shape, [Term(1.0, f, mono) for mono, f in t.exp.lin])
    if engine.index_only(base) and base.single:
        return engine.pointwise(aten.log.default, [base], {}, op.out)
    found = engine.access(base)
    if isinstance(found, int | float):
        if found <= 0:
            raise GiveUp("a power of a number that is not positive")
        return constant(base.shape, math.log(found))
    return value(base.shape, engine.log_terms(found[0]))


@rule(aten.square)
def square(op: Op) -> Val:
    v: Val = op.args[0]
    return multiplied_out(op, v, 2) if op.engine.scores(v) else op.symbol()
