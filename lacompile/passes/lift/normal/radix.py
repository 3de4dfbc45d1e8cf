"""R3, mixed radix: two bound indices that are the digits of one, or a window and the place in it, become that one."""

from __future__ import annotations

from ..domain.affine import FIRST_DIV, ZERO, Aff
from ..domain.regions import Regions
from ..domain.term import Guards, Term


def one_index(regions: Regions, term: Term) -> Term:
    """R3: b1, b2 that occur only as m*b1 + b2, b2 running over exactly m values, are one index.

    R3b: b2 in [m*b1 + r, m*b1 + r + m - 1] with b1 nowhere else is one index over the union of the windows.
    """
    bound = sorted(term.bound(regions.space))
    if len(bound) < 2:
        return term
    for b2 in bound:
        ends = regions.bounds(b2, term.guards)
        for low in ends.low if not ends.other else ():
            for high in ends.high:
                length = high - low + 1
                if not length.is_const or length.const < 1:
                    continue
                for b1 in bound:
                    if b1 != b2 and (merged := _as_one_index(regions, term, b1, b2, low, int(length.const))):
                        return merged
    return term


def _as_one_index(regions: Regions, term: Term, b1: int, b2: int, low: Aff, m: int) -> Term | None:
    """``b2`` runs over ``m`` values from ``low``; other guards may restrict it further."""
    if m == 1 or not (low.is_const or low.coef(b1) == m):
        return None
    x = Aff.var(b2)
    own = {regions.space.guard(x - low), regions.space.guard(low + (m - 1) - x)}
    rest = term.guards - own
    return _windows(regions, term, b1, b2, low, m, rest) or _digits(regions, term, b1, b2, low, m, rest)


def _windows(regions: Regions, term: Term, b1: int, b2: int, low: Aff, m: int, rest: Guards) -> Term | None:
    space = regions.space
    if low.coef(b1) != m or b1 in space.vars_of(term.factors()):
        return None
    range1 = regions.bounds(b1, rest).ends
    if range1 is None:
        return None
    base = low.without(b1)
    if b1 in space.vars(base) or b2 in space.vars(range1[0]) | space.vars(range1[1]):
        return None
    # A point of the union lies in one window, so a further guard on b2 says the same of it in either form.
    guards = [g for g in rest if not g.coef(b1)]
    guards.append(Aff.var(b2) - base - range1[0] * m)
    guards.append(base + range1[1] * m + (m - 1) - Aff.var(b2))
    return term.but(guards=guards)


def _digits(regions: Regions, term: Term, b1: int, b2: int, low: Aff, m: int, rest: Guards) -> Term | None:
    space = regions.space
    if not low.is_const or any(Aff.lit(f.coef(b1)) != Aff.lit(f.coef(b2) * m) for f in term.factors()):
        return None
    if any(b2 in space.vars(g) for g in rest):
        return None
    range1 = regions.bounds(b1, rest).ends
    if range1 is None or b2 in space.vars(range1[0]) | space.vars(range1[1]):
        return None
    if any(g.coef(b1) and (g.coef(b1) not in (1, -1)) for g in rest):
        return None
    divided = (v for aff in term.factors() for v, _ in aff.terms if v >= FIRST_DIV)
    if not all(space.vars(Aff.var(v)).isdisjoint((b1, b2)) for v in divided):
        return None
    guards = [g for g in rest if not g.coef(b1)]
    guards.append(Aff.var(b2) - range1[0] * m - low)
    guards.append(range1[1] * m + (m - 1) + low - Aff.var(b2))
    moved = term.but(guards=()).sub(space, {b1: ZERO})
    return moved.but(guards=guards)
