"""The ends of a range, and a single point by which one of them moves.

A token loop adds what comes next to a sum; a running sum from the other side, less its own element, is the sum over
those after it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from ..domain.affine import MAX_DIMS, Aff, Number
from ..domain.exponent import Access, sub_access
from ..domain.term import Term
from .algebra import Algebra
from .fit import as_steps
from .lines import own_guards, points

Ends = tuple[Aff, Aff]


def only_ends(algebra: Algebra, term: Term, var: int, shape: tuple[Aff, ...]) -> Ends | None:
    """The range of ``var`` in this term, if it has one lower and one upper end."""
    found = all_ends(algebra, term, var, shape)
    return found[0] if len(found) == 1 else None


def all_ends(algebra: Algebra, term: Term, var: int, shape: tuple[Aff, ...]) -> list[Ends]:
    """Every pair of ends; a free dimension without guards has its whole extent."""
    bounds = algebra.bounds(var, term.guards)
    low, high = bounds.low, bounds.high
    if var >= 0:
        size = shape[var]
        simple_low = [x for x in low if not x.terms or all(v >= MAX_DIMS for v, _ in x.terms)]
        simple_high = [x for x in high if not x.terms or all(v >= MAX_DIMS for v, _ in x.terms)]
        low, high = simple_low or [Aff.lit(0)], simple_high or [size - 1]
    return [(lo, hi) for lo in low for hi in high]


def same(a: float, b: float) -> bool:
    """Equal but for the rounding of coefficients."""
    return a == b or abs(a - b) <= 1e-9 * abs(a)


def extend(algebra: Algebra, ranged: Term, point: Term, shape: tuple[Aff, ...]) -> Term | None:
    """A ranged term and a point next to the range, equal to what the ranged term is there."""
    for var, low, high in _movable(algebra, ranged, point, shape):
        for at, longer in ((high + 1, (low, high + 1)), (low - 1, (low - 1, high))):
            if not _is_there(algebra, ranged, point, var, at, (low, high), shape):
                continue
            out = _with_range(algebra, ranged, point, var, (low, high), longer, high - low + 1, shape)
            if out is not None:
                return out
        if var >= 0 and (clipped := _clipped(algebra, ranged, var, shape)) is not None:
            return extend(algebra, clipped, point, shape)
    return None


def _clipped(algebra: Algebra, ranged: Term, var: int, shape: tuple[Aff, ...]) -> Term | None:
    """The same sum, of a window before each place, with what it says of places before which there is less.

    ``i - 3 <= j`` wherever ``i >= 3`` is ``0 <= j`` there, too: only where the sum is continued to ``i < 3`` it counts.
    """
    ends = {v for g in ranged.guards if g.coef(var) for v, _ in g.terms if v < 0}
    read = {i for _, idx in ranged.accs for i in idx}
    new = {Aff.var(v) for v in ends if Aff.var(v) in read} - ranged.guards
    ranges = algebra.ranges(shape, ranged.guards)
    new = {g for g in new if algebra.implied(g, ranged.guards, ranges)}
    return ranged.but(guards=ranged.guards | new) if new else None


def shorten(algebra: Algebra, ranged: Term, point: Term, shape: tuple[Aff, ...]) -> Term | None:
    """A ranged term less what it is at one of its ends."""
    minus = point.but(coef=-point.coef)
    for var, low, high in _movable(algebra, ranged, point, shape):
        for at, shorter in ((high, (low, high - 1)), (low, (low + 1, high))):
            if not _is_there(algebra, ranged, minus, var, at, (low, high), shape):
                continue
            out = _with_range(algebra, ranged, point, var, (low, high), shorter, high - low, shape)
            if out is not None:
                return out
    return None


def _movable(algebra: Algebra, ranged: Term, point: Term, shape: tuple[Aff, ...]) -> Iterator[tuple[int, Aff, Aff]]:
    """Indices of ``ranged`` whose range the point may change, each with its ends."""
    fixed = points(algebra, point, shape)
    for var in sorted({v for g in ranged.guards for v, _ in g.terms if v < MAX_DIMS}):
        ends = only_ends(algebra, ranged, var, shape)
        if ends is None or (
            var >= 0 and (var not in fixed or not all(v >= MAX_DIMS for e in ends for v, _ in e.terms))
        ):
            continue
        yield var, *ends


def _is_there(
    algebra: Algebra, ranged: Term, point: Term, var: int, at: Aff, ends: Ends, shape: tuple[Aff, ...]
) -> bool:
    """Whether the body of ``ranged`` at ``var = at``, under its other conditions, is ``point``."""
    fixed = points(algebra, point, shape)
    if var in fixed and fixed[var] != at:
        return False
    x, there_at = Aff.var(var), {var: at}
    accs = [sub_access(algebra.space, a, there_at) for a in ranged.accs]
    if not _constants(accs) <= _constants(point.accs):  # asked before the rest is moved: it mostly is so
        return False
    moved = _without_range(algebra, ranged, var, ends).sub(algebra.space, there_at)
    if var >= 0:
        moved = moved.but(guards=moved.guards | {x - at, at - x})
    there = algebra.normalise(moved, shape)
    if there is None or not same(point.coef, there.coef):
        return False
    if there.body != point.body and there.body != point.but(exp=as_steps(algebra, point.exp, there.exp)).body:
        return False
    return there.guards == point.guards or not (
        own_guards(algebra, there, point, shape) or own_guards(algebra, point, there, shape)
    )


def point(algebra: Algebra, ranged: Term, var: int, ends: Ends, at: Aff, shape: tuple[Aff, ...]) -> Term | None:
    """What a ranged term is at one place of its range."""
    return algebra.normalise(_without_range(algebra, ranged, var, ends).sub(algebra.space, {var: at}), shape)


def two_points(algebra: Algebra, t: Term, shape: tuple[Aff, ...]) -> Iterator[list[Term | None]]:
    """A sum of two places as those two, for each index that has no more: any two lie on a line, be it by accident."""
    for var in sorted(t.bound(algebra.space)):
        ends = only_ends(algebra, t, var, shape)
        if ends is not None and ends[1] - ends[0] == Aff.lit(1) and not algebra.bounds(var, t.guards).other:
            yield [point(algebra, t, var, ends, at, shape) for at in ends]


def _without_range(algebra: Algebra, term: Term, var: int, ends: Ends) -> Term:
    x = Aff.var(var)
    return term.but(guards=term.guards - {algebra.space.guard(x - ends[0]), algebra.space.guard(ends[1] - x)})


def _with_range(
    algebra: Algebra,
    ranged: Term,
    point: Term,
    var: int,
    ends: Ends,
    moved: Ends,
    at_least: Aff,
    shape: tuple[Aff, ...],
) -> Term | None:
    """The term with other ends, if ``at_least`` is not negative wherever the point counts."""
    if algebra.space.lower(at_least, algebra.ranges(shape, point.guards)) < 0:
        return None
    x, rest = Aff.var(var), _without_range(algebra, ranged, var, ends)
    return rest.but(guards=rest.guards | {algebra.space.guard(x - moved[0]), algebra.space.guard(moved[1] - x)})


def _constants(accs: Iterable[Access]) -> Counter[tuple[int, int, Number]]:
    """Where accesses read a constant place: (leaf, dimension, place), which normalisation adds to and keeps."""
    return Counter((leaf, n, i.const) for leaf, idx in accs for n, i in enumerate(idx) if not i.terms)
