"""Merging the terms of a sum: adjacent ranges of one index with the same weight are one range.

This one rule turns an unrolled chunk loop, a batched chunk form and a per-token recurrence into the same value, whose
size does not depend on the number of chunks. The index may be bound (a sum that grows) or free (pieces of a ``cat``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from ..domain.affine import MAX_DIMS, Aff
from ..domain.term import Term
from .algebra import Algebra
from .ends import all_ends, extend, same, shorten, two_points
from .lines import free_line, line, own_guards, staircase
from .lines import points as places

MAX_UNMERGED = 64
FEW = 4  # that may remain unmerged once an analysis has lost its patience
MAX_ENDS = 9  # pairs of ends that are tried for one index


class TooManyTerms(Exception):
    """A sum that does not merge grows without bound: it is better left opaque."""


def merge_sum(
    algebra: Algebra, terms: Iterable[Term], shape: tuple[Aff, ...], limit: int = MAX_UNMERGED
) -> tuple[Term, ...]:
    """The normal form of a sum of (un-normalised) terms of a tensor of this shape.

    Raises:
        TooManyTerms: more than ``limit`` terms remain, or more than a few where very many pairs were tried in vain
            before: a loop whose sums never merge asks of all pairs anew with each token.
    """
    if algebra.patience <= 0:
        limit = min(limit, FEW)
    done: dict[Term, None] = {}  # in order
    alike: dict[tuple[int, ...], list[Term]] = {}  # the same by their leaves: others do not merge
    for each in _multiples(algebra, terms, shape):
        new: Term | None = each
        while new is not None:
            candidates = alike.setdefault(new.signature, [])
            for n in range(len(candidates) - 1, -1, -1):
                found = merged(algebra, candidates[n], new, shape)
                if found is not None:
                    del done[candidates.pop(n)]
                    new = algebra.normalise(found, shape)
                    break
            else:
                candidates.append(new)
                done[new] = None
                if len(done) > limit:
                    raise TooManyTerms
                break
    for group in alike.values():
        if len(group) > 2 and (again := _apart(algebra, group, shape)) is not None:
            others = [t for t in done if t not in group]
            return merge_sum(algebra, (*others, *again), shape, limit)
    return tuple(done)


def _multiples(algebra: Algebra, terms: Iterable[Term], shape: tuple[Aff, ...]) -> list[Term]:
    """The same sum of normal terms, multiples of one as one before a line is laid through any: ``s + b (k v - s)``."""
    found: dict[Any, list[Term]] = {}
    for raw in terms:
        new = algebra.normalise(raw, shape)
        if new is None:
            continue
        group = found.setdefault((new.guards, new.accs, new.poly), [])
        for n, known in enumerate(group):
            if (one := _one_multiple(known, new)) is not None:
                left = algebra.normalise(one, shape)
                group[n : n + 1] = [] if left is None else [left]
                break
        else:
            group.append(new)
    return [t for group in found.values() for t in group]


def _one_multiple(a: Term, b: Term) -> Term | None:
    """One term for two that differ by a number alone."""
    if a.guards != b.guards or a.accs != b.accs or a.poly != b.poly or math.isinf(a.coef + b.coef):
        return None
    apart = (b.exp - a.exp).number
    return None if apart is None else a.but(coef=a.coef + b.coef * math.exp(apart))


def merged(algebra: Algebra, a: Term, b: Term, shape: tuple[Aff, ...]) -> Term | None:
    """One term for two; that there is none is found once for an analysis, as sums grow by a few terms at a time."""
    known = algebra.unmerged_in(shape)
    if (a, b) in known:
        return None
    found = _merge(algebra, a, b, shape) or _split(algebra, a, b, shape)
    if found is None:
        known.add((a, b))
        algebra.patience -= 1
    return found


def _merge(algebra: Algebra, a: Term, b: Term, shape: tuple[Aff, ...]) -> Term | None:
    if a.guards == b.guards and a.body == b.body:
        return a.but(coef=a.coef + b.coef)
    if (one := _one_multiple(a, b)) is not None:
        return one
    if a.guards == b.guards and a.body[1:] == b.body[1:] and not math.isinf(a.coef + b.coef):
        return a.but(coef=1.0, poly=a.poly * a.coef + b.poly * b.coef)
    if a.body == b.body and same(a.coef, -b.coef):
        return _difference(algebra, a, b, shape) or _difference(algebra, b, a, shape)
    if same(a.coef, -b.coef):
        return shorten(algebra, a, b, shape) or shorten(algebra, b, a, shape)
    if not same(a.coef, b.coef):
        return None
    if a.body == b.body and (out := _adjacent(algebra, a, b, shape)) is not None:
        return out
    return (
        extend(algebra, a, b, shape)
        or extend(algebra, b, a, shape)
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


def _apart(algebra: Algebra, group: Sequence[Term], shape: tuple[Aff, ...]) -> list[Term] | None:
    """The same sum, a line through two points taken apart again where each point belongs to another term.

    The second token of a loop that weighs its own token in another way holds two that lie on a line, by accident.
    """
    for t in group:
        rest = [x for x in group if x is not t]
        for points in two_points(algebra, t, shape):
            joined = _each_elsewhere(algebra, points, rest, shape)
            if joined is not None:
                return joined
    return None


def _each_elsewhere(
    algebra: Algebra, points: Sequence[Term | None], rest: Sequence[Term], shape: tuple[Aff, ...]
) -> list[Term] | None:
    """``rest`` with each of the points merged into another of its terms; None where one does not."""
    free, out = sorted(rest, key=lambda x: len(places(algebra, x, shape))), []  # those that go on first
    for p in points:
        for x in free if p is not None else ():
            joined = merged(algebra, x, p, shape) if p is not None and p.signature == x.signature else None
            if joined is not None:
                free.remove(x)
                out.append(joined)
                break
        else:
            return None
    return [*free, *out]


def _cuts(algebra: Algebra, whole: Term, part: Term, shape: tuple[Aff, ...]) -> list[Aff]:
    """Where the region of ``part`` ends inside that of ``whole``: a condition on free dimensions, if there is one."""
    space = algebra.space
    extra = [g for g in part.guards - whole.guards if all(v >= 0 for v in space.vars(g))]
    ranges = algebra.ranges(shape, whole.guards)
    cuts = [g for g in extra if space.upper(g, ranges) >= 0 and not algebra.implied(g, whole.guards, ranges)]
    return cuts if len(cuts) == 1 else []


def _adjacent(algebra: Algebra, a: Term, b: Term, shape: tuple[Aff, ...]) -> Term | None:
    """Equal bodies on ranges [l1, u1] and [u1 + 1, u2] of one index."""
    differ = {v for g in a.guards ^ b.guards for v, _ in g.terms if v < MAX_DIMS}
    for var in sorted(differ):
        ends_a, ends_b = all_ends(algebra, a, var, shape), all_ends(algebra, b, var, shape)
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
    # Where one range ends before it begins, the other must end there by itself, as a window does at the first token.
    loose = [r for r, ends_there in ((r1, low in second.guards), (r2, high in first.guards)) if not ends_there]
    if not all(algebra.implied(hi - lo + 1, elsewhere, ranges) for lo, hi in loose):
        return None
    return first.but(guards=guards)
