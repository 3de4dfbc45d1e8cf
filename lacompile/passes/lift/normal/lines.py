"""Lines through two single pieces of a sum: every index moves by a constant from the one to the other."""

from __future__ import annotations

from ..domain.affine import Aff
from ..domain.term import Guards, Term
from .algebra import Algebra
from .fit import Points, fit

ALONG = -999_999  # a bound index that no term has


def own_guards(algebra: Algebra, a: Term, b: Term, shape: tuple[Aff, ...]) -> list[Aff]:
    """Guards of ``a`` that ``b`` neither has nor implies on its own region."""
    extra = a.guards - b.guards
    if not extra:
        return []
    ranges = algebra.ranges(shape, b.guards)
    return [g for g in extra if not algebra.implied(g, b.guards, ranges)]


def points(algebra: Algebra, term: Term, shape: tuple[Aff, ...]) -> dict[int, Aff]:
    """Free dimensions that the guards, with the box, pin to one place."""
    return {v: low for v, (low, high) in algebra.ranges(shape, term.guards).items() if low == high}


def line(algebra: Algebra, a: Term, b: Term) -> Term | None:
    """Two single tokens of one sum, under the same guards."""
    return _summed(algebra, a, b, a.guards, {}) if a.guards == b.guards else None


def staircase(algebra: Algebra, a: Term, b: Term, shape: tuple[Aff, ...]) -> Term | None:
    """Two single tokens of one sum, the second of which counts from one row later: the columns of a triangle.

    ``b`` holds under one condition more, ``g >= 0``, and ``g >= -1`` wherever ``a`` counts. So ``g + 1 - t >= 0`` says
    where each holds, with t = 0 for ``a`` and 1 for ``b``.
    """
    later = own_guards(algebra, b, a, shape)
    if len(later) != 1 or any(v < 0 for v in algebra.space.vars(later[0])) or own_guards(algebra, a, b, shape):
        return None
    if algebra.space.lower(later[0], algebra.ranges(shape, a.guards)) != -1:
        return None
    mine = points(algebra, a, shape)
    pinned = {v: at for v, at in points(algebra, b, shape).items() if v not in mine}
    t = _fresh(a, b)
    return _summed(algebra, a, b, a.guards | {later[0] + 1 - Aff.var(t)}, pinned)


def _fresh(a: Term, b: Term) -> int:
    """A bound index that neither term has."""
    return min(0, *(v for x in (a, b) for f in x.affs() for v, _ in f.terms), 0) - 1


def _summed(algebra: Algebra, a: Term, b: Term, guards: Guards, pinned: Points) -> Term | None:
    """The sum over the line from ``a`` to ``b``, if some factor moves along it."""
    t = _fresh(a, b)
    if a.body == b.body or not a.accs or (fitted := fit(algebra, a, b, t, pinned)) is None:
        return None
    accs, exp = fitted
    if not any(i.coef(t) for _, idx in accs for i in idx):
        return None
    return Term(a.coef, a.poly, accs, exp, guards | {Aff.var(t), -Aff.var(t) + 1})


def free_line(algebra: Algebra, a: Term, b: Term, shape: tuple[Aff, ...]) -> Term | None:
    """Pieces at two neighbouring positions of a free dimension; of several, each says anew which piece is the first."""
    at_a, at_b = points(algebra, a, shape), points(algebra, b, shape)
    for var in sorted(at_a.keys() & at_b.keys()):
        step = at_b[var] - at_a[var]
        found = (
            _along(algebra, a, b, var, at_a[var])
            if step == Aff.lit(1)
            else _along(algebra, b, a, var, at_b[var])
            if step == Aff.lit(-1)
            else None
        )
        if found is not None:
            return found
    return None


def _along(algebra: Algebra, a: Term, b: Term, var: int, start: Aff) -> Term | None:
    """The line from ``a``, which is at ``start`` of a free dimension, to ``b``, which is at the place after it."""
    x = Aff.var(var)
    along = x - start
    guards = _fit_guards(algebra, a.guards - {along, -along}, b.guards - {along - 1, -along + 1}, along)
    if guards is None:
        return None
    fitted = fit(algebra, a, b.but(poly=a.poly), ALONG, {})
    step = b.poly - a.poly
    if fitted is None or not step.is_const:
        return None
    poly = a.poly + Aff.var(ALONG) * step.const
    moved = Term(a.coef, poly, *fitted, guards).sub(algebra.space, {ALONG: along})
    return moved.but(guards=moved.guards | {along, start + 1 - x})


def _fit_guards(algebra: Algebra, a: Guards, b: Guards, along: Aff) -> set[Aff] | None:
    left = {g.terms: g.const for g in a}
    right = {g.terms: g.const for g in b}
    if left.keys() != right.keys() or len(left) != len(a) or len(right) != len(b):
        return None
    return {algebra.space.guard(Aff(ts, c) + along * (right[ts] - c)) for ts, c in left.items()}
