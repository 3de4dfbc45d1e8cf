"""Merging the terms of a sum: adjacent ranges of one index with the same weight are one range.

This one rule turns an unrolled chunk loop, a batched chunk form and a per-token recurrence into the same value, whose
size does not depend on the number of chunks. The index may be bound (a sum that grows) or free (pieces of a ``cat``).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from .affine import Aff, Number
from .lines import free_line, line, own_guards, points, staircase
from .normal import Algebra
from .term import Term

MAX_UNMERGED = 64
MAX_ENDS = 9  # pairs of ends that are tried for one index


class TooManyTerms(Exception):
    """A sum that does not merge grows without bound: it is better left opaque."""


def merge_sum(
    algebra: Algebra, terms: Iterable[Term], shape: tuple[Aff, ...], limit: int = MAX_UNMERGED
) -> tuple[Term, ...]:
    """The normal form of a sum of (un-normalised) terms of a tensor of this shape.

    Raises:
        TooManyTerms: more than ``limit`` terms remain.
    """
    done: dict[Term, None] = {}  # in order
    alike: dict[tuple[int, ...], list[Term]] = {}  # the same by their leaves: others do not merge
    for raw in terms:
        new = algebra.normalise(raw, shape)
        while new is not None:
            candidates = alike.setdefault(new.signature, [])
            for n in range(len(candidates) - 1, -1, -1):
                merged = _merged(algebra, candidates[n], new, shape)
                if merged is not None:
                    del done[candidates.pop(n)]
                    new = algebra.normalise(merged, shape)
                    break
            else:
                candidates.append(new)
                done[new] = None
                if len(done) > limit:
                    raise TooManyTerms
                break
    return tuple(done)


def _merged(algebra: Algebra, a: Term, b: Term, shape: tuple[Aff, ...]) -> Term | None:
    """One term for two; that there is none is found once for an analysis, as sums grow by a few terms at a time."""
    known = algebra.unmerged_in(shape)
    if (a, b) in known:
        return None
    merged = _merge(algebra, a, b, shape) or _split(algebra, a, b, shape)
    if merged is None:
        known.add((a, b))
    return merged


def _merge(algebra: Algebra, a: Term, b: Term, shape: tuple[Aff, ...]) -> Term | None:
    if a.guards == b.guards and a.body == b.body:
        return a.but(coef=a.coef + b.coef)
    if a.guards == b.guards and a.body[1:] == b.body[1:] and not math.isinf(a.coef + b.coef):
        return a.but(coef=1.0, poly=a.poly * a.coef + b.poly * b.coef)
    if a.body == b.body and abs(a.coef + b.coef) <= 1e-9 * abs(a.coef):
        return _difference(algebra, a, b, shape) or _difference(algebra, b, a, shape)
    if a.coef != b.coef and abs(a.coef - b.coef) > 1e-9 * abs(a.coef):
        return None
    if a.body == b.body and (out := _adjacent(algebra, a, b, shape)) is not None:
        return out
    return (
        _extend(algebra, a, b, shape)
        or _extend(algebra, b, a, shape)
        or line(algebra, a, b)
        or staircase(algebra, a, b, shape)
        or staircase(algebra, b, a, shape)
        or free_line(algebra, a, b, shape)
    )


def _difference(algebra: Algebra, whole: Term, part: Term, shape: tuple[Aff, ...]) -> Term | None:
    """What is left of a sum where ``part``, which holds under one more condition and is subtracted, is taken out.

    A running sum over chunks, less the chunk's own, is the sum over earlier ones.
    """
    if own_guards(algebra, whole, part, shape):
        return None
    cuts = own_guards(algebra, part, whole, shape)
    return whole.but(guards=whole.guards | {-cuts[0] - 1}) if len(cuts) == 1 else None


def _split(algebra: Algebra, a: Term, b: Term, shape: tuple[Aff, ...]) -> Term | None:
    """R6: one term holds on a part of the other's region only; cut there, join the parts, and then the two halves.

    The state before the second of two chunks is such a term: it holds on c >= 1, with the constant range [0, C - 1],
    and the pairs inside the chunks on all c.
    """
    for whole, part in ((a, b), (b, a)):
        for g in _cuts(algebra, whole, part, shape):
            inside = algebra.normalise(whole.but(guards=whole.guards | {g}), shape)
            outside = algebra.normalise(whole.but(guards=whole.guards | {-g - 1}), shape)
            if inside is None or outside is None or inside.signature != part.signature:
                continue
            joined = _merge(algebra, inside, part, shape)
            joined = None if joined is None else algebra.normalise(joined, shape)
            if joined is not None and (out := _merge(algebra, joined, outside, shape)) is not None:
                return out
    return None


def _cuts(algebra: Algebra, whole: Term, part: Term, shape: tuple[Aff, ...]) -> list[Aff]:
    """Where the region of ``part`` ends inside that of ``whole``: a condition on free dimensions, if there is one."""
    space = algebra.space
    extra = [g for g in part.guards - whole.guards if all(v >= 0 for v in space.vars(g))]
    ranges = algebra.ranges(shape, whole.guards)
    cuts = [g for g in extra if space.upper(g, ranges) >= 0 and not algebra.implied(g, whole.guards, ranges)]
    return cuts if len(cuts) == 1 else []


Ends = tuple[Aff, Aff]


def _ends(algebra: Algebra, term: Term, var: int, shape: tuple[Aff, ...]) -> Ends | None:
    """The range of ``var`` in this term, if it has one lower and one upper end."""
    found = _all_ends(algebra, term, var, shape)
    return found[0] if len(found) == 1 else None


def _all_ends(algebra: Algebra, term: Term, var: int, shape: tuple[Aff, ...]) -> list[Ends]:
    """Every pair of ends; a free dimension without guards has its whole extent."""
    bounds = algebra.bounds(var, term.guards)
    low, high = bounds.low, bounds.high
    if var >= 0:
        size = shape[var]
        simple_low = [x for x in low if not x.terms or all(v >= 100 for v, _ in x.terms)]
        simple_high = [x for x in high if not x.terms or all(v >= 100 for v, _ in x.terms)]
        low, high = simple_low or [Aff.lit(0)], simple_high or [size - 1]
    return [(lo, hi) for lo in low for hi in high]


def _adjacent(algebra: Algebra, a: Term, b: Term, shape: tuple[Aff, ...]) -> Term | None:
    """Equal bodies on ranges [l1, u1] and [u1 + 1, u2] of one index."""
    differ = {v for g in a.guards ^ b.guards for v, _ in g.terms if v < 100}
    for var in sorted(differ):
        ends_a, ends_b = _all_ends(algebra, a, var, shape), _all_ends(algebra, b, var, shape)
        if len(ends_a) * len(ends_b) > MAX_ENDS:
            continue
        for first, ends_1, second, ends_2 in ((a, ends_a, b, ends_b), (b, ends_b, a, ends_a)):
            for r1 in ends_1:
                for r2 in ends_2:
                    if r1[1] + 1 == r2[0]:
                        joined = _join(algebra, first, second, var, r1, r2, shape)
                        if joined is not None:
                            return joined
    return None


def _join(
    algebra: Algebra,
    first: Term,
    second: Term,
    var: int,
    r1: tuple[Aff, Aff],
    r2: tuple[Aff, Aff],
    shape: tuple[Aff, ...],
) -> Term | None:
    x = Aff.var(var)
    end1, start2 = algebra.space.guard(r1[1] - x), algebra.space.guard(x - r2[0])
    rest1, rest2 = first.but(guards=first.guards - {end1}), second.but(guards=second.guards - {start2})
    # Every other guard must hold on both sides: then the union is the range [l1, u2] under all of them.
    low, high = algebra.space.guard(x - r1[0]), algebra.space.guard(r2[1] - x)
    own1 = [g for g in own_guards(algebra, rest1, second, shape) if g not in (low, high)]
    own2 = [g for g in own_guards(algebra, rest2, first, shape) if g not in (low, high)]
    if own1 or own2:
        return None
    guards = (rest1.guards | rest2.guards | {low, high}) - {end1, start2}
    elsewhere = {g for g in guards if var not in algebra.space.vars(g)}
    ranges = algebra.ranges(shape, elsewhere)
    if not all(algebra.implied(hi - lo + 1, elsewhere, ranges) for lo, hi in (r1, r2)):
        return None
    return first.but(guards=guards)


def _extend(algebra: Algebra, ranged: Term, point: Term, shape: tuple[Aff, ...]) -> Term | None:
    """A ranged term and a point next to the range, equal to what the ranged term is there."""
    space = algebra.space
    fixed = points(algebra, point, shape)
    for var in sorted({v for g in ranged.guards for v, _ in g.terms if v < 100}):
        ends = _ends(algebra, ranged, var, shape)
        if ends is None or (var >= 0 and (var not in fixed or not all(v >= 100 for e in ends for v, _ in e.terms))):
            continue
        x = Aff.var(var)
        for at, stretched in ((ends[1] + 1, (ends[0], ends[1] + 1)), (ends[0] - 1, (ends[0] - 1, ends[1]))):
            if var in fixed and fixed[var] != at:
                continue
            drop = {space.guard(x - ends[0]), space.guard(ends[1] - x)}
            rest = ranged.but(guards=ranged.guards - drop)
            moved = rest.sub(space, {var: at})
            if not _constants(moved) <= _constants(point):
                continue
            if var >= 0:
                moved = moved.but(guards=moved.guards | {x - at, at - x})
            there = algebra.normalise(moved, shape)
            if there is None or there.body != point.body or abs(there.coef - point.coef) > 1e-9 * abs(point.coef):
                continue
            if there.guards != point.guards and (
                own_guards(algebra, there, point, shape) or own_guards(algebra, point, there, shape)
            ):
                continue
            if algebra.space.lower(ends[1] - ends[0] + 1, algebra.ranges(shape, point.guards)) < 0:
                continue
            return rest.but(guards=rest.guards | {space.guard(x - stretched[0]), space.guard(stretched[1] - x)})
    return None


def _constants(term: Term) -> Counter[tuple[int, int, Number]]:
    """Where the accesses read a constant place: (leaf, dimension, place), which normalisation adds to and keeps."""
    return Counter((leaf, n, i.const) for leaf, idx in term.accs for n, i in enumerate(idx) if not i.terms)
