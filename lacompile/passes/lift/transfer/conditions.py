"""Comparisons and logic: a condition on positions is a value of zeros and ones, one case for each region."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch

from ..domain.affine import ONE, ZERO, Aff
from ..domain.exponent import Exponent, Mono
from ..domain.leaves import Argument, Symbol
from ..domain.precision import decidable
from ..domain.term import NO_GUARDS, Case, Guards, Term, Val, constant, value
from ..engine import Engine, GiveUp
from . import Op, rule
from .arith import number, operand
from .exponentials import weights, without_exponential

aten = torch.ops.aten

Terms = tuple[Term, ...]

# --------------------------------------------------------------------------------------------------------- regions


def truth(engine: Engine, shape: tuple[Aff, ...], guards: Iterable[Aff]) -> Val:
    """1 where all guards hold, 0 elsewhere, as cases."""
    cases: list[Case] = []
    held: Guards = NO_GUARDS
    for g in guards:
        outside = engine.prune(held | {-g - 1}, shape)
        if outside is not None:
            cases.append(Case(outside, ()))
        held = held | {g}
    inside = engine.prune(held, shape)
    if inside is not None:
        cases.insert(0, Case(inside, (Term(1.0),)))
    return engine.join_cases(Val(shape, tuple(cases)))


def at_least_zero(difference: Aff, strict: bool = False) -> Aff:
    """The guard for ``difference >= 0`` (or > 0) of a form that is an integer but for its constant."""
    c = difference.const
    return Aff(difference.terms, math.ceil(c) - 1 if strict else math.floor(c))


def known_condition(engine: Engine, cond: Val) -> Val | None:
    """A condition as disjoint constant cases; None if it depends on data."""
    if not engine.index_only(cond):
        return None
    cases = engine.split(cond)
    out = []
    for c in cases:
        total = 0.0
        for t in c.terms:
            if t.accs or t.exp or not t.poly.is_const or t.guards:
                return None
            total += t.coef
        out.append(Case(c.guards, (Term(1.0),) if total else ()))
    return engine.join_cases(Val(cond.shape, tuple(out)))


def opposite(engine: Engine, known: Val) -> Val:
    """Where a known condition does not hold."""
    return engine.zip_cases([known], lambda g: () if g[0] else (Term(1.0),))


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
    engine, at = op.engine, number(limit)
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


# ----------------------------------------------------------------------------------------------------- comparisons

ORDER = {aten.gt: (1, True), aten.lt: (-1, True), aten.ge: (1, False), aten.le: (-1, False)}  # sign, strict
OF_NUMBERS = {
    aten.gt: operator.gt, aten.lt: operator.lt, aten.ge: operator.ge, aten.le: operator.le,
    aten.eq: operator.eq, aten.ne: operator.ne,
}  # fmt: skip


@rule(aten.ge, aten.gt, aten.le, aten.lt)
def compare(op: Op) -> Val:
    sign, strict = ORDER[op.func.overloadpacket]
    difference = decided(op, operand(op, 0), operand(op, 1))
    if difference is None:
        return _of_numbers(op)
    return truth(op.engine, op.shape, [at_least_zero(difference * sign, strict)])


def _of_numbers(op: Op) -> Val:
    """A comparison of values that are one number in each of their cases, as a mask of 0 and minus infinity is."""
    a, b = operand(op, 0), operand(op, 1)
    if any(case_number(c) is None for v in (a, b) for c in v.cases) or not decidable(op, a, b):
        return op.symbol()
    holds = OF_NUMBERS[op.func.overloadpacket]

    def compared(groups: list[Terms]) -> Terms:
        x, y = (case_number(Case(NO_GUARDS, terms)) for terms in groups)
        return (Term(1.0),) if holds(x, y) else ()

    return op.engine.zip_cases([a, b], compared)


def case_number(c: Case) -> float | None:
    """The number, perhaps infinite, that a value is wherever a case holds."""
    if len(c.terms) > 1:
        return None
    t = c.terms[0] if c.terms else Term(0.0)
    return t.coef if not t.accs and not t.exp and not t.guards and t.poly == ONE else None


@rule(aten.eq, aten.ne)
def equal(op: Op) -> Val:
    a, b = operand(op, 0), operand(op, 1)
    if op.args[0] is op.args[1] and op.engine.never_nan(a):  # equal forms may be computed, and rounded, in two ways
        return constant(op.shape, float(op.func.overloadpacket is aten.eq))
    difference = decided(op, a, b)
    if difference is None:
        if op.dtypes[0] is torch.bool and a.alt is None and number(b) in (0.0, 1.0):
            return a if (number(b) == 1) == (op.func.overloadpacket is aten.eq) else complement(op, a)
        return _of_numbers(op)
    inside = truth(op.engine, op.shape, [at_least_zero(difference), at_least_zero(-difference)])
    return inside if op.func.overloadpacket is aten.eq else opposite(op.engine, inside)


# ----------------------------------------------------------------------------------------------------------- logic


@rule(aten.logical_and, aten.bitwise_and, aten.__and__)
def both(op: Op) -> Val:
    return _both(op)


@rule(aten.mul)
def mul(op: Op) -> Val:
    if any(d is torch.bool for d in op.dtypes if d) and op.out.dtype is torch.bool:
        return _both(op)
    if (op.engine.weighed_whole or not op.engine.weighed) and _weighs_features(op):
        op.engine.weighed = True
        if op.engine.weighed_whole:
            raise GiveUp("features times known numbers, which are taken as they are")
    number = op.args[1]
    if isinstance(number, torch.SymInt | torch.SymFloat):
        v = operand(op, 0)
        # a size is a number of tokens beside rates and positions: exp(-slope * n) is the decay of so many
        if isinstance(number, torch.SymFloat) or op.engine.contracts(v):
            return op.engine.times_number(v, op.engine.scalar(number))
    return op.engine.multiply(operand(op, 0), operand(op, 1))


def _weighs_features(op: Op) -> bool:
    """Whether data of one token or chunk is multiplied by known numbers along its last dimension, and by no weight."""
    if not all(isinstance(x, Val) for x in op.args):
        return False
    engine = op.engine
    taken = [v if v.taken is None else value(v.shape, [v.taken]) for v in op.args]
    return any(engine.in_part(w) and engine.of_features(v, w) for v, w in (taken, taken[::-1]))


def _both(op: Op) -> Val:
    found = _where_known(op, lambda known, other: other if known else ())
    if found is None and _truths_of_tokens(op):
        found = op.engine.multiply(operand(op, 0), operand(op, 1))
    return op.symbol() if found is None else found


@rule(aten.logical_or, aten.bitwise_or, aten.__or__)
def either(op: Op) -> Val:
    found = _where_known(op, lambda known, other: (Term(1.0),) if known else other)
    if found is None and _truths_of_tokens(op):
        neither = op.engine.multiply(complement(op, operand(op, 0)), complement(op, operand(op, 1)))
        found = complement(op, neither)
    return op.symbol() if found is None else found


def _truths_of_tokens(op: Op) -> bool:
    """Whether both are truths of data that is looked into, such as those of two masks of tokens."""
    return set(op.dtypes) == {torch.bool} and all(v.alt is None for v in (operand(op, 0), operand(op, 1)))


def _where_known(op: Op, f: Callable[[Terms, Terms], Terms]) -> Val | None:
    """``f`` of a condition on positions and of another truth, as of a mask of tokens; None if neither is the one."""
    if op.out.dtype is torch.bool and set(op.dtypes) == {torch.bool}:
        a, b = operand(op, 0), operand(op, 1)
        for one, other in ((a, b), (b, a)):
            if (known := known_condition(op.engine, one)) is not None:
                return op.engine.zip_cases([known, other], lambda g: f(g[0], g[1]))
    return None


@rule(aten.logical_not, aten.bitwise_not)
def negate(op: Op) -> Val:
    return complement(op, op.args[0]) if set(op.dtypes) == {torch.bool} else op.symbol()


def complement(op: Op, truth: Val) -> Val:
    """``1 - truth``, of zeros and ones."""
    if (known := known_condition(op.engine, truth)) is not None:
        return opposite(op.engine, known)
    if truth.single and (truth.alt is not None or not several(op.engine, truth.terms)):
        return _negated(op, truth)

    def of_case(terms: Terms) -> Terms:
        if not any(t.accs for t in terms):
            return () if terms else (Term(1.0),)
        if several(op.engine, terms):
            return (Term(1.0), *(t.but(coef=-t.coef) for t in terms))
        return _negated(op, value(truth.shape, terms)).terms

    return op.engine.zip_cases([truth], lambda g: of_case(g[0]))


def _negated(op: Op, truth: Val) -> Val:
    """The opposite of a truth that is not looked into; that of an opposite is what it is the opposite of."""
    if truth.alt is None and (whole := _opposite_of(op.engine, truth.terms)) is not None:
        return value(truth.shape, [whole])
    return op.engine.pointwise(aten.logical_not.default, [truth], {}, op.out.to(torch.bool))


def _opposite_of(engine: Engine, terms: Terms) -> Term | None:
    """The truth that this one is the opposite of, if it is one."""
    if len(terms) != 1 or len(terms[0].accs) != 1:
        return None
    leaf, idx = terms[0].accs[0]
    kind = engine.leaves[leaf].kind
    if not isinstance(kind, Symbol) or kind.op is not aten.logical_not.default or terms[0] != Term(accs=((leaf, idx),)):
        return None
    of = kind.args[0]
    is_truth = isinstance(of, Argument) and engine.leaves[of.leaf].dtype is torch.bool
    return Term(accs=((of.leaf, idx),)) if is_truth else None


def several(engine: Engine, terms: Terms) -> bool:
    """Whether a truth is made of several that differ in what they are of, as the masks of a row and of a column do."""
    return len(terms) > 1 or any(not (a <= b or b <= a) for t in terms for a, b in pairwise(_places(engine, t)))


def _places(engine: Engine, t: Term) -> list[set[int]]:
    return [set(engine.space.vars_of(idx)) for _, idx in t.accs]
