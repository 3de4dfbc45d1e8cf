"""Masks and weights: comparisons, selections, exponentials, logarithms, factories of indices."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from ..affine import ONE, TAU, ZERO, Aff
from ..engine import Engine, GiveUp
from ..leaves import Opaque, Table
from ..logs import known_positive, log_summands
from ..precision import decidable
from ..term import NO_EXPONENT, NO_GUARDS, Case, Exponent, Guards, Mono, Term, Val, constant, value
from . import Op, rule
from .arith import number, operand

aten = torch.ops.aten

# ------------------------------------------------------------------------------------------------------- factories


@rule(aten.arange)
def arange(op: Op) -> Val:
    plain = [a for a in op.args if not isinstance(a, torch.dtype)]
    start, step = (plain[0], plain[2] if len(plain) > 2 else 1) if len(plain) > 1 else (0, 1)
    if isinstance(start, float) or isinstance(step, float):
        if not (float(start).is_integer() and float(step).is_integer()):
            raise GiveUp("a fractional range")
        start, step = int(start), int(step)
    if not isinstance(step, int):
        raise GiveUp("a symbolic step")
    poly = (ZERO if op.shape[0] == ONE else Aff.var(0)) * step + op.engine.aff(start)
    return value(op.shape, [Term(1.0, poly)])


@rule(aten.zeros, aten.zeros_like, aten.new_zeros, aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided)
@rule(aten.new_empty_strided, aten.empty_permuted)
def zeros(op: Op) -> Val:
    """What an uninitialised tensor holds is nobody's promise, so zero is as good a reading as any."""
    return constant(op.shape, 0.0)


@rule(aten.ones, aten.ones_like, aten.new_ones)
def ones(op: Op) -> Val:
    return constant(op.shape, 1.0)


@rule(aten.full, aten.full_like, aten.new_full, aten.scalar_tensor)
def full(op: Op) -> Val:
    fill = op.arg(
        0 if op.func.overloadpacket is aten.scalar_tensor else 2 if op.func.overloadpacket is aten.new_full else 1,
        "fill_value",
    )
    if isinstance(fill, bool | int | float) and not math.isnan(fill):
        return constant(op.shape, float(fill))
    raise GiveUp("a fill value that is not a number")


@rule(aten.eye)
def eye(op: Op) -> Val:
    d = Aff.var(0) - Aff.var(1)
    return op.engine.sum_of(op.shape, [Term(guards=(d, -d))])


# ------------------------------------------------------------------------------------------------------ comparisons

ORDER = {aten.gt: (1, True), aten.lt: (-1, True), aten.ge: (1, False), aten.le: (-1, False)}  # sign, strict


@rule(aten.ge, aten.gt, aten.le, aten.lt)
def compare(op: Op) -> Val:
    sign, strict = ORDER[op.func.overloadpacket]
    difference = _decided(op, operand(op, 0), operand(op, 1))
    if difference is None:
        return op.symbol()
    return truth(op.engine, op.shape, [at_least_zero(difference * sign, strict)])


def at_least_zero(difference: Aff, strict: bool = False) -> Aff:
    """The guard for ``difference >= 0`` (or > 0) of a form that is an integer but for its constant."""
    c = difference.const
    return Aff(difference.terms, math.ceil(c) - 1 if strict else math.floor(c))


@rule(aten.eq, aten.ne)
def equal(op: Op) -> Val:
    a, b = operand(op, 0), operand(op, 1)
    if a == b and _never_nan(op.engine, a):
        return constant(op.shape, float(op.func.overloadpacket is aten.eq))
    difference = _decided(op, a, b)
    if difference is None:
        return op.symbol()
    inside = truth(op.engine, op.shape, [at_least_zero(difference), at_least_zero(-difference)])
    if op.func.overloadpacket is aten.eq:
        return inside
    return op.engine.zip_cases([inside], lambda g: () if g[0] else (Term(1.0),))


def _decided(op: Op, a: Val, b: Val) -> Aff | None:
    """A form with integer coefficients and any constant whose sign is that of ``a - b``; None if there is none.

    Raises:
        GiveUp: rounding may decide in the program.
    """
    difference = _index_difference(op.engine, a, b)
    if difference is not None and not decidable(op, a, b):
        raise GiveUp("a decision by numbers that rounding may have changed")
    return difference


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


# ------------------------------------------------------------------------------------------------------- selections


def _known_condition(engine: Engine, cond: Val) -> Val | None:
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


def choose(op: Op, cond: Val, yes: Val, no: Val) -> Val:
    engine = op.engine
    known = _known_condition(engine, cond)
    if known is None:
        return _choose_by_data(op, cond, yes, no)
    if engine.contracts(yes) or engine.contracts(no):
        if not any(math.isinf(t.coef) for v in (yes, no) for c in v.cases for t in c.terms):
            opposite = engine.zip_cases([known], lambda g: () if g[0] else (Term(1.0),))
            return engine.add(engine.multiply(yes, known), engine.multiply(no, opposite), op.out)
    return engine.zip_cases([known, yes, no], lambda g: g[1] if g[0] else g[2])


def _choose_by_data(op: Op, cond: Val, yes: Val, no: Val) -> Val:
    zero = number(no) == 0
    if (zero or number(yes) == 0) and not any(math.isinf(t.coef) for v in (yes, no) for c in v.cases for t in c.terms):
        kept = yes if zero else no
        as_number = cond if zero else op.engine.pointwise(aten.logical_not.default, [cond], {}, op.out)
        if op.engine.structured(kept) or kept.alt is not None:
            return op.engine.multiply(kept, as_number)
    return op.engine.pointwise(aten.where.self, [cond, yes, no], {}, op.out)


@rule(aten.where)
def where(op: Op) -> Val:
    if len(op.args) < 3:
        raise GiveUp("where without values")
    return choose(op, operand(op, 0), operand(op, 1), operand(op, 2))


@rule(aten.masked_fill)
def masked_fill(op: Op) -> Val:
    return choose(op, operand(op, 1), operand(op, 2), operand(op, 0))


@rule(aten.tril)
def tril(op: Op) -> Val:
    return _triangle(op, Aff.var(len(op.shape) - 2) - Aff.var(len(op.shape) - 1) + int(op.arg(1, "diagonal", 0)))


@rule(aten.triu)
def triu(op: Op) -> Val:
    return _triangle(op, Aff.var(len(op.shape) - 1) - Aff.var(len(op.shape) - 2) - int(op.arg(1, "diagonal", 0)))


def _triangle(op: Op, guard: Aff) -> Val:
    v, shape = op.args[0], op.shape
    guard = op.engine.space.sub(guard, {d: ZERO for d in range(len(shape)) if shape[d] == ONE})
    if op.engine.contracts(v) and v.single:
        return op.engine.sum_of(shape, (t.but(guards=t.guards | {guard}) for t in v.terms))
    mask = truth(op.engine, shape, [guard])
    return op.engine.zip_cases([mask, v], lambda g: g[1] if g[0] else ())


@rule(aten.logical_and, aten.bitwise_and, aten.__and__)
def both(op: Op) -> Val:
    return _logic(op, lambda a, b: bool(a) and bool(b))


@rule(aten.logical_or, aten.bitwise_or, aten.__or__)
def either(op: Op) -> Val:
    return _logic(op, lambda a, b: bool(a) or bool(b))


def _logic(op: Op, f: Any) -> Val:
    a, b = operand(op, 0), operand(op, 1)
    x, y = _known_condition(op.engine, a), _known_condition(op.engine, b)
    if op.out.dtype is not torch.bool or x is None or y is None:
        return op.symbol()
    return op.engine.zip_cases([x, y], lambda g: (Term(1.0),) if f(g[0], g[1]) else ())


@rule(aten.logical_not, aten.bitwise_not)
def negate(op: Op) -> Val:
    known = _known_condition(op.engine, op.args[0]) if op.out.dtype is torch.bool else None
    if known is None:
        return op.symbol()
    return op.engine.zip_cases([known], lambda g: () if g[0] else (Term(1.0),))


# ------------------------------------------------------------------------------------------- piecewise index functions


def _piecewise(op: Op, v: Val, pick: Any) -> Val | None:
    """``pick(term, sign)`` on the two sides of ``v >= 0`` where ``v`` is index-valued (or a signed leaf times one)."""
    t = v.one
    if t is None or t.poly.is_const or t.exp or t.guards:
        return None
    difference = _decided(op, v, constant(v.shape, 0.0))
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
        difference = _decided(op, piece, limit)
        if difference is None:
            raise GiveUp("a clamped value that is not an index")
        keep = at_least_zero(difference if keep_above else -difference)
        for guard, terms in ((keep, c.terms), (-keep - 1, limit.terms)):
            inside = engine.prune(c.guards | {guard}, v.shape)
            if inside is not None:
                cases.append(Case(inside, terms))
    return engine.join_cases(Val(v.shape, tuple(cases)))


def _never_nan(engine: Engine, v: Val) -> bool:
    """Made of indices, known numbers and weights alone: over the reals no entry is nan or inf.

    Where the program has one all the same, gamma ** (i - j) has overflowed above the diagonal and met a zero there.
    """
    terms = [t for c in v.cases for t in c.terms]
    known = all(isinstance(engine.leaves[leaf].kind, Table) for t in terms for leaf, _ in t.accs)
    return v.alt is None and known and not any(math.isinf(t.coef) for t in terms)


@rule(aten.nan_to_num)
def nan_to_num(op: Op) -> Val:
    return op.args[0] if _never_nan(op.engine, op.args[0]) else op.symbol()


@rule(aten.isnan, aten.isinf)
def isnan(op: Op) -> Val:
    return constant(op.shape, 0.0) if _never_nan(op.engine, op.args[0]) else op.symbol()


# ------------------------------------------------------------------------------------------- exponentials, logarithms


@rule(aten.exp)
def exp(op: Op) -> Val:
    return exponential(op, op.args[0], 1.0)


@rule(aten.exp2)
def exp2(op: Op) -> Val:
    return exponential(op, op.args[0], math.log(2.0))


def exponential(op: Op, v: Val, factor: float) -> Val:
    """exp(factor * v): a weight where v is log-affine, a function symbol where it is plain data."""
    engine = op.engine
    v = engine.pick(v)
    if v.single and len(v.terms) == 1 and engine.plain_term(v.terms[0]) and len(v.terms[0].accs) > 2:
        return op.symbol()
    if v.single and len(v.terms) > 1 and engine.plain(v) and not engine.index_only(v):
        return op.symbol()
    cases: list[Case] = []
    for c in engine.split(v):
        cases.extend(_exp_case(engine, c, factor, v.shape))
    return engine.join_cases(Val(v.shape, tuple(cases)))


def _exp_case(engine: Engine, c: Case, factor: float, shape: tuple[Aff, ...]) -> list[Case]:
    if any(math.isinf(t.coef) for t in c.terms):
        if all(t.coef < 0 for t in c.terms if math.isinf(t.coef)) and factor > 0:
            return [Case(c.guards, ())]
        raise GiveUp("exp(+inf)")
    lin: list[tuple[Mono, Aff]] = []
    sums: list[tuple[tuple[Mono, Aff], float]] = []
    splits: list[Aff] = []
    for t in c.terms:
        bound = t.bound(engine.space)
        if t.exp:
            t = _without_exponential(engine, t)
        if not bound:
            if t.guards:
                raise GiveUp("a guarded exponent")
            lin.append((t.accs, t.poly * (t.coef * factor)))
            continue
        mono, low, high = _prefix_sum(engine, t, bound)
        sums.append(((mono, high + 1), t.coef * factor))
        sums.append(((mono, low), -t.coef * factor))
        ranges = engine.ranges(shape, c.guards)
        nonempty = high - low + 1
        if engine.space.lower(nonempty, ranges) < 0 and not engine.implied(nonempty, c.guards, ranges):
            splits.append(engine.space.guard(nonempty))
    if splits:
        # Where a range is empty its sum is 0, not P(u+1) - P(l): the two regions are separate cases.
        out: list[Case] = []
        guard = splits[0]
        inside = engine.prune(c.guards | {guard}, shape)
        outside = engine.prune(c.guards | {-guard - 1}, shape)
        if inside is not None:
            out.extend(_exp_case(engine, Case(inside, c.terms), factor, shape))
        if outside is not None:
            kept = tuple(t for t in c.terms if not _is_empty(engine, t, outside, shape))
            if len(kept) == len(c.terms):
                raise GiveUp("a prefix sum over a range that may be empty")
            out.extend(_exp_case(engine, Case(outside, kept), factor, shape))
        return out
    term = engine.normalise(Term(1.0, exp=Exponent.of(lin, sums)), shape)
    return [Case(c.guards, () if term is None else (term,))]


def _without_exponential(engine: Engine, t: Term) -> Term:
    """A rate such as -exp(a): its exponential is plain data, a function symbol."""
    found = engine.term_access(Term(1.0, exp=t.exp), None)
    if isinstance(found, int | float):
        return t.but(coef=t.coef * found, exp=NO_EXPONENT)
    return t.but(accs=tuple(sorted((*t.accs, found[0]))), exp=NO_EXPONENT)


def _is_empty(engine: Engine, t: Term, guards: Guards, shape: tuple[Aff, ...]) -> bool:
    bound = t.bound(engine.space)
    if not bound:
        return False
    _, low, high = _prefix_sum(engine, t, bound)
    ranges = engine.ranges(shape, guards)
    return engine.implied(low - high - 1, guards, ranges)


def _prefix_sum(engine: Engine, t: Term, bound: frozenset[int]) -> tuple[Mono, Aff, Aff]:
    """A sum over one index of one leaf (times factors without it), as the monomial and the range of positions."""
    if len(bound) != 1 or not t.poly.is_const:
        raise GiveUp("exp of a contraction")
    (b,) = bound
    ends = engine.bounds(b, t.guards)
    if ends.other or len(ends.low) != 1 or len(ends.high) != 1 or len(t.guards) != 2:
        raise GiveUp("exp of a sum over more than one range")
    holders = [(leaf, idx) for leaf, idx in t.accs if any(b in engine.space.vars(a) for a in idx)]
    mine = [frozenset(v for a in idx for v in engine.space.vars(a)) for _, idx in holders]
    if not holders or not any(all(m <= n for m in mine) for n in mine):
        raise GiveUp("exp of a contraction")
    where = [a for a in holders[0][1] if b in engine.space.vars(a)]
    if len(where) != 1 or where[0].coef(b) != 1:
        raise GiveUp("a prefix sum that does not step by one")
    offset = where[0].without(b)
    shifted = t.sub(engine.space, {b: Aff.var(TAU) - offset})
    return shifted.accs, ends.low[0] + offset, ends.high[0] + offset


@rule(aten.log_sigmoid_forward)
def log_sigmoid(op: Op) -> list[Val]:
    out, buffer = op.out
    kept = op.engine.pointwise(aten.log_sigmoid.default, op.args, op.kwargs, out)
    return [kept, op.engine.leaf(buffer, Opaque(None, "log_sigmoid_forward"))]


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


@rule(aten.pow)
def power(op: Op) -> Val:
    engine = op.engine
    a, b = operand(op, 0), operand(op, 1)
    exponent = number(b)
    if exponent is not None and not any(t.exp for c in a.cases for t in c.terms):
        if exponent == 1:
            return a
        if exponent == 0:
            return constant(op.shape, 1.0)
        return op.symbol()
    base = number(a)
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
