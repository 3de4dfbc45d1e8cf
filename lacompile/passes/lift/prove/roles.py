"""Which index of a sum is what - position, feature, batch or head - and which of its factors are q, k and v.

The obligations of obligations.py that ask for this: causal-range, whole-features, separable.
"""

from __future__ import annotations

from collections.abc import Iterable

from ...facts import Progress
from ..domain.affine import MAX_DIMS, ONE, ZERO, Aff
from ..domain.exponent import Access, Mono, sub_access
from ..domain.kinds import Opaque
from ..domain.prefix import counted_from
from ..domain.term import Term
from ..engine import Engine
from ..interpret import Known
from .proof import D_ROLE, E_ROLE, N_ROLE, Proof, Refused
from .spoken import spoken


def sequence_index(engine: Engine, t: Term) -> tuple[int, int] | None:
    """(bound index, free dimension) where a guard ties the range of the one to the other."""
    for g in sorted(t.guards):
        bound = [v for v in engine.space.vars(g) if v < 0]
        free = [v for v in engine.space.vars(g) if 0 <= v < MAX_DIMS]
        if len(bound) == 1 and free:
            return bound[0], free[0]
    return None


class Roles:
    """The sum that is proved, ``main``, over its position j, its row n, and its features."""

    def __init__(self, engine: Engine, known: Known, main: Term):
        self.engine, self.space, self.known = engine, engine.space, known
        self.shape = known.value.shape
        found = sequence_index(engine, main)
        assert found is not None
        self.j, self.n = found
        low = engine.bounds(self.j, main.guards).low
        later = len(low) == 1 and low[0].is_const and low[0].const > 0  # parts of longer tensors
        if later and not any(self._holds(a, self.j) for a in main.accs):  # weights alone count from anywhere
            main, later = main.sub(self.space, {self.j: Aff.var(self.j) + low[0]}), False
        self.first = low[0] if later else ZERO
        self.main = counted_from(self.space, main, self.first, [self.j])

    def check_ranges(self) -> None:
        j, i = Aff.var(self.j), Aff.var(self.n)
        bound = self.main.bound(self.space)
        about_j = {g for g in self.main.guards if self.j in self.space.vars(g)}
        self.later = about_j == {j, i - j - 1}
        if self.later:  # a sum over earlier positions, i included, is what the next position reads
            self.main = self._one_later(self.main)
            about_j = {j, i - j}
        if about_j != {j, i - j}:
            found = ", ".join(self._spoken(g) for g in sorted(about_j))
            raise Refused("causal-range", "0 <= j <= i or 0 <= j < i", found, Progress.RANGE)
        self.features: dict[int, tuple[int, Aff]] = {}
        for d in sorted(bound - {self.j}, reverse=True):
            ends = self.engine.bounds(d, self.main.guards).ends
            if ends is None or not ends[0].is_const or not self.space.is_size(ends[1]):
                raise Refused(
                    "whole-features",
                    "feature sums over constant ranges",
                    "an index over a part of them",
                    Progress.RANGE,
                )
            self.features[d] = (int(ends[0].const), ends[1] - ends[0] + 1)
        loose = {g for g in self.main.guards - about_j if not any(g.coef(d) for d in self.features)}
        if loose:
            raise Refused(
                "causal-range",
                "one sum that all rows read",
                "one that is read where " + " and ".join(self._spoken(g) for g in sorted(loose)) + " alone",
                Progress.RANGE,
            )
        if len(self.features) > 4:
            raise Refused("whole-features", "at most four feature indices", f"{len(self.features)}", Progress.RANGE)

    def _one_later(self, t: Term) -> Term:
        """The term at the position after i."""
        return t.sub(self.space, {self.n: Aff.var(self.n) + 1})

    def _spoken(self, guard: Aff) -> str:
        """A guard as an end of the range of j, or else of i, where it is one: ``j <= i + 3``."""
        for v, name in ((self.j, "j"), (self.n, "i")):
            if abs(c := guard.coef(v)) == 1:
                return f"{name} {'>=' if c > 0 else '<='} {self._named(guard.without(v) * -c)}"
        return f"{self._named(guard)} >= 0"

    def _named(self, form: Aff) -> str:
        return spoken(self.engine, form, {self.j: "j", self.n: "i"})

    def _holds(self, a: Access, v: int) -> bool:
        return any(v in self.space.vars(i) for i in a[1])

    def assign_roles(self) -> None:
        if not (poly := self.main.poly).is_const:
            if self.space.vars(poly) not in ({self.n}, {self.j}):  # of both it is a distance
                raise Refused(
                    "separable",
                    "factors that are tensors",
                    f"a factor {self._named(poly)} of positions",
                    Progress.FACTORS,
                )
            self.main = self.engine.counted(self.main)
        accs = self.main.accs
        for a in accs:
            if self._holds(a, self.j) and self._holds(a, self.n):
                kind = self.engine.leaves[a[0]].kind
                label = kind.label if isinstance(kind, Opaque) else "a function of both positions"
                raise Refused(
                    "separable", "weights exp(G_i - G_j)", f"a factor holding both positions: {label}", Progress.FACTORS
                )
        with_j = [a for a in accs if self._holds(a, self.j)]
        with_d = [a for a in accs if any(self._holds(a, d) for d in self.features)]
        weights = [a for mono in self._monos() for a in mono]
        free = [d for d in range(len(self.shape)) if d != self.n and self.shape[d] != ONE]
        query_side = [a for a in accs if not self._holds(a, self.j) or a in with_d]
        value_only = [
            d
            for d in free
            if any(self._holds(a, d) for a in with_j)
            and not any(self._holds(a, d) for a in query_side if self._holds(a, self.n) and a in with_d)
            and not any(self._holds(a, d) for a in with_j if a in with_d)
            and not any(self._holds(a, d) for a in weights)
        ]
        self.e = value_only[-1] if value_only else None
        batch_like = [d for d in range(len(self.shape)) if d not in (self.n, self.e)]
        if self.e is None and len(batch_like) > 1 and self.shape[batch_like[-1]] == ONE:
            self.e_dim: int | None = batch_like.pop()  # a value of one feature: its dimension holds no index
        else:
            self.e_dim = self.e
        roles: dict[int, Aff] = {r: self.shape[d] for r, d in enumerate(batch_like)}
        place = dict(enumerate(batch_like))
        roles[N_ROLE], place[N_ROLE] = self.shape[self.n], self.n
        self.rename: dict[int, Aff] = {d: Aff.var(r) for r, d in enumerate(batch_like) if self.shape[d] != ONE}
        self.rename[self.n] = Aff.var(N_ROLE) - int(self.later)  # factors of a row stay those of the row that reads
        self.rename[self.j] = Aff.var(N_ROLE)
        for n, (d, (low, length)) in enumerate(self.features.items()):
            roles[D_ROLE + n] = length
            self.rename[d] = Aff.var(D_ROLE + n) + low
        if self.e_dim is not None:
            roles[E_ROLE], place[E_ROLE] = self.shape[self.e_dim], self.e_dim
            if self.e is not None:
                self.rename[self.e] = Aff.var(E_ROLE)
        self.proof = Proof(
            self.known,
            roles,
            list(range(len(batch_like))),
            place,
            self.later,
            scale=self.main.coef,
            first=self.first,
            shapes=self.engine.leaf_shapes,
        )

    def _monos(self) -> Iterable[Mono]:
        for mono, _ in self.main.exp.lin:
            yield mono
        for (mono, _), _ in self.main.exp.sums:
            yield mono

    def _renamed(self, a: Access) -> Access:
        return sub_access(self.space, a, self.rename)

    def sort_factors(self) -> None:
        p = self.proof
        for a in self.main.accs:
            with_d = any(self._holds(a, d) for d in self.features)
            with_e = self.e is not None and self._holds(a, self.e)
            if with_d and with_e:
                raise Refused(
                    "separable",
                    "keys and values in separate tensors",
                    "one factor with both features",
                    Progress.FACTORS,
                )
            of_token = p.v if with_e or self._of_values(a, with_d) else p.k
            into = of_token if self._holds(a, self.j) else p.q if with_d else p.outer
            into.append(self._renamed(a))
        numbers = [a for a in p.outer if not self.engine.leaves.tensors([a])]
        if p.q:
            # A number scales the queries, as it did in the program: sums that it keeps small may not fit their format.
            p.q, p.outer = [*p.q, *numbers], [a for a in p.outer if a not in numbers]
        if not self.features:
            # One key feature: what depends on i is the query, what depends on j alone the key.
            p.q = [a for a in p.outer if self._has_role(a, N_ROLE) and not self._has_role(a, E_ROLE)]
            p.outer = [a for a in p.outer if a not in p.q]

    def _of_values(self, a: Access, with_d: bool) -> bool:
        """Whether a weight of each token has heads that values have and keys share: keys would become as many."""

        def heads(of: Iterable[Access]) -> set[int]:
            held = {v for _, idx in of for v in self.space.vars_of(idx)}
            return held.intersection(range(MAX_DIMS)) - {self.n, self.e}

        if with_d or self.e is None or not self.features:
            return False
        tokens = [b for b in self.main.accs if self._holds(b, self.j)]
        keys = heads(b for b in tokens if any(self._holds(b, d) for d in self.features))
        values = heads(b for b in tokens if self._holds(b, self.e))
        own = heads([a])
        return not own <= keys and own <= values

    def check_operands(self) -> None:
        p = self.proof
        if self.main.accs and (not (p.q or p.q_weights) or not (p.k or p.k_weights or p.v)):
            raise Refused("separable", "queries and keys", "a plain decayed sum without queries", Progress.NAMED)

    def _has_role(self, a: Access, role: int) -> bool:
        return any(role in self.space.vars(i) for i in a[1])

    def _renamed_mono(self, mono: Mono) -> Mono:
        return tuple(sorted(self._renamed(a) for a in mono))
