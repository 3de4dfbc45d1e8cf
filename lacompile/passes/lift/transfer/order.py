"""Which of two values is the larger one, as a form in indices whose sign says it."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..domain.affine import ONE, ZERO, Aff
from ..domain.exponent import Exponent, Mono
from ..domain.precision import decidable
from ..domain.term import Case, Term, Val, value
from ..engine import Engine, GiveUp
from . import Op
from .exponentials import weights, without_exponential


def decided(op: Op, a: Val, b: Val) -> Aff | None:
    """A form with integer coefficients and any constant whose sign is that of ``a - b``; None if there is none.

    Raises:
        GiveUp: rounding may decide in the program.
    """
    difference = _index_difference(op.engine, _with_tables(op, a), _with_tables(op, b))
    if difference is not None and not decidable(op, a, b):
        raise GiveUp("a decision by numbers that rounding may have changed")
    return difference


def _with_tables(op: Op, v: Val) -> Val:
    """A value in which weights that positions are multiplied by, such as the slopes 2^-h of heads, are tables."""
    tiny = max(
        (torch.finfo(d).tiny for d in op.dtypes if isinstance(d, torch.dtype) and d.is_floating_point), default=0
    )

    def of_term(t: Term) -> Term:
        if not t.exp or t.poly.is_const or not op.engine.index_only(value(v.shape, [t])):
            return t
        table = without_exponential(op.engine, t, v.shape)
        return table if all(op.engine.interval(leaf)[0] > tiny for leaf, _ in table.accs) else t

    return v.with_terms(of_term) if v.single else v


def weakly_decided(op: Op, v: Val, case: Case, limit: Val) -> Aff | None:
    """A form with integer coefficients that, in a case of ``v``, is at least 0 only where ``v >= limit``, and at most 0
    only where ``v <= limit``; None if none is known.

    It serves functions that are continuous where both are equal. Known are the order of a single weight and its factor,
    or what is not positive, and that of 0 and of sums whose rates have known signs.
    """
    engine, at = op.engine, limit.number
    if at is None or (v.alt is not None and not engine.structured(v)):
        return None
    t = case.terms[0] if len(case.terms) == 1 else None
    if t is not None and t.exp and t.coef > 0 and t == Term(t.coef, exp=t.exp) and (at <= 0 or t.coef == at):
        return ONE if at <= 0 else _sign_of(engine, t.exp)
    if at != 0 or engine.plain(v):
        return None
    try:
        found = weights(engine, case, 1.0, v.shape)
    except GiveUp:
        return None
    if len(found) != 1 or len(found[0].terms) != 1:
        return None
    form = _sign_of(engine, found[0].terms[0].exp)
    # What has one sign everywhere is left to stand for itself: a normaliser of positive features is a function of a sum
    # at every token, and only of the first is the sign seen.
    return None if form is None or form.is_const else form


def _sign_of(engine: Engine, exp: Exponent) -> Aff | None:
    """A form that an exponent is of the sign of: of rates of known sign, each times a positive multiple of the form."""
    summands = list(exp.lin)
    for mono in {mono for (mono, _), _ in exp.sums}:
        ends = [(pos, c) for (other, pos), c in exp.sums if other == mono]
        if len(ends) == 1:
            ends.append((ZERO, -ends[0][1]))  # P(0) is not written
        if len(ends) > 2 or ends[0][1] != -ends[1][1]:
            return None
        (p, above), (q, _) = ends
        summands.append((mono, (p - q) * above))
    forms = {_whole(f * _sign(engine, mono)) for mono, f in summands}
    return forms.pop() if len(forms) == 1 else None


def _sign(engine: Engine, mono: Mono) -> int:
    """1 if the product is nowhere below 0, -1 if nowhere above, 0 if that is not known."""
    sign = 1
    for leaf, _ in mono:
        low, high = engine.interval(leaf)
        sign *= 1 if low >= 0 else -1 if high <= 0 else 0
    return sign


def _whole(f: Aff) -> Aff | None:
    """A positive multiple of a form, with integers; None if that is not known."""
    least = min([abs(c) for _, c in f.terms] or [abs(f.const)])
    whole = Aff.of({v: c / least for v, c in f.terms}, f.const / least) if least else f
    return whole if least and all(type(c) is int for c in (whole.const, *(c for _, c in whole.terms))) else None


def _index_difference(engine: Engine, a: Val, b: Val) -> Aff | None:
    if not a.single or not b.single or len(a.terms) > 4 or len(b.terms) > 4:
        return None
    total, constant = ZERO, 0.0  # apart: a form takes a tiny constant for what is left of a cancellation
    factor: tuple[Any, ...] | None = None
    for sign, v in ((1, a), (-1, b)):
        for t in v.terms:
            if t.exp or t.guards or any(x < 0 for x in engine.space.vars(t.poly)) or math.isinf(t.coef):
                return None
            if factor is not None and factor != t.accs:
                return None
            factor = t.accs
            total = total + (t.poly - t.poly.const) * (t.coef * sign)
            constant += t.poly.const * t.coef * sign
    if factor:
        # slope[h] * (i - j): the sign of the leaf decides which way the comparison goes.
        low, high = engine.interval(factor[0][0])
        if len(factor) != 1 or not (low > 0 or high < 0) or constant:
            return None
        total = total if low > 0 else -total
    if not all(isinstance(c, int) for _, c in total.terms):
        scale = 1.0 / min(abs(c) for _, c in total.terms)
        total, constant = total * scale, constant * scale
    if not all(isinstance(c, int) for _, c in total.terms):
        return None
    if 0 < abs(constant - round(constant)) < 1e-6:
        return None  # the program's rounding decides
    return Aff(total.terms, total.const + (int(constant) if constant.is_integer() else constant))
