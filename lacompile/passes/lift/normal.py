"""Normalisation of one term: guards, ranges and the names of bound indices, until nothing changes.

The rules are sound on their own: each returns a term with the same value at every index. Their ids (R1, R2, ...) are
the ones used in docs/how-matching-works.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any

from .affine import FIRST_DIV, ONE, ZERO, Aff, Range
from .rates import Rates
from .term import Access, Exponent, Guards, Mono, Term

ROUNDS = 8
MISSING: Any = object()
DENSE = 12  # free dimensions whose coefficients are compared one by one


class Algebra(Rates):
    """The rules of normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self._normal: dict[tuple[Term, tuple[Aff, ...]], Term | None] = {}
        self._unmerged: dict[tuple[Aff, ...], set[tuple[Term, Term]]] = {}

    # ------------------------------------------------------------------------------------------------- normalisation

    def normalise(self, term: Term, shape: tuple[Aff, ...]) -> Term | None:
        """The normal form of ``term`` as part of a tensor of this shape; None if it is zero everywhere."""
        if term.coef == 0:
            return None
        key = (term, shape)
        found = self._normal.get(key, MISSING)
        if found is MISSING:
            found = self._normal[key] = self._normalised(self._unit_coefficient(term), shape)
        return found

    def unmerged_in(self, shape: tuple[Aff, ...]) -> set[tuple[Term, Term]]:
        """Pairs of terms of tensors of this shape that are known not to merge."""
        return self._unmerged.setdefault(shape, set())

    def _normalised(self, term: Term, shape: tuple[Aff, ...]) -> Term | None:
        if not term.guards and not term.bound(self.space):
            return self._canonical_names(self._settle(term, shape))
        for _ in range(ROUNDS):
            before = term
            guards = self.pruned(term.guards, shape)
            if guards is None:
                return None
            term = term if guards == term.guards else term.but(guards=guards)
            term = self._collapse_points(term, shape)
            term = self._count_unused(term, shape)
            term = self._mixed_radix(term)
            term = self._settle(term, shape)
            if term == before:
                break
        return self._canonical_names(self._origins(term))

    @staticmethod
    def _unit_coefficient(term: Term) -> Term:
        """The size of the coefficient of a product belongs to its weight: 0.9 * S and exp(log 0.9) * S are one form."""
        size = abs(term.coef)
        if size == 1 or len(term.accs) < 2 or math.isinf(size):
            return term
        log = Exponent.of([((), Aff.lit(math.log(size)))], ())
        return term.but(coef=math.copysign(1.0, term.coef), exp=term.exp + log)

    def _term_ranges(self, term: Term, shape: tuple[Aff, ...]) -> dict[int, Range]:
        """Where the free and the bound indices lie, wherever the term counts."""
        ranges = self.ranges(shape, term.guards)
        return {**ranges, **self.numbers(term.guards, ranges)}

    def _settle(self, term: Term, shape: tuple[Aff, ...]) -> Term:
        """Floor divisions that the box decides, and exponents in their canonical reading."""
        space = self.space
        if any(a.divides for a in term.affs()):
            ranges = self._term_ranges(term, shape)

            def mono(m: Mono) -> Mono:
                return tuple(sorted((leaf, tuple(space.settle(i, ranges) for i in idx)) for leaf, idx in m))

            term = Term(
                term.coef,
                space.settle(term.poly, ranges),
                tuple((leaf, tuple(space.settle(i, ranges) for i in idx)) for leaf, idx in term.accs),
                Exponent.of(
                    ((mono(m), space.settle(f, ranges)) for m, f in term.exp.lin),
                    (((mono(m), space.settle(p, ranges)), c) for (m, p), c in term.exp.sums),
                ),
                (space.guard(space.settle(g, self.ranges_without_guards(ranges))) for g in term.guards),
            )
        if any(m for m, _ in term.exp.lin) or term.exp.sums:
            exp = self.telescoped(term.exp, term.accs)
            if any(m and f.terms for m, f in exp.lin):
                exp = self.short_steps(exp, term.accs, self._term_ranges(term, shape))
            term = term if exp == term.exp else term.but(exp=exp)
        return term

    @staticmethod
    def ranges_without_guards(ranges: Mapping[int, Range]) -> dict[int, Range]:
        """Only constant ranges: a guard must not be simplified by the range it itself defines."""
        return {v: r for v, r in ranges.items() if r[0] == ZERO and v >= 0}

    def _speaks_of_bound(self, *affs: Aff) -> bool:
        return any(v < 0 for a in affs for v in self.space.vars(a))

    def _collapse_points(self, term: Term, shape: tuple[Aff, ...]) -> Term:
        """R2: an index whose range is one point is that point. A free dimension keeps the guards that pin it."""
        for var in sorted(self._guarded(term)):
            b = self.bounds(var, term.guards)
            low, high = b.low, b.high
            if var >= 0:
                low, high = [*low, ZERO], [*high, shape[var] - 1]
            point = next((lo for lo in low for hi in high if lo == hi), None)
            if point is None or var in self.space.vars(point):
                continue
            mapping = {var: point}
            if var < 0:
                term = term.sub(self.space, mapping)
            elif all(v >= 100 for v in self.space.vars(point)):
                keep = {g for g in term.guards if g.coef(var) and g.without(var) in (-point, point)}
                moved = term.but(guards=term.guards - keep).sub(self.space, mapping)
                term = moved.but(guards=moved.guards | keep)
        return term

    @staticmethod
    def _guarded(term: Term) -> set[int]:
        return {v for g in term.guards for v, _ in g.terms if v < 100}

    def _count_unused(self, term: Term, shape: tuple[Aff, ...]) -> Term:
        """A bound index that only its range mentions counts: it multiplies by the length of the range."""
        bound = term.bound(self.space)
        if not bound:
            return term
        for var in sorted(bound - self._used(term)):
            b = self.bounds(var, term.guards)
            if b.other or len(b.low) != 1 or len(b.high) != 1 or not term.poly.is_const:
                continue
            length = b.high[0] - b.low[0] + 1
            if any(v < 0 for v in self.space.vars(length)):
                continue
            rest = [g for g in term.guards if not g.coef(var)]
            if self.space.lower(length, self.ranges(shape, rest)) < 0:
                rest.append(length - 1)
            term = term.but(poly=length, guards=rest)
        return self._zero_or_one(term, shape)

    def _used(self, term: Term) -> set[int]:
        """The variables of everything but the guards."""
        used: set[int] = set()
        for aff in term.factors():
            for v, _ in aff.terms:
                if v >= FIRST_DIV:
                    used |= self.space.vars(Aff.var(v))
                else:
                    used.add(v)
        return used

    def _zero_or_one(self, term: Term, shape: tuple[Aff, ...]) -> Term:
        """An index-valued factor of a sum that can only be 0 or 1 is the guard that it is 1."""
        poly = term.poly
        if poly.is_const or not term.bound(self.space) or not all(isinstance(c, int) for _, c in poly.terms):
            return term
        ranges = self.box(shape)
        if self.space.vars(poly) <= ranges.keys() and isinstance(poly.const, int):
            if self.space.lower(poly, ranges) == 0 and self.space.upper(poly, ranges) == 1:
                return term.but(poly=ONE, guards=term.guards | {poly - 1})
        return term

    def _mixed_radix(self, term: Term) -> Term:
        """R3: b1, b2 that occur only as m*b1 + b2, b2 running over exactly m values, are one index.

        R3b: b2 in [m*b1 + r, m*b1 + r + m - 1] with b1 nowhere else is one index over the union of the windows.
        """
        bound = sorted(term.bound(self.space))
        if len(bound) < 2:
            return term
        for b2 in bound:
            ends = self.bounds(b2, term.guards)
            for low in ends.low if not ends.other else ():
                for high in ends.high:
                    length = high - low + 1
                    if not length.is_const or length.const < 1:
                        continue
                    for b1 in bound:
                        if b1 != b2 and (merged := self._as_one_index(term, b1, b2, low, int(length.const))):
                            return merged
        return term

    def _as_one_index(self, term: Term, b1: int, b2: int, low: Aff, m: int) -> Term | None:
        """``b2`` runs over ``m`` values from ``low``; other guards may restrict it further."""
        if m == 1 or not (low.is_const or low.coef(b1) == m):
            return None
        x = Aff.var(b2)
        own = {self.space.guard(x - low), self.space.guard(low + (m - 1) - x)}
        rest = term.guards - own
        return self._windows(term, b1, b2, low, m, rest) or self._digits(term, b1, b2, low, m, rest)

    def _range_of(self, var: int, guards: Iterable[Aff]) -> tuple[Aff, Aff] | None:
        b = self.bounds(var, guards)
        return None if b.other or len(b.low) != 1 or len(b.high) != 1 else (b.low[0], b.high[0])

    def _windows(self, term: Term, b1: int, b2: int, low: Aff, m: int, rest: Guards) -> Term | None:
        if low.coef(b1) != m or b1 in self._used(term):
            return None
        range1 = self._range_of(b1, rest)
        if range1 is None:
            return None
        base = low.without(b1)
        if b1 in self.space.vars(base) or b2 in self.space.vars(range1[0]) | self.space.vars(range1[1]):
            return None
        # A point of the union lies in one window, so a further guard on b2 says the same of it in either form.
        guards = [g for g in rest if not g.coef(b1)]
        guards.append(Aff.var(b2) - base - range1[0] * m)
        guards.append(base + range1[1] * m + (m - 1) - Aff.var(b2))
        return term.but(guards=guards)

    def _digits(self, term: Term, b1: int, b2: int, low2: Aff, m: int, rest: Guards) -> Term | None:
        if not low2.is_const or any(Aff.lit(f.coef(b1)) != Aff.lit(f.coef(b2) * m) for f in term.factors()):
            return None
        if any(b2 in self.space.vars(g) for g in rest):
            return None
        range1 = self._range_of(b1, rest)
        if range1 is None or b2 in self.space.vars(range1[0]) | self.space.vars(range1[1]):
            return None
        if any(g.coef(b1) and (g.coef(b1) not in (1, -1)) for g in rest):
            return None
        for aff in term.factors():
            for v, _ in aff.terms:
                if v >= FIRST_DIV and not self.space.vars(Aff.var(v)).isdisjoint((b1, b2)):
                    return None
        guards = [g for g in rest if not g.coef(b1)]
        guards.append(Aff.var(b2) - range1[0] * m - low2)
        guards.append(range1[1] * m + (m - 1) + low2 - Aff.var(b2))
        moved = term.but(guards=()).sub(self.space, {b1: ZERO})
        return moved.but(guards=guards)

    # ---------------------------------------------------------------------------------------------- canonical naming

    def _sort_key(self, access: Access) -> tuple:
        """An order of accesses that does not change when a bound index is counted from elsewhere.

        Between accesses of one leaf at the same bound index the offsets decide, compared coefficient by coefficient.
        """

        def key(aff: Aff) -> tuple:
            bound = tuple(sorted(abs(c) for v, c in aff.terms if v < 0))
            free = tuple((v, c) for v, c in aff.terms if v >= 0)
            return (bound, () if bound else free, 0 if bound else aff.const)

        def offset(aff: Aff) -> tuple:
            if all(v >= 0 for v, _ in aff.terms):
                return ()
            rest = tuple((v, c) for v, c in aff.terms if v >= DENSE)
            return (*(aff.coef(d) for d in range(DENSE)), rest, aff.const)

        return (access[0], tuple(key(a) for a in access[1]), tuple(offset(a) for a in access[1]))

    def _ordered(self, accs: Sequence[Access]) -> Sequence[Access]:
        """Sorted by :meth:`_sort_key`, of which the leaf comes first."""
        leaves = [leaf for leaf, _ in accs]
        return sorted(accs, key=itemgetter(0) if len(set(leaves)) == len(leaves) else self._sort_key)

    def _origins(self, term: Term) -> Term:
        """R4: the first access that holds a bound index alone (with coefficient 1 or -1) becomes that index."""
        if not term.bound(self.space):
            return term
        done: set[int] = set()
        for access in self._ordered(term.accs):
            for aff in access[1]:
                term = self._origin(term, aff, done)
        for mono, f in term.exp.lin:
            for aff in (*[i for _, idx in mono for i in idx], f):
                term = self._origin(term, aff, done)
        for (mono, pos), _ in term.exp.sums:
            for aff in (*[i for _, idx in mono for i in idx], pos):
                term = self._origin(term, aff, done)
        return term

    def _origin(self, term: Term, aff: Aff, done: set[int]) -> Term:
        bound = [(v, c) for v, c in aff.terms if v < 0]
        if len(bound) != 1 or abs(bound[0][1]) != 1:
            return term
        v, c = bound[0]
        if v in done or any(w >= FIRST_DIV and v in self.space.vars(Aff.var(w)) for w, _ in aff.terms):
            return term
        done.add(v)
        rest = aff.without(v)
        if c == 1 and not rest.terms and not rest.const:
            return term
        return term.sub(self.space, {v: (Aff.var(v) - rest) * int(c)})

    def _canonical_names(self, term: Term) -> Term:
        """Bound indices named -1, -2, ... by first occurrence, accesses sorted: equality becomes a comparison."""
        bound = term.bound(self.space)
        if bound:
            term = self._renamed(term, bound)
        accs = tuple(sorted(term.accs))
        return term if accs == term.accs else term.but(accs=accs)

    def _renamed(self, term: Term, bound: frozenset[int]) -> Term:
        order: list[int] = []

        def visit(aff: Aff) -> None:
            for v, _ in sorted(aff.terms, key=lambda t: (abs(t[1]), -t[0])):
                inner = self.space.vars(Aff.var(v)) if v >= FIRST_DIV else (v,)
                order.extend(w for w in inner if w < 0 and w not in order)

        for _, idx in self._ordered(term.accs):
            for aff in idx:
                visit(aff)
        for aff in (*term.exp.affs(), term.poly):
            visit(aff)
        if len(order) < len(bound):
            for g in sorted(term.guards, key=lambda g: (len(g.terms), tuple(abs(c) for _, c in g.terms), abs(g.const))):
                visit(g)
        names = {v: Aff.var(-(n + 1)) for n, v in enumerate(order)}
        return term if all(names[v] == Aff.var(v) for v in order) else term.sub(self.space, names)

    # ------------------------------------------------------------------------------------------------ small services

    def product(self, a: Term, b: Term) -> Term | None:
        """``a * b`` with the bound indices of ``b`` renamed apart; None if both carry an index-valued factor."""
        if not a.poly.is_const and not b.poly.is_const:
            return None
        if math.isinf(a.coef) or math.isinf(b.coef):
            return None
        b = self.apart(b, a)
        return Term(
            a.coef * b.coef,
            b.poly if a.poly.is_const else a.poly,
            tuple(sorted(a.accs + b.accs)),
            a.exp + b.exp,
            a.guards | b.guards,
        )

    def apart(self, b: Term, a: Term) -> Term:
        bound_b = b.bound(self.space)
        if not bound_b:
            return b
        start = min(a.bound(self.space) | bound_b) - 1
        return b.sub(self.space, {v: Aff.var(start - n) for n, v in enumerate(sorted(bound_b, reverse=True))})
