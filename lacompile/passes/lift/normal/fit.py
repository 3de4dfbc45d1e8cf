"""What moves from one piece of a sum to another: factors and exponents, fitted by a line through both.

A fit is exact at both of its points, so an unlucky one costs a merge, never the truth. Numeric coefficients are not
fitted: alternating signs would become a slope.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from ..domain.affine import ONE, TAU, Aff, Number
from ..domain.exponent import Access, Exponent, Mono, sub_mono
from ..domain.prefix import Sum, along, between
from ..domain.term import Term
from .algebra import Algebra

Points = Mapping[int, Aff]


def fit(algebra: Algebra, a: Term, b: Term, t: int, pinned: Points) -> tuple[tuple[Access, ...], Exponent] | None:
    """Factors and exponent that are those of ``a`` at t = 0, and those of ``b``, which holds at these places, at 1."""
    if a.poly != b.poly:
        return None
    accs = []
    for x, y in zip(a.accs, b.accs, strict=True):
        fitted = _fit_access(algebra, x, y, t, pinned)
        if fitted is None:
            return None
        accs.append(fitted)
    first, own = a.exp, Exponent()
    if not pinned:
        first, own = _own_decay(algebra, a.but(exp=as_steps(algebra, a.exp, b.exp)), b, t)
    ends = (_latest, _earliest) if any(i.coef(t) < 0 for _, idx in accs for i in idx) else (_earliest, _latest)
    then = b.exp if pinned else as_steps(algebra, b.exp, first)
    exp = _fit_exponent(algebra, first, then, t, pinned, ends)
    return None if exp is None else (tuple(accs), exp + own)


def as_steps(algebra: Algebra, a: Exponent, b: Exponent) -> Exponent:
    """``a`` with the rates at single places as the steps ``P(p + 1) - P(p)`` of a sum that only ``b`` has.

    The first token's decay of a state that came in, ``P(1)``, looks like the rate of a head.
    """
    summed = {mono for (mono, _), _ in b.sums} - {mono for (mono, _), _ in a.sums}
    lin, sums = [], []
    for mono, f in a.lin:
        found = _step_of(algebra, mono, summed) if f.is_const and all(mono != other for other, _ in b.lin) else None
        if found is None:
            lin.append((mono, f))
        else:
            sums += between(found[0], found[1], found[1] + 1, f.const)
    return Exponent.of(lin, (*a.sums, *sums)) if sums else a


def _step_of(algebra: Algebra, mono: Mono, summed: Iterable[Mono]) -> tuple[Mono, Aff] | None:
    """The rate, over its running position, that this one is a single place of, and the place."""
    for rate in sorted(summed):
        if [leaf for leaf, _ in rate] != [leaf for leaf, _ in mono]:
            continue
        places = {
            y - x.without(TAU)
            for (_, at), (_, idx) in zip(rate, mono, strict=True)
            for x, y in zip(at, idx, strict=True)
            if x.coef(TAU)
        }
        place = next(iter(places)) if len(places) == 1 else None
        if place is not None and place.is_const and sub_mono(algebra.space, rate, {TAU: place}) == mono:
            return rate, place
    return None


def _own_decay(algebra: Algebra, a: Term, b: Term, t: int) -> tuple[Exponent, Exponent]:
    """The exponent of ``a`` but for what it has decayed by at its own token, and that, 0 for ``b`` at the next one.

    Where the state decays after it was added to, the earlier of two tokens has ``P(p + 1) - P(p)`` and the later one
    ``P(p + 1) - P(p + 1)``. It is no rate of a head: that both would have. Nor is it a weight of each token's own,
    ``exp(c x_p)`` and ``exp(c x_(p + 1))``.
    """
    sizes, seen = algebra.leaf_shapes, algebra.seen
    steps = {
        (p, seen(size))
        for (leaf, x), (_, y) in zip(a.accs, b.accs, strict=True)
        for p, q, size in zip(x, y, sizes[leaf], strict=True)
        if p.is_const and q - p == ONE
    }
    mine, theirs = ({mono for mono, _ in x.exp.lin} for x in (a, b))
    only_theirs = [(mono, f) for mono, f in b.exp.lin if mono not in mine]
    lin, sums = [], []
    for mono, f in a.exp.lin:
        read = {
            (n, d): x
            for n, (leaf, idx) in enumerate(mono)
            for d, x in enumerate(zip(idx, map(seen, sizes[leaf]), strict=True))
            if x in steps
        }
        at = set(read.values())
        if mono in theirs or not f.is_const or len(at) != 1:
            lin.append((mono, f))
            continue
        ((p, _),), rate = at, along(mono, read)
        if (sub_mono(algebra.space, rate, {TAU: p + 1}), f) in only_theirs:
            lin.append((mono, f))
        else:
            sums += between(rate, p + Aff.var(t), p + 1, f.const)
    return Exponent.of(lin, a.exp.sums), Exponent.of((), sums)


def _moved(p: Aff, there: Aff, q: Aff, t: int) -> Aff | None:
    """``p`` with what it lacks, where it is ``there``, to be ``q`` at t = 1."""
    step = q - there
    if not step.is_const:
        return None
    return p + Aff.var(t) * step.const if step.const else p


def _fit_access(algebra: Algebra, x: Access, y: Access, t: int, pinned: Points) -> Access | None:
    idx = []
    for p, q in zip(x[1], y[1], strict=True):
        moved = _moved(p, algebra.space.sub(p, pinned) if pinned else p, q, t)
        if moved is None:
            return None
        idx.append(moved)
    return (x[0], tuple(idx))


def _fit_exponent(algebra: Algebra, a: Exponent, b: Exponent, t: int, pinned: Points, ends: Still) -> Exponent | None:
    space = algebra.space
    lin: list[tuple[Mono, Aff]] = []
    left = {sub_mono(space, m, pinned): (m, f) for m, f in a.lin} if pinned else {m: (m, f) for m, f in a.lin}
    right = dict(b.lin)
    moving = [] if pinned else _moving_rates(algebra, left.keys() - right.keys(), right.keys() - left.keys(), t)
    if len(left) != len(a.lin):
        return None
    for x, y, mono in (*((m, m, left[m][0]) for m in left.keys() & right.keys()), *moving):
        f = _moved(p := left.pop(x)[1], space.sub(p, pinned), right.pop(y), t)
        if f is None:
            return None
        lin.append((mono, f))
    for mono, p in left.values():
        f = _moved(p, space.sub(p, pinned), Aff(), t)
        if f is None:
            return None
        lin.append((mono, f))
    for mono, q in right.items():
        if not q.is_const:
            return None
        lin.append((mono, Aff.var(t) * q.const))
    sums = _fit_sums(algebra, a.sums, b.sums, t, pinned, ends)
    return None if sums is None else Exponent.of(lin, sums)


def _moving_rates(
    algebra: Algebra, left: Iterable[Mono], right: Iterable[Mono], t: int
) -> list[tuple[Mono, Mono, Mono]]:
    """The rates that are one leaf at two places, such as slope[2] and slope[3], each with the line through both."""
    out, there = [], sorted(right)
    for x in sorted(left):
        y = next((y for y in there if [leaf for leaf, _ in x] == [leaf for leaf, _ in y]), None)
        if y is not None:
            there.remove(y)
            fitted = [_fit_access(algebra, p, q, t, {}) for p, q in zip(x, y, strict=True)]
            out.append((x, y, tuple(a for a in fitted if a is not None)))
    return [found for found in out if len(found[2]) == len(found[0])]


Ends = dict[Number, list[tuple[Aff, Aff]]]
"""Coefficient -> positions: where the piece that is followed has them pinned, and as they are."""


def _fit_sums(
    algebra: Algebra, a: tuple[Sum, ...], b: tuple[Sum, ...], t: int, pinned: Points, ends: Still
) -> list[Sum] | None:
    """Pairs +-P positions of both sides; a vanished pair P(u) - P(u) or a dropped P(0) is put back first."""
    space = algebra.space
    groups: dict[Mono, tuple[Ends, Ends, Mono]] = {}
    for (mono, pos), c in a:
        there = sub_mono(space, mono, pinned)
        if groups.setdefault(there, ({}, {}, mono))[2] != mono:
            return None
        groups[there][0].setdefault(c, []).append((space.sub(pos, pinned), pos))
    others = {mono for (mono, _), _ in b}
    moving = [] if pinned else _moving_rates(algebra, groups.keys() - others, others - groups.keys(), t)
    named = {y: x for x, y, _ in moving}
    groups |= {x: (*groups[x][:2], mono) for x, _, mono in moving}
    for (mono, pos), c in b:
        mono = named.get(mono, mono)
        groups.setdefault(mono, ({}, {}, mono))[1].setdefault(c, []).append((pos, pos))
    out: list[Sum] = []
    for left, right, mono in groups.values():
        if not right:  # what the later of two tokens lacks is a pair that vanished, and what the earlier lacks P(0)
            _balance(left)
        restored = _restore(left, right, ends[0]) and _restore(right, left, ends[1])
        if not restored or left.keys() != right.keys():
            return None
        for c in left:
            ps, qs = sorted(left[c]), sorted(right[c])
            if len(ps) != len(qs):
                return None
            for (there, p), (q, _) in zip(ps, qs, strict=True):
                moved = _moved(p, there, q, t)
                if moved is None:
                    return None
                out.append(((mono, moved), c))
    return out


def _balance(ends: Ends) -> None:
    """Puts back the P(0) of a difference."""
    for c, positions in list(ends.items()):
        for _ in range(len(positions) - len(ends.get(-c, ()))):
            ends.setdefault(-c, []).append((Aff(), Aff()))


End = Callable[[list[Aff]], Aff]
"""Which of several positions does not move."""

Still = tuple[End, End]
"""That of either side of a line, where it lacks a pair P(u) - P(u) that the other has: it is the token that has not
decayed yet. The later of two is that where a loop goes forwards, and u is their latest position, the earlier where it
goes backwards, and u is the earliest."""


def _restore(mine: Ends, theirs: Ends, end: End) -> bool:
    """Gives ``mine`` the P terms that cancelled there but not in ``theirs``: P(0), or a pair P(u) - P(u)."""
    for c, positions in list(theirs.items()):
        have = len(mine.get(c, ()))
        if have >= len(positions):
            continue
        if len(positions) - have > 1:
            return False
        if len(mine.get(-c, ())) < len(theirs.get(-c, ())):
            u = end([p for p, _ in (*theirs[c], *theirs.get(-c, ()))])
            mine.setdefault(c, []).append((u, u))
            mine.setdefault(-c, []).append((u, u))
        else:
            mine.setdefault(c, []).append((Aff(), Aff()))
    return True


def _latest(positions: list[Aff], sign: int = 1) -> Aff:
    """The largest, as far as differences are numbers."""
    best = positions[0]
    for p in positions[1:]:
        step = p - best
        if step.is_const and step.const * sign > 0:
            best = p
    return best


def _earliest(positions: list[Aff]) -> Aff:
    return _latest(positions, -1)
