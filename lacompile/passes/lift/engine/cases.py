"""Values case by case: index maps, merged sums, and the regions that several values are cut into together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product as cartesian

from ..domain.affine import ONE, Aff
from ..domain.term import NO_GUARDS, Case, Guards, Term, Val, value
from ..normal.merge import MAX_UNMERGED, TooManyTerms, merge_sum, merged
from .limits import FEW_CASES, MAX_CASES, GiveUp, Unmerged
from .structure import Structure


class Cases(Structure):
    """Operations that rearrange a value without computing with its numbers."""

    # --------------------------------------------------------------------------------------------------- index maps

    def index(self, v: Val, mapping: Mapping[int, Aff], shape: tuple[Aff, ...]) -> Val:
        """The tensor of this shape whose element is ``v`` at the mapped index."""
        if (was := self.before_roll(v)) is not None and (part := self.index(was, mapping, shape)).one is not None:
            return replace(part, precision=v.precision)  # what came around is not in it
        cases: list[Case] = []
        for c in v.cases:
            guards = self.prune((self.space.sub(g, mapping) for g in c.guards), shape) if c.guards else NO_GUARDS
            if guards is not None:
                cases.append(Case(guards, self.merged((t.sub(self.space, mapping) for t in c.terms), shape)))
        alt, own = (None if t is None else self.normalise(t.sub(self.space, mapping), shape) for t in (v.alt, v.own))
        return Val(shape, tuple(cases), alt, v.precision, own)

    def broadcast(self, v: Val, shape: tuple[Aff, ...]) -> Val:
        if v.shape == shape:
            return v
        shift = len(shape) - len(v.shape)
        if shift < 0:
            raise GiveUp("broadcast to fewer dimensions")
        mapping = {d: Aff.var(d + shift) for d in range(len(v.shape)) if shift and v.shape[d] != ONE}
        return self.index(v, mapping, shape) if mapping else replace(v, shape=shape)

    # --------------------------------------------------------------------------------------------------- merged sums

    def merged(self, terms: Iterable[Term], shape: tuple[Aff, ...]) -> tuple[Term, ...]:
        """The terms of a case; infinite ones, which stand alone, as they are."""
        terms = list(terms)
        if any(math.isinf(t.coef) for t in terms):
            return tuple(terms)
        try:
            return merge_sum(self, terms, shape)
        except TooManyTerms:
            raise Unmerged("a sum that does not merge") from None

    def sum_of(
        self, shape: tuple[Aff, ...], terms: Iterable[Term], alt: Term | None = None, limit: int = MAX_UNMERGED
    ) -> Val:
        try:
            return value(shape, merge_sum(self, terms, shape, limit), alt)
        except TooManyTerms:
            raise Unmerged("a sum that does not merge") from None

    # -------------------------------------------------------------------------------------------------------- cases

    def flat(self, v: Val) -> Val:
        """One case: the regions become guards of the terms (a sum needs no disjointness)."""
        if v.single:
            return v
        terms = []
        for c in v.cases:
            for t in c.terms:
                if math.isinf(t.coef):
                    raise GiveUp("an infinite value outside a mask")
                terms.append(t.but(guards=t.guards | c.guards))
        return self.sum_of(v.shape, terms)

    def split(self, v: Val) -> list[Case]:
        """Disjoint cases in which no term has a guard of its own over free dimensions."""
        work = list(v.cases)
        out: list[Case] = []
        while work:
            case = work.pop()
            guard = next(
                (g for t in case.terms for g in sorted(t.guards) if all(v >= 0 for v in self.space.vars(g))), None
            )
            if guard is None:
                out.append(case)
                continue
            if len(work) + len(out) > 4 * MAX_CASES:
                raise GiveUp("too many cases")
            inside = self.prune(case.guards | {guard}, v.shape)
            outside = self.prune(case.guards | {-guard - 1}, v.shape)
            if inside is not None:
                terms = []
                for t in case.terms:
                    if guard in t.guards:
                        terms.append(t.but(guards=t.guards - {guard}))
                    elif -guard - 1 not in t.guards:
                        terms.append(t)
                work.append(Case(inside, tuple(terms)))
            if outside is not None:
                work.append(Case(outside, tuple(t for t in case.terms if guard not in t.guards)))
        return out

    def zip_cases(self, vals: Sequence[Val], f: Callable[[list[tuple[Term, ...]]], Iterable[Term]]) -> Val:
        """``f`` applied on every non-empty intersection of the cases of ``vals`` (all of one shape)."""
        shape = vals[0].shape
        cases: list[Case] = []
        for combo in cartesian(*(v.cases for v in vals)):
            together = frozenset().union(*(c.guards for c in combo))
            guards = self.prune(together, shape) if together else NO_GUARDS
            if guards is None:
                continue
            cases.append(Case(guards, self.merged(f([c.terms for c in combo]), shape)))
            if len(cases) > MAX_CASES:
                raise GiveUp("too many cases")
        return self.join_cases(Val(shape, tuple(cases)))

    def join_cases(self, v: Val) -> Val:
        """Cases with equal terms on complementary sides of one guard become one."""
        cases = list(v.cases)
        changed = len(cases) > 1
        while changed:
            changed = False
            for n, a in enumerate(cases):
                for m in range(n):
                    b = cases[m]
                    if a.terms == b.terms and (guards := _union(a.guards, b.guards)) is not None:
                        cases[m] = Case(guards, a.terms)
                        del cases[n]
                        changed = True
                        break
                if changed:
                    break
        if len({c.terms for c in cases}) == 1:
            cases = [Case(NO_GUARDS, cases[0].terms)]
        return replace(v, cases=tuple(cases))

    def in_one(self, v: Val) -> Val:
        """Cases of one term each, which are that term on neighbouring regions, as one: the rows of a mask."""
        cases = list(v.cases)
        if len(cases) < FEW_CASES:
            return v
        n = 1
        while n < len(cases):
            found = ((m, case) for m in range(n) if (case := self._in_one(cases[m], cases[n], v.shape)) is not None)
            at = next(found, None)
            if at is None and n >= MAX_CASES:
                return v
            if at is None:
                n += 1
            else:
                cases[at[0]] = at[1]
                del cases[n]
        return replace(v, cases=tuple(cases))

    def _in_one(self, a: Case, b: Case, shape: tuple[Aff, ...]) -> Case | None:
        if len(a.terms) != len(b.terms) or len(a.terms) > 1:
            return None
        x, y = (c.terms[0] if c.terms else Term() for c in (a, b))
        infinite = math.isinf(x.coef) or math.isinf(y.coef)
        if x.guards or y.guards or (infinite and x.coef != y.coef):
            return None
        weighed = (t.but(coef=1.0 if infinite else t.coef, guards=c.guards) for t, c in ((x, a), (y, b)))
        left, right = (self.normalise(t, shape) for t in weighed)
        whole = None if left is None or right is None else merged(self, left, right, shape)
        if whole is None or whole.bound(self.space):
            return None
        guards = self.prune(whole.guards, shape)
        term = whole.but(guards=(), coef=x.coef if infinite else whole.coef)
        return None if guards is None else Case(guards, (term,) if a.terms else ())


def _union(a: Guards, b: Guards) -> Guards | None:
    """The union of two regions that differ in the side of one guard alone; None if they do not."""
    for g in a - b:
        rest_b = b - {-g - 1}
        if -g - 1 in b and rest_b == a - {g}:
            return rest_b
    return None
