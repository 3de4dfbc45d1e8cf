"""Which values are decayed attentions: the obligations of design section 1, checked one by one on the normal form.

Every obligation that fails is a :class:`~lacompile.passes.facts.Refusal` naming it. Their ids, in the order checked:

    one-case       the value is one sum, not a piecewise mask
    causal-range   one sequence index j, running over 0 <= j <= i and nothing else
    whole-features feature indices are summed in full
    separable      no leaf holds both i and j, none both kinds of feature
    decay          the weight is exp(G_i - G_j) with G from head- or token-wise scalars
    unit-diagonal  the weight is 1 at j = i (times a constant scale)
    single-term    nothing else is added, but an initial state and a residual without a sum
    recurrence     keys and values are not computed from the state (found where another fails, see causes.py)
    bounded-weights  a weight of the keys does not overflow where the program's own weight is finite
    emission       every factor can be read off a value of the graph
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from .affine import ONE, Aff
from .engine import Engine
from .interpret import Fact
from .leaves import NINE_DIGITS, Opaque, Table
from .proof import D_ROLE, E_ROLE, N_ROLE, Proof, Refused, at_position
from .step import prove_step
from .term import Access, Exponent, Mono, Term, sub_access

LARGEST_EXPONENT = 80.0  # exp of it is finite in float32 and bfloat16


def prove(engine: Engine, fact: Fact, explained: set[int] | None = None) -> Proof:
    """The decayed attention that this value is.

    Raises:
        Refused: an obligation does not hold.
    """
    if not fact.value.single:
        raise Refused("one-case", "one sum", f"{len(fact.value.cases)} disjoint regions", 0)
    terms = [_windows_as_features(engine, t) for t in fact.value.terms]
    if not any(sequence_index(engine, t) for t in terms) and (step := prove_step(engine, fact, terms)) is not None:
        return step
    main = _main_term(engine, terms, set() if explained is None else explained)
    return _Prover(engine, fact, main, [t for t in terms if t is not main]).run()


def _windows_as_features(engine: Engine, t: Term) -> Term:
    """An index over a window of constant length, k[.., 48 h + d], counts from the start of the window."""
    for v in sorted(t.bound(engine.space)):
        ends = engine.bounds(v, t.guards)
        if ends.other or len(ends.low) != 1 or len(ends.high) != 1 or ends.low[0].is_const:
            continue
        if engine.space.is_size(ends.high[0] - ends.low[0]):
            t = t.sub(engine.space, {v: Aff.var(v) + ends.low[0]})
    return t


def _main_term(engine: Engine, terms: Sequence[Term], explained: set[int]) -> Term:
    """The term with a sum over earlier positions; ``explained`` collects culprits that need no second word."""
    found = [t for t in terms if sequence_index(engine, t) is not None]
    if len(found) == 1:
        return found[0]
    if found:
        raise Refused(
            "single-term",
            "one sum over j <= i",
            f"{len(found)} sums that do not merge",
            2,
            "pieces of a loop merge only if their weights agree exactly at the borders",
        )
    explain_missing(engine, terms, explained)
    raise Refused("causal-range", "a sum over j <= i", "no sum whose range ends at a position", 0)


def explain_missing(engine: Engine, terms: Sequence[Term], explained: set[int]) -> None:
    """Weights over earlier positions that the lift could not look into: W[.., i, j] times v[.., j, e].

    Each such tensor is explained once: what follows it in the program holds it too.
    """
    for t in terms:
        for v in sorted(t.bound(engine.space)):
            holders = [a for a in t.accs if any(v in engine.space.vars(i) for i in a[1])]
            for leaf, idx in holders:
                kind, sizes = engine.leaves[leaf].kind, engine.leaf_shapes[leaf]
                summed = [n for n, i in enumerate(idx) if i == Aff.var(v)]
                square = [
                    n
                    for n, i in enumerate(idx)
                    if n not in summed and i.terms and summed and sizes[n] == sizes[summed[0]]
                ]
                mine = engine.space.vars_of(idx)
                features = {x for a in holders if a[0] != leaf for x in engine.space.vars_of(a[1]) if x >= 0} - mine
                if len(holders) < 2 or not square or not features or _given(engine, leaf) or leaf in explained:
                    continue
                explained.add(leaf)
                label = kind.label if isinstance(kind, Opaque) else "a function"
                raise Refused(
                    "separable",
                    "weights exp(G_i - G_j) that are visible in the graph",
                    f"a tensor that holds both positions ({label.lstrip('_')})",
                    1,
                    "softmax and other functions of the scores are not decayed linear attention",
                )


def _given(engine: Engine, leaf: int) -> bool:
    """Numbers, an input, or something made of parameters alone: no function of the scores."""
    kind = engine.leaves[leaf].kind
    if not isinstance(kind, Opaque):
        return isinstance(kind, Table)
    is_input = kind.node is not None and kind.node.op == "placeholder"
    return is_input or (bool(kind.of) and all(engine.leaves[s].parameter for s in kind.of))


def sequence_index(engine: Engine, t: Term) -> tuple[int, int] | None:
    """(bound index, free dimension) where a guard ties the range of the one to the other."""
    for g in sorted(t.guards):
        bound = [v for v in engine.space.vars(g) if v < 0]
        free = [v for v in engine.space.vars(g) if 0 <= v < 100]
        if len(bound) == 1 and free:
            return bound[0], free[0]
    return None


class _Prover:
    def __init__(self, engine: Engine, fact: Fact, main: Term, rest: list[Term]):
        self.engine, self.space, self.fact = engine, engine.space, fact
        self.main, self.rest = main, rest
        self.shape = fact.value.shape

    def run(self) -> Proof:
        found = sequence_index(self.engine, self.main)
        assert found is not None
        self.j, self.n = found
        self._check_ranges()
        self._assign_roles()
        self._sort_factors()
        self._sort_weights()
        self._check_operands()
        self._check_finite()
        for t in self.rest:
            self._other_term(t)
        return self.proof

    # ---------------------------------------------------------------------------------------------------- obligations

    def _check_ranges(self) -> None:
        j, i = Aff.var(self.j), Aff.var(self.n)
        bound = self.main.bound(self.space)
        about_j = {g for g in self.main.guards if self.j in self.space.vars(g)}
        self.later = about_j == {j, i - j - 1}
        if self.later:  # a sum over earlier positions, i included, is what the next position reads
            self.main = self._one_later(self.main)
            about_j = {j, i - j}
        if about_j != {j, i - j}:
            found = ", ".join(self._spoken(g) for g in sorted(about_j))
            raise Refused("causal-range", "0 <= j <= i or 0 <= j < i", found, 3)
        self.features: dict[int, tuple[int, Aff]] = {}
        for d in sorted(bound - {self.j}, reverse=True):
            ends = self.engine.bounds(d, self.main.guards)
            if (
                ends.other
                or len(ends.low) != 1
                or len(ends.high) != 1
                or not ends.low[0].is_const
                or not self.space.is_size(ends.high[0])
            ):
                raise Refused("whole-features", "feature sums over constant ranges", f"index {Aff.var(d)}", 3)
            self.features[d] = (int(ends.low[0].const), ends.high[0] - ends.low[0] + 1)
        loose = {g for g in self.main.guards - about_j if not any(g.coef(d) for d in self.features)}
        if loose:
            raise Refused(
                "causal-range",
                "every position of the result computed the same way",
                "only where " + " and ".join(self._spoken(g) for g in sorted(loose)),
                3,
            )
        if len(self.features) > 4:
            raise Refused("whole-features", "at most four feature indices", f"{len(self.features)}", 3)

    def _one_later(self, t: Term) -> Term:
        """The term at the position after i."""
        return t.sub(self.space, {self.n: Aff.var(self.n) + 1})

    def _spoken(self, guard: Aff) -> str:
        """A guard as an end of the range of j where it is one: ``j <= i + 3``."""
        c = guard.coef(self.j)
        end = guard.without(self.j) * -c
        text = f"j {'>=' if c > 0 else '<='} {end}" if abs(c) == 1 else f"{guard} >= 0"
        return text.replace(f"j{-self.j}", "j").replace(f"x{self.n}", "i")

    def _holds(self, a: Access, v: int) -> bool:
        return any(v in self.space.vars(i) for i in a[1])

    def _assign_roles(self) -> None:
        accs = self.main.accs
        if not self.main.poly.is_const:
            raise Refused("separable", "factors that are tensors", f"a factor {self.main.poly} of positions", 4)
        for a in accs:
            if self._holds(a, self.j) and self._holds(a, self.n):
                kind = self.engine.leaves[a[0]].kind
                label = kind.label if isinstance(kind, Opaque) else "a function of both positions"
                raise Refused("separable", "weights exp(G_i - G_j)", f"a factor holding both positions: {label}", 4)
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
            self.fact,
            roles,
            list(range(len(batch_like))),
            place,
            self.later,
            scale=self.main.coef,
            shapes=self.engine.leaf_shapes,
        )

    def _monos(self) -> Iterable[Mono]:
        for mono, _ in self.main.exp.lin:
            yield mono
        for (mono, _), _ in self.main.exp.sums:
            yield mono

    def _renamed(self, a: Access) -> Access:
        return sub_access(self.space, a, self.rename)

    def _sort_factors(self) -> None:
        p = self.proof
        for a in self.main.accs:
            with_d = any(self._holds(a, d) for d in self.features)
            with_e = self.e is not None and self._holds(a, self.e)
            if with_d and with_e:
                raise Refused("separable", "keys and values in separate tensors", "one factor with both features", 4)
            into = (p.v if with_e else p.k) if self._holds(a, self.j) else p.q if with_d else p.outer
            into.append(self._renamed(a))
        if not self.features:
            # One key feature: what depends on i is the query, what depends on j alone the key.
            p.q = [a for a in p.outer if self._has_role(a, N_ROLE) and not self._has_role(a, E_ROLE)]
            p.outer = [a for a in p.outer if a not in p.q]

    def _check_operands(self) -> None:
        p = self.proof
        if self.main.accs and (not (p.q or p.q_weights) or not (p.k or p.k_weights or p.v)):
            raise Refused("separable", "queries and keys", "a plain decayed sum without queries", 1)

    def _has_role(self, a: Access, role: int) -> bool:
        return any(role in self.space.vars(i) for i in a[1])

    # ------------------------------------------------------------------------------------------------------- weights

    def _sort_weights(self) -> None:
        i, j = self.n, self.j
        for mono, f in self.main.exp.lin:
            holders = set().union(*(self.space.vars(x) for _, idx in mono for x in idx), set()) | self.space.vars(f)
            if holders & set(self.features) or (self.e is not None and self.e in holders):
                self._feature_weight(mono, f, holders)
            elif not mono:
                self._constant_weight(f)
            elif i not in holders and j not in holders:
                if not f.is_const:
                    raise Refused("decay", "a weight of i - j", f"an exponent times {f}", 5)
                raise Refused("unit-diagonal", "weight 1 at j = i", "a weight off by a power of the decay", 5)
            elif f.is_const:
                if i in holders and j in holders:
                    raise Refused("separable", "weights exp(G_i - G_j)", "an exponent holding both positions", 4)
                into = self.proof.outer_weights if i in holders else self.proof.k_weights
                into.append((self._renamed_mono(mono), float(f.const)))
            else:
                self._fixed_decay(mono, f)
        self._token_decays()

    def _check_finite(self) -> None:
        """exp(I_j - m_i) is finite where exp(I_j) is not: a key's weight must be bounded without the row's."""
        if not self.proof.outer_weights:
            return
        for mono, c in self.proof.k_weights:
            low, high = -math.inf, math.inf
            if len(mono) == 1:
                leaf = self.engine.leaves[mono[0][0]]
                low, high = leaf.interval
                self.proof.looked_at |= leaf.rests_on
            if max(c * low, c * high) > LARGEST_EXPONENT:
                raise Refused(
                    "bounded-weights",
                    "a weight of the keys that is finite by itself",
                    "an exponential gate that a factor of the row (a running maximum) keeps finite",
                    5,
                    "apart, the exponential of the gate may overflow where the stabilised one does not",
                )

    def _feature_weight(self, mono: Mono, f: Aff, holders: set[int] | frozenset[int]) -> None:
        """exp of plain data (a feature map) is a factor of its side; a decay that differs by feature is refused."""
        if not f.is_const or (self.n in holders and self.j in holders):
            raise Refused("decay", "one decay per head", "a decay that differs by feature channel", 5)
        with_e = self.e is not None and self.e in holders
        if self.j in holders and not with_e:
            self.proof.k_weights.append((self._renamed_mono(mono), float(f.const)))
        elif self.n in holders and not with_e:
            self.proof.q_weights.append((self._renamed_mono(mono), float(f.const)))
        else:
            raise Refused("decay", "one decay per head", "an exponential of a value feature", 5)

    def _constant_weight(self, f: Aff) -> None:
        step = f.coef(self.n)
        if f != Aff.var(self.n) * step - Aff.var(self.j) * step + f.const:
            raise Refused("decay", "a weight of i - j", f"exp({f})", 5)
        if step:
            self.proof.fixed.append(((), float(step)))
        self.proof.scale *= math.exp(f.const)

    def _fixed_decay(self, mono: Mono, f: Aff) -> None:
        step = f.coef(self.n)
        shape = Aff.var(self.n) * step - Aff.var(self.j) * step
        if f.without(self.n).without(self.j).terms or f - f.const != shape or not step:
            raise Refused("decay", "a weight of i - j", f"an exponent times {f}", 5)
        if any(self.space.vars(x) & {self.n, self.j} for _, idx in mono for x in idx):
            raise Refused("decay", "one decay per head", "a slope that differs by position", 5)
        if f.const and not self.later:
            raise Refused("unit-diagonal", "weight 1 at j = i", f"a weight off by {f.const} steps of the decay", 5)
        if f.const:  # the decay of the row that reads, where that comes before it reads
            self.proof.q_weights.append((self._renamed_mono(mono), float(f.const)))
        self.proof.fixed.append((self._renamed_mono(mono), float(step)))

    def _token_decays(self) -> None:
        groups: dict[Mono, dict[Aff, float]] = {}
        for (mono, pos), c in self.main.exp.sums:
            groups.setdefault(mono, {})[pos] = c
        for mono, ends in groups.items():
            up, down = Aff.var(self.n) + 1, Aff.var(self.j) + 1
            holders = set().union(*(self.space.vars(x) for _, idx in mono for x in idx), set())
            if holders & set(self.features) or (self.e is not None and self.e in holders):
                raise Refused("decay", "one decay per head", "a decay that differs by feature channel", 5)
            own = self.later and set(ends) == {up + 1, down}  # the row that reads has decayed by then
            if own:
                ends[up] = ends.pop(up + 1)
                self.proof.q_weights.append((self._renamed_mono(at_position(mono)), float(ends[up])))
            if set(ends) != {up, down} or abs(ends[up] + ends[down]) > 1e-9:
                shown = ", ".join(f"{c:+g} P({p})" for p, c in ends.items())
                raise Refused("unit-diagonal", "prefix sums P(i+1) - P(j+1)", shown, 5)
            if holders & {self.n, self.j}:
                raise Refused("decay", "one decay per token", "a decay that depends on both positions", 5)
            self.proof.tokens.append((self._renamed_mono(at_position(mono)), float(ends[up])))

    def _renamed_mono(self, mono: Mono) -> Mono:
        return tuple(sorted(self._renamed(a) for a in mono))

    # --------------------------------------------------------------------------------------------------- other terms

    def _other_term(self, t: Term) -> None:
        if sequence_index(self.engine, t) is None and self._is_state_term(t):
            return
        plain = t.poly.is_const and not t.exp.sums and all(f.is_const for _, f in t.exp.lin)
        if plain and (summed := self._over_features(t)) is not None:
            self.proof.residual.append(summed)
            return
        raise Refused("single-term", "one sum over j <= i (and an initial state)", f"also {self._spoken_term(t)}", 6)

    def _over_features(self, t: Term) -> Term | None:
        """A plain term, summed indices among the key features.

        ``q (z + eps)`` adds the sum of each row of q, a weight of its own for each token ``(q u k) v``.
        """
        left = {n: length for n, (_, length) in enumerate(self.features.values())}
        mapping: dict[int, Aff] = {}
        ranges: set[Aff] = set()
        for v in t.bound(self.space):
            ends = self.engine.bounds(v, t.guards)
            if ends.other or len(ends.low) != 1 or len(ends.high) != 1 or not ends.low[0].is_const:
                return None
            (low,), (high,) = ends.low, ends.high
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
        """exp(G_i) q_i S_init: the weight is the main one at j = -1 times a number, the query the same."""
        t = self._one_later(t) if self.later else t
        expected = self._without_keys(self.main.exp).sub(self.space, {self.j: Aff.lit(-1)})
        if self.proof.state is not None or not t.poly.is_const:
            return False
        bound = t.bound(self.space)
        queries = [a for a in t.accs if any(self._same_query(a, b, bound) for b in self._main_queries())]
        states = [a for a in t.accs if a not in queries]
        mapping = self._feature_map(t, [*queries, *_factors_by_exp(t)])
        if mapping is None or not states:
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
        if abs(ratio - 1) > NINE_DIGITS:
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

    def _same_query(self, a: Access, b: Access, bound: frozenset[int] | set[int]) -> bool:
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
                if not self._same_query(a, b, set()):
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
