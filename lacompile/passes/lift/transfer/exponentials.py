"""Exponentials: of a log-affine value, case by case, a weight."""

from __future__ import annotations

import math

import torch

from ..domain.affine import ONE, TAU, Aff
from ..domain.exponent import NO_EXPONENT, Exponent, Mono
from ..domain.precision import ends
from ..domain.term import Case, Guards, Term, Val, value
from ..engine import Engine, GiveUp
from . import Op, rule

aten = torch.ops.aten

UNDERFLOW = -800.0  # exp of it is less than half of the smallest number of fp64
LEAST = 1e-6  # factor of data in an exponent: forms drop what is below 1e-12 as left of a cancellation
LARGEST_DATA = 2.0**24  # beyond it an exponent in fp32 is rounded to whole numbers: its weight is of any size
HIDES = 2 * (UNDERFLOW - LARGEST_DATA)  # a summand below it leaves nothing of any data, however coarse its format
COARSEST = 2.0**-7  # how far off a sum of numbers may be, as a share of them, in any format


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
        cases.extend(weights(engine, c, factor, v.shape))
    if (whole := _of_a_whole_tensor(engine, v)) is not None:
        leaf, coef = whole
        engine.exponentials.setdefault((leaf, coef * factor), set()).add(engine.running)
    return engine.join_cases(Val(v.shape, tuple(cases)))


def _of_a_whole_tensor(engine: Engine, v: Val) -> tuple[int, float] | None:
    """The leaf that this value is a multiple of, entry by entry, and the multiple."""
    t = v.one
    if t is None or t.exp or t.guards or not t.poly.is_const or len(t.accs) != 1:
        return None
    (leaf, at), shape = t.accs[0], v.shape
    alike = engine.leaves[leaf].shape == shape
    every = (x == Aff.var(d) or shape[d] == ONE for d, x in enumerate(at))
    return (leaf, t.coef * float(t.poly.const)) if alike and all(every) else None


def weights(engine: Engine, c: Case, factor: float, shape: tuple[Aff, ...]) -> list[Case]:
    """exp(factor * x) of one case of a log-affine value, in the cases in which it is one weight, or nothing."""
    if any(math.isinf(t.coef) for t in c.terms):
        if all(t.coef < 0 for t in c.terms if math.isinf(t.coef)) and factor > 0:
            return [Case(c.guards, ())]
        raise GiveUp("exp(+inf)")
    if _is_nothing(engine, c, factor, shape):
        return [Case(c.guards, ())]
    lin: list[tuple[Mono, Aff]] = []
    sums: list[tuple[tuple[Mono, Aff], float]] = []
    splits: list[Aff] = []
    for t in c.terms:
        bound = t.bound(engine.space)
        engine.parts_weighed |= t.signature in engine.parts
        if t.exp:
            t = without_exponential(engine, t, shape)
        if t.accs and abs(t.coef * factor) < LEAST:
            raise GiveUp("data times so small a number in an exponent that it might be taken for 0")
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
            out.extend(weights(engine, Case(inside, c.terms), factor, shape))
        if outside is not None:
            kept = tuple(t for t in c.terms if not _is_empty(engine, t, outside, shape))
            if len(kept) == len(c.terms):
                raise GiveUp("a prefix sum over a range that may be empty")
            out.extend(weights(engine, Case(outside, kept), factor, shape))
        return out
    term = engine.normalise(Term(1.0, exp=Exponent.of(lin, sums)), shape)
    return [Case(c.guards, () if term is None else (term,))]


def _is_nothing(engine: Engine, c: Case, factor: float, shape: tuple[Aff, ...]) -> bool:
    """Whether exp(factor * x) is 0 in every format wherever the case holds, as of the -1e9 that stands for -inf.

    Data beside it may be as large as an exponent can be that still says something.
    """
    known = tuple(t for t in c.terms if not t.exp and engine.index_only(value(shape, [t])))
    if not known or any(t.guards or t.bound(engine.space) for t in known):
        return False
    most = largest = 0.0 if len(known) == len(c.terms) else LARGEST_DATA
    for t in known:
        both = [t.coef * factor * x for x in ends(engine, value(shape, known), c, t)]
        most, largest = most + max(both), largest + max(map(abs, both))
    return most + largest * COARSEST < UNDERFLOW


def without_exponential(engine: Engine, t: Term, shape: tuple[Aff, ...]) -> Term:
    """A rate such as -exp(a): its exponential is plain data, a function symbol; of numbers, as 2^-h, a table."""
    weight = value(shape, [Term(1.0, exp=t.exp)])
    if engine.index_only(weight):
        return t.but(accs=tuple(sorted((*t.accs, engine.tabulate(weight)))), exp=NO_EXPONENT)
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
    ends = engine.bounds(b, t.guards).ends
    if ends is None or len(t.guards) != 2:
        raise GiveUp("exp of a sum over more than one range")
    holders = [(leaf, idx) for leaf, idx in t.accs if any(b in engine.space.vars(a) for a in idx)]
    mine = [frozenset(v for a in idx for v in engine.space.vars(a)) for _, idx in holders]
    if not holders or not any(all(m <= n for m in mine) for n in mine):
        raise GiveUp("exp of a contraction")
    # A function of several tensors, as where(mask, 0, g) is, has an entry for each of them.
    where = [a for a in holders[0][1] if b in engine.space.vars(a)]
    if any(a.coef(b) != 1 for a in where):
        raise GiveUp("a prefix sum that does not step by one")
    offset = where[0].without(b)
    shifted = t.sub(engine.space, {b: Aff.var(TAU) - offset})
    return shifted.accs, ends[0] + offset, ends[1] + offset
