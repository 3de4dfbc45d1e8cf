"""Normalisation of one term: guards, ranges and bound indices, until nothing changes.

The rules are sound on their own: each returns a term with the same value at every index. Their ids (R1, R2, ...) are
the ones used in docs/matching/rules.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..domain.affine import MAX_DIMS, ONE, ZERO, Aff, Range
from ..domain.exponent import Exponent, Mono
from ..domain.term import Term
from .naming import canonical_names, counted_from_origins
from .radix import one_index
from .slopes import Slopes

ROUNDS = 8
PATIENCE = 500  # pairs of terms that may turn out not to merge, and one more for each node of the graph
MISSING: Any = object()


class Algebra(Slopes):
    """The rules of normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.patience = PATIENCE
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
            return canonical_names(self.space, self._settle(term, shape))
        for _ in range(ROUNDS):
            before = term
            guards = self.pruned(term.guards, shape)
            if guards is None:
                return None
            term = term if guards == term.guards else term.but(guards=guards)
            term = self._collapse_points(term, shape)
            term = self._count_unused(term, shape)
            term = one_index(self, term)
            term = self._settle(term, shape)
            if term == before:
                break
        return canonical_names(self.space, counted_from_origins(self.space, term))

    @staticmethod
    def _unit_coefficient(term: Term) -> Term:
        """The size of the coefficient of a product belongs to its weight: 0.9 * S and exp(log 0.9) * S are one form."""
        size = abs(term.coef)
        if size == 1 or not term.is_product or math.isinf(size):
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
                (space.guard(space.settle(g, _constant(ranges))) for g in term.guards),
            )
        if any(m or f.terms for m, f in term.exp.lin) or term.exp.sums:
            exp = self.telescoped(self.by_heads(term.exp, term.accs, shape), term.accs)
            if any(m and f.terms for m, f in exp.lin):
                exp = self.short_steps(exp, term.accs, self._term_ranges(term, shape))
            term = term if exp == term.exp else term.but(exp=exp)
        return term

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
            elif all(v >= MAX_DIMS for v in self.space.vars(point)):
                keep = {g for g in term.guards if g.coef(var) and g.without(var) in (-point, point)}
                moved = term.but(guards=term.guards - keep).sub(self.space, mapping)
                term = moved.but(guards=moved.guards | keep)
        return term

    @staticmethod
    def _guarded(term: Term) -> set[int]:
        return {v for g in term.guards for v, _ in g.terms if v < MAX_DIMS}

    def _count_unused(self, term: Term, shape: tuple[Aff, ...]) -> Term:
        """A bound index that only its range mentions counts: it multiplies by the length of the range."""
        bound = term.bound(self.space)
        if not bound:
            return term
        for var in sorted(bound - self.space.vars_of(term.factors())):
            ends = self.bounds(var, term.guards).ends
            if ends is None or not term.poly.is_const:
                continue
            length = ends[1] - ends[0] + 1
            if any(v < 0 for v in self.space.vars(length)):
                continue
            rest = [g for g in term.guards if not g.coef(var)]
            if self.space.lower(length, self.ranges(shape, rest)) < 0:
                rest.append(length - 1)
            term = term.but(poly=length, guards=rest)
        return self._zero_or_one(term, shape)

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

    # ------------------------------------------------------------------------------------------------------ products

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


def _constant(ranges: Mapping[int, Range]) -> dict[int, Range]:
    """Only constant ranges: a guard must not be simplified by the range it itself defines."""
    return {v: r for v, r in ranges.items() if r[0] == ZERO and v >= 0}
