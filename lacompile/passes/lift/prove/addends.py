"""What is added to a sum over positions: a state that came in, and plain terms.

The obligation of obligations.py that asks for this: single-term.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...facts import Progress
from ..domain.affine import Aff
from ..domain.exponent import Access, Exponent, sub_access
from ..domain.leaves import NINE_DIGITS
from ..domain.prefix import counted_from
from ..domain.term import Term
from .decay import Decay
from .proof import D_ROLE, Refused
from .roles import sequence_index


class Addends(Decay):
    """The terms beside the main one."""

    def other_term(self, t: Term) -> None:
        t = counted_from(self.space, t, self.first)
        if sequence_index(self.engine, t) is None and self._is_state_term(t):
            return
        of_row = all(v == self.n for v in self.space.vars(t.poly))  # how many positions there are up to it
        plain = of_row and not t.exp.sums and all(f.is_const for _, f in t.exp.lin)
        if plain and (summed := self._over_features(t)) is not None:
            self.proof.residual.append(summed)
            return
        raise Refused(
            "single-term",
            "one sum over j <= i (and an initial state)",
            f"also {self._spoken_term(t)}",
            Progress.ADDENDS,
        )

    def _over_features(self, t: Term) -> Term | None:
        """A plain term, summed indices among the key features.

        ``q (z + eps)`` adds the sum of each row of q, a weight of its own for each token ``(q u k) v``.
        """
        left = {n: length for n, (_, length) in enumerate(self.features.values())}
        mapping: dict[int, Aff] = {}
        ranges: set[Aff] = set()
        for v in t.bound(self.space):
            ends = self.engine.bounds(v, t.guards).ends
            if ends is None or not ends[0].is_const:
                return None
            low, high = ends
            role = next((n for n, length in left.items() if length == high - low + 1), None)
            if role is None:
                return None
            del left[role]
            mapping[v] = Aff.var(D_ROLE + role) + low
            ranges |= {self.space.guard(Aff.var(v) - low), self.space.guard(high - Aff.var(v))}
        both = self.e is not None and any(
            self._holds(a, self.e) and mapping.keys() & self.space.vars_of(a[1]) for a in t.accs
        )
        if t.guards != ranges or both:  # a product with every feature of both kinds is no small thing beside the sum
            return None
        return t.but(guards=()).sub(self.space, mapping)

    def _spoken_term(self, t: Term) -> str:
        if t.bound(self.space):
            return (
                f"a sum over {len(t.bound(self.space))} indices of {len(t.accs)} factors with another range or weight"
            )
        return "a term that only some positions have" if t.guards else "a term whose weight changes with the position"

    def _is_state_term(self, t: Term) -> bool:
        """exp(G_i) q_i S_init: the weight is the main one before the first key, times a number; the query the same."""
        t = self._one_later(t) if self.later else t
        start = Aff.lit(0 if self.proof.delayed else -1)
        expected = self._without_keys(self.main.exp).sub(self.space, {self.j: start})
        if self.proof.state is not None or not t.poly.is_const:
            return False
        queries = [a for a in t.accs if any(self._same_query(a, b) for b in self._main_queries())]
        states = [a for a in t.accs if a not in queries]
        mapping = self._feature_map(t, [*queries, *_factors_by_exp(t)])
        if mapping is None or not (states or t.exp):  # numbers that do not decay are a plain term
            return False
        if any(self._holds(a, self.n) for a in states):
            return False
        rename = {**self.rename, **mapping}
        apart = (t.exp.sub(self.space, rename) - expected.sub(self.space, self.rename)).number
        if apart is None:
            return False
        renamed = [sub_access(self.space, a, rename) for a in states]
        seen = sorted(sub_access(self.space, a, rename) for a in queries)
        if seen != sorted([*self.proof.q, *self.proof.outer]):
            return False
        if self._extra_guards(t, mapping):
            return False
        self.proof.state = renamed
        ratio = t.coef / self.main.coef * math.exp(apart)
        if not states:
            self.proof.state_number = ratio
        elif abs(ratio - 1) > NINE_DIGITS:
            self.proof.scale *= ratio
            self.proof.key_scale = 1 / ratio
        return True

    def _without_keys(self, exp: Exponent) -> Exponent:
        lin = [
            (m, f)
            for m, f in exp.lin
            if not (f.is_const and m and (self._renamed_mono(m), float(f.const)) in self.proof.k_weights)
        ]
        return Exponent.of(lin, exp.sums)

    def _main_queries(self) -> list[Access]:
        return [a for a in self.main.accs if not self._holds(a, self.j)]

    def _same_query(self, a: Access, b: Access) -> bool:
        if a[0] != b[0]:
            return False
        for x, y in zip(a[1], b[1], strict=True):
            dx, dy = [v for v in self.space.vars(x) if v < 0], [v for v in self.space.vars(y) if v < 0]
            if len(dx) != len(dy) or (not dx and x != y):
                return False
        return True

    def _feature_map(self, t: Term, queries: Sequence[Access]) -> dict[int, Aff] | None:
        """Feature indices of the state term over the roles of the main term, read off the shared query."""
        out: dict[int, Aff] = {}
        theirs = [*self._main_queries(), *(a for a in _factors_by_exp(self.main) if not self._holds(a, self.j))]
        for a in queries:
            for b in theirs:
                if not self._same_query(a, b):
                    continue
                for x, y in zip(a[1], b[1], strict=True):
                    bound = [(v, c) for v, c in x.terms if v < 0]
                    if len(bound) != 1 or bound[0][1] != 1:
                        continue
                    v = bound[0][0]
                    out.setdefault(v, self.space.sub(y, self.rename) - self.space.sub(x.without(v), self.rename))
        bound = t.bound(self.space)
        # two indices that are summed over apart are no one index, even if each is read like it
        return out if bound <= out.keys() and len({out[v] for v in bound}) == len(bound) else None

    def _extra_guards(self, t: Term, mapping: dict[int, Aff]) -> bool:
        rename = {**self.rename, **mapping}
        mine = {self.space.sub(g, rename) for g in t.guards}
        theirs = {self.space.sub(g, self.rename) for g in self.main.guards if self.j not in self.space.vars(g)}
        return mine != theirs


def _factors_by_exp(t: Term) -> list[Access]:
    """What an exponential of plain data reads, as one of a feature map is a factor."""
    return [a for m, f in t.exp.lin if f.is_const for a in m]
