"""Comparisons and logic: a condition on positions is a value of zeros and ones, one case for each region."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from itertools import pairwise

import torch

from ..domain.affine import Aff
from ..domain.kinds import Argument, Symbol
from ..domain.precision import decidable
from ..domain.term import NO_GUARDS, Case, Guards, Term, Val, constant, number_of, value
from ..engine import Engine
from . import Op, rule
from .order import decided

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


# ----------------------------------------------------------------------------------------------------- comparisons

ORDER = {aten.gt: (1, True), aten.lt: (-1, True), aten.ge: (1, False), aten.le: (-1, False)}  # sign, strict
OF_NUMBERS = {
    aten.gt: operator.gt, aten.lt: operator.lt, aten.ge: operator.ge, aten.le: operator.le,
    aten.eq: operator.eq, aten.ne: operator.ne,
}  # fmt: skip


@rule(aten.ge, aten.gt, aten.le, aten.lt)
def compare(op: Op) -> Val:
    sign, strict = ORDER[op.func.overloadpacket]
    difference = decided(op, op.operand(0), op.operand(1))
    if difference is None:
        return _of_numbers(op)
    return truth(op.engine, op.shape, [at_least_zero(difference * sign, strict)])


def _of_numbers(op: Op) -> Val:
    """A comparison of values that are one number in each of their cases, as a mask of 0 and minus infinity is."""
    a, b = op.operand(0), op.operand(1)
    if any(number_of(c.terms) is None for v in (a, b) for c in v.cases) or not decidable(op, a, b):
        return op.symbol()
    holds = OF_NUMBERS[op.func.overloadpacket]

    def compared(groups: list[Terms]) -> Terms:
        x, y = map(number_of, groups)
        return (Term(1.0),) if holds(x, y) else ()

    return op.engine.zip_cases([a, b], compared)


@rule(aten.eq, aten.ne)
def equal(op: Op) -> Val:
    a, b = op.operand(0), op.operand(1)
    if op.args[0] is op.args[1] and op.engine.never_nan(a):  # equal forms may be computed, and rounded, in two ways
        return constant(op.shape, float(op.func.overloadpacket is aten.eq))
    difference = decided(op, a, b)
    if difference is None:
        if op.dtypes[0] is torch.bool and a.alt is None and b.number in (0.0, 1.0):
            return a if (b.number == 1) == (op.func.overloadpacket is aten.eq) else complement(op, a)
        return _of_numbers(op)
    inside = truth(op.engine, op.shape, [at_least_zero(difference), at_least_zero(-difference)])
    return inside if op.func.overloadpacket is aten.eq else opposite(op.engine, inside)


# ----------------------------------------------------------------------------------------------------------- logic


@rule(aten.logical_and, aten.bitwise_and, aten.__and__)
def both(op: Op) -> Val:
    found = _where_known(op, lambda known, other: other if known else ())
    if found is None and _truths_of_tokens(op):
        found = op.engine.multiply(op.operand(0), op.operand(1))
    return op.symbol() if found is None else found


@rule(aten.logical_or, aten.bitwise_or, aten.__or__)
def either(op: Op) -> Val:
    found = _where_known(op, lambda known, other: (Term(1.0),) if known else other)
    if found is None and _truths_of_tokens(op):
        neither = op.engine.multiply(complement(op, op.operand(0)), complement(op, op.operand(1)))
        found = complement(op, neither)
    return op.symbol() if found is None else found


def _truths_of_tokens(op: Op) -> bool:
    """Whether both are truths of data that is looked into, such as those of two masks of tokens."""
    return set(op.dtypes) == {torch.bool} and all(v.alt is None for v in (op.operand(0), op.operand(1)))


def _where_known(op: Op, f: Callable[[Terms, Terms], Terms]) -> Val | None:
    """``f`` of a condition on positions and of another truth, as of a mask of tokens; None if neither is the one."""
    if op.out.dtype is torch.bool and set(op.dtypes) == {torch.bool}:
        a, b = op.operand(0), op.operand(1)
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
