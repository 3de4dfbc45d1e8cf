"""Which values are decayed attentions: the obligations of design section 1, checked one by one on the normal form.

Every obligation that fails is a :class:`~lacompile.passes.facts.Refusal` naming it. Their ids, in the order checked:

    one-case       the value is one sum, not a piecewise mask
    causal-range   one sequence index j, running over 0 <= j <= i and nothing else
    whole-features feature indices are summed in full
    separable      no leaf holds both i and j, none both kinds of feature
    decay          the weight is exp(G_i - G_j) with G from head- or token-wise scalars
    unit-diagonal  the weight is 1 at j = i (times a constant scale)
    single-term    nothing else is added, but an initial state and a residual without a sum
    emission       every factor can be read off a value of the graph
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

from ..facts import Assumption, Attend, Call, Const, DecayedAttention, Expr, Match, Refusal, values_of
from ..names import spoken
from .affine import FIRST_DIV, ONE, TAU, ZERO, Aff
from .emit import CannotEmit, Emitter, Piece, cast
from .engine import Engine
from .interpret import Fact, Interpreter
from .leaves import Argument, Opaque, Symbol, Table
from .term import Access, Exponent, Mono, Term, sub_access

aten = torch.ops.aten

N_ROLE, D_ROLE, E_ROLE = 90, 91, 95  # positions, key features (91..94), value features; below 90: batch and heads


class Refused(Exception):
    """An obligation that does not hold; caught by the search and turned into a Refusal."""

    def __init__(self, obligation: str, expected: str, found: str, progress: int, hint: str = ""):
        super().__init__(found)
        self.obligation, self.expected, self.found = obligation, expected, found
        self.progress, self.hint = progress, hint


@dataclass
class Proof:
    """A decayed attention read off one value, its accesses over role variables."""

    fact: Fact
    roles: dict[int, Aff]  # batch-like roles first, then N_ROLE, the key features, E_ROLE
    batch_like: list[int]
    place: dict[int, int]  # role -> dimension of the target (features of keys have none)
    q: list[Access] = field(default_factory=list)
    k: list[Access] = field(default_factory=list)
    v: list[Access] = field(default_factory=list)
    q_weights: list[tuple[Mono, float]] = field(default_factory=list)
    k_weights: list[tuple[Mono, float]] = field(default_factory=list)
    outer: list[Access] = field(default_factory=list)
    outer_weights: list[tuple[Mono, float]] = field(default_factory=list)
    fixed: list[tuple[Mono, float]] = field(default_factory=list)
    tokens: list[tuple[Mono, float]] = field(default_factory=list)
    scale: float = 1.0
    state: list[Access] | None = None
    residual: list[Term] = field(default_factory=list)
    shapes: dict[int, tuple[Aff, ...]] = field(default_factory=dict)

    @property
    def size(self) -> tuple[Aff, int]:
        """The length, and the number of elements of the value as far as they are numbers."""
        sizes = [int(n.const) for n in self.fact.value.shape if n.is_const]
        return self.roles[N_ROLE], math.prod(sizes)

    @property
    def is_part(self) -> bool:
        """Whether each operand is read in a part of its length only."""
        length = self.roles[N_ROLE]
        return all(self._position_size(a) not in (None, length) for a in (*self.q, *self.k, *self.v))

    def _position_size(self, a: Access) -> Aff | None:
        at = [n for n, i in enumerate(a[1]) if i.coef(N_ROLE)]
        return self.shapes[a[0]][at[0]] if at else None

    @property
    def leaves(self) -> set[int]:
        return {a[0] for a in (*self.q, *self.k, *self.v, *self.outer)}

    @property
    def key_features(self) -> list[int]:
        return [r for r in self.roles if D_ROLE <= r < E_ROLE]


def prove(engine: Engine, fact: Fact, explained: set[int] | None = None) -> Proof:
    """The decayed attention that this value is.

    Raises:
        Refused: an obligation does not hold.
    """
    if not fact.value.single:
        raise Refused("one-case", "one sum", f"{len(fact.value.cases)} disjoint regions", 0)
    terms = [_windows_as_features(engine, t) for t in fact.value.terms]
    main = _main_term(engine, terms, set() if explained is None else explained)
    return _Prover(engine, fact, main, [t for t in terms if t is not main]).run()


def _windows_as_features(engine: Engine, t: Term) -> Term:
    """An index over a window of constant length, k[.., 48 h + d], counts from the start of the window."""
    for v in sorted(t.bound(engine.space)):
        ends = engine.bounds(v, t.guards)
        if ends.other or len(ends.low) != 1 or len(ends.high) != 1 or ends.low[0].is_const:
            continue
        if (ends.high[0] - ends.low[0]).is_const:
            t = t.sub(engine.space, {v: Aff.var(v) + ends.low[0]})
    return t


def _main_term(engine: Engine, terms: Sequence[Term], explained: set[int]) -> Term:
    """The term with a sum over earlier positions; ``explained`` collects culprits that need no second word."""
    found = [t for t in terms if _sequence_index(engine, t) is not None]
    if len(found) == 1:
        return found[0]
    if found:
        raise Refused(
            "single-term",
            "one sum over j <= i",
            f"{len(found)} sums that do not merge: {found[0]!r} and {found[1]!r}",
            2,
            "pieces of a loop merge only if their weights agree exactly at the borders",
        )
    _explain_missing(engine, terms, explained)
    raise Refused("causal-range", "a sum over j <= i", "no sum whose range ends at a position", 0)


def _explain_missing(engine: Engine, terms: Sequence[Term], explained: set[int]) -> None:
    """Weights over earlier positions that the lift could not look into: W[.., i, j] times v[.., j, e].

    Each such tensor is explained once: what follows it in the program holds it too.
    """
    for t in terms:
        for v in sorted(t.bound(engine.space)):
            holders = [a for a in t.accs if any(v in engine.space.vars(i) for i in a[1])]
            for leaf, idx in holders:
                kind, sizes = engine.leaves[leaf].kind, engine.leaf_shapes[leaf]
                summed = [n for n, i in enumerate(idx) if i == Aff.var(v)]
                square = [n for n, i in enumerate(idx) if n not in summed and i.terms and summed and sizes[n] == sizes[summed[0]]]
                given = isinstance(kind, Table) or (isinstance(kind, Opaque) and kind.node is not None and kind.node.op == "placeholder")
                if len(holders) < 2 or not square or given or leaf in explained:
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


def _sequence_index(engine: Engine, t: Term) -> tuple[int, int] | None:
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
        found = _sequence_index(self.engine, self.main)
        assert found is not None
        self.j, self.n = found
        self._check_ranges()
        self._assign_roles()
        self._sort_factors()
        self._sort_weights()
        for t in self.rest:
            self._other_term(t)
        return self.proof

    # ---------------------------------------------------------------------------------------------------- obligations

    def _check_ranges(self) -> None:
        j, i = Aff.var(self.j), Aff.var(self.n)
        bound = self.main.bound(self.space)
        about_j = {g for g in self.main.guards if self.j in self.space.vars(g)}
        if about_j != {j, i - j}:
            found = ", ".join(f"{g} >= 0" for g in sorted(about_j)).replace(f"j{-self.j}", "j").replace(f"x{self.n}", "i")
            hint = "the diagonal is left out" if i - j - 1 in about_j else ""
            raise Refused("causal-range", "0 <= j <= i", found, 3, hint)
        self.features: dict[int, tuple[int, int]] = {}
        for d in sorted(bound - {self.j}, reverse=True):
            ends = self.engine.bounds(d, self.main.guards)
            if (
                ends.other
                or len(ends.low) != 1
                or len(ends.high) != 1
                or not ends.low[0].is_const
                or not ends.high[0].is_const
            ):
                raise Refused("whole-features", "feature sums over constant ranges", f"index {Aff.var(d)}", 3)
            self.features[d] = (int(ends.low[0].const), int(ends.high[0].const))
        loose = {g for g in self.main.guards - about_j if not any(g.coef(d) for d in self.features)}
        if loose:
            raise Refused(
                "causal-range",
                "every position of the result computed the same way",
                "only where " + " and ".join(f"{g} >= 0" for g in sorted(loose)),
                3,
            )
        if len(self.features) > 4:
            raise Refused("whole-features", "at most four feature indices", f"{len(self.features)}", 3)

    def _holds(self, a: Access, v: int) -> bool:
        return any(v in self.space.vars(i) for i in a[1])

    def _assign_roles(self) -> None:
        accs = self.main.accs
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
        self.rename[self.n] = Aff.var(N_ROLE)
        self.rename[self.j] = Aff.var(N_ROLE)
        for n, (d, (low, high)) in enumerate(self.features.items()):
            roles[D_ROLE + n] = Aff.lit(high - low + 1)
            self.rename[d] = Aff.var(D_ROLE + n) + low
        if self.e_dim is not None:
            roles[E_ROLE], place[E_ROLE] = self.shape[self.e_dim], self.e_dim
            if self.e is not None:
                self.rename[self.e] = Aff.var(E_ROLE)
        self.proof = Proof(self.fact, roles, list(range(len(batch_like))), place, scale=self.main.coef, shapes=self.engine.leaf_shapes)

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
            into = (
                (p.v if with_e else p.k)
                if self._holds(a, self.j)
                else p.q
                if with_d
                else p.outer
            )
            into.append(self._renamed(a))
        if not self.features:
            # One key feature: what depends on i is the query, what depends on j alone the key.
            p.q = [a for a in p.outer if self._has_role(a, N_ROLE) and not self._has_role(a, E_ROLE)]
            p.outer = [a for a in p.outer if a not in p.q]
        if not p.q or not (p.k or p.v):
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
        if f.const:
            raise Refused("unit-diagonal", "weight 1 at j = i", f"a weight off by {f.const} steps of the decay", 5)
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
            if set(ends) != {up, down} or abs(ends[up] + ends[down]) > 1e-9:
                shown = ", ".join(f"{c:+g} P({p})" for p, c in ends.items())
                raise Refused("unit-diagonal", "prefix sums P(i+1) - P(j+1)", shown, 5)
            if holders & {self.n, self.j}:
                raise Refused("decay", "one decay per token", "a decay that depends on both positions", 5)
            self.proof.tokens.append((self._renamed_mono(_at_position(mono)), float(ends[up])))

    def _renamed_mono(self, mono: Mono) -> Mono:
        return tuple(sorted(self._renamed(a) for a in mono))

    # --------------------------------------------------------------------------------------------------- other terms

    def _other_term(self, t: Term) -> None:
        if _sequence_index(self.engine, t) is None and self._is_state_term(t):
            return
        if not t.bound(self.space) and not t.guards and t.poly.is_const and not t.exp.sums:
            if all(f.is_const for _, f in t.exp.lin):
                self.proof.residual.append(t)
                return
        raise Refused("single-term", "one sum over j <= i (and an initial state)", f"also {t!r}", 6)

    def _is_state_term(self, t: Term) -> bool:
        """exp(G_i) q_i S_init: the weight is the main one at j = -1, the query the same."""
        wanted = self.main.exp.sub(self.space, {self.j: Aff.lit(-1)})
        expected = self._without_keys(wanted)
        if not _same_exponent(t.exp, expected) or t.coef != self.main.coef:
            return False
        bound = t.bound(self.space)
        queries = [a for a in t.accs if any(self._same_query(a, b, bound) for b in self._main_queries())]
        states = [a for a in t.accs if a not in queries]
        mapping = self._feature_map(t, queries)
        if mapping is None or not states:
            return False
        if any(self._holds(a, self.n) for a in states):
            return False
        rename = {**self.rename, **mapping}
        renamed = [sub_access(self.space, a, rename) for a in states]
        seen = sorted(sub_access(self.space, a, rename) for a in queries)
        if seen != sorted([*self.proof.q, *self.proof.outer]):
            return False
        if self._extra_guards(t, mapping):
            return False
        self.proof.state = renamed
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

    def _same_query(self, a: Access, b: Access, bound: set[int]) -> bool:
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
        for a in queries:
            for b in self._main_queries():
                if not self._same_query(a, b, set()):
                    continue
                for x, y in zip(a[1], b[1], strict=True):
                    bound = [(v, c) for v, c in x.terms if v < 0]
                    if len(bound) != 1 or bound[0][1] != 1:
                        continue
                    v = bound[0][0]
                    out.setdefault(v, self.space.sub(y, self.rename) - self.space.sub(x.without(v), self.rename))
        return out if t.bound(self.space) <= out.keys() else None

    def _extra_guards(self, t: Term, mapping: dict[int, Aff]) -> bool:
        rename = {**self.rename, **mapping}
        mine = {self.space.sub(g, rename) for g in t.guards}
        theirs = {
            self.space.sub(g, self.rename) for g in self.main.guards if self.j not in self.space.vars(g)
        }
        return mine != theirs


def _at_position(mono: Mono) -> Mono:
    """The summand of a prefix sum at position i: the running position becomes the position role."""
    def at(a: Aff) -> Aff:
        c = a.coef(TAU)
        return a.without(TAU) + Aff.var(N_ROLE) * c if c else a

    return tuple((leaf, tuple(at(x) for x in idx)) for leaf, idx in mono)


def _same_exponent(a: Exponent, b: Exponent) -> bool:
    return a == b


# ---------------------------------------------------------------------------------------------------------- recipes


class Builder:
    """Turns a proof into the recipe that replaces its target."""

    def __init__(self, interpreter: Interpreter, held: dict[int, tuple[fx.Node, tuple[Aff, ...]]]):
        self.interpreter, self.engine, self.held = interpreter, interpreter.engine, held

    def build(self, p: Proof) -> tuple[DecayedAttention, Expr]:
        """The fact and the replacement.

        Raises:
            Refused: a factor cannot be read off the graph.
        """
        try:
            return self._build(p)
        except CannotEmit as e:
            raise Refused("emission", e.expected, e.found, 8) from None

    def _build(self, p: Proof) -> tuple[DecayedAttention, Expr]:
        everything = [*p.q, *p.k, *p.v, *p.outer, *(p.state or ())]
        for mono, _ in (*p.q_weights, *p.k_weights, *p.outer_weights, *p.fixed, *p.tokens):
            everything += mono
        target_of = {d: Aff.var(r) for r, d in p.place.items() if p.fact.value.shape[d] != ONE}
        residual = [t.sub(self.engine.space, target_of) for t in p.residual]
        for t in residual:
            everything += t.accs
            everything += [a for mono, _ in t.exp.lin for a in mono]
        like = self._some_node(p.q)
        self.emitter = Emitter(self.engine, p.roles, everything, self.held, like)
        heads, batch = self._head_roles(p)
        dtype = p.fact.compute
        groups_q = [batch, heads, [N_ROLE], p.key_features]
        e_group = [E_ROLE] if E_ROLE in p.roles else []
        q = self._operand(p.q, p.q_weights, groups_q, dtype, p)
        k = self._operand(p.k, p.k_weights, groups_q, dtype, p)
        v = self._operand(p.v, [], [batch, heads, [N_ROLE], e_group], dtype, p)
        log_decay, source = self._log_decay(p, batch, heads)
        state = None
        if p.state is not None:
            piece = self.emitter.product(p.state)
            assert piece is not None
            state = self.emitter.assemble(cast(piece, torch.float32), [batch, heads, p.key_features, e_group])
        fact = DecayedAttention(
            q=q,
            k=k,
            v=v,
            log_decay=log_decay,
            scale=p.scale,
            initial_state=state,
            batch=self._length(p, batch),
            heads=self._length(p, heads),
            length=self._length(p, [N_ROLE]),
            dk=int(math.prod(self._length(p, [d]) for d in p.key_features)),
            dv=int(self._length(p, e_group)),
            dtype=dtype,
            decay_per_token=bool(p.tokens),
            formulation=formulation(p, {x.node for e in (q, k, v) for x in values_of(e)}),
            decay_source=source,
            assumptions=tuple(self._assumptions(p, [q, k, v, log_decay, *([] if state is None else [state])])),
        )
        return fact, self._replacement(p, fact, batch, heads, e_group, residual)

    def _length(self, p: Proof, roles: Sequence[int]) -> Any:
        total: Any = 1
        for r in roles:
            size = p.roles[r]
            if size.is_const:
                total = total * int(size.const)
            else:
                total = total * p.fact.tensor.shape[p.place[r]]
        return total

    def _some_node(self, accesses: Sequence[Access]) -> fx.Node:
        for leaf, _ in accesses:
            kind = self.engine.leaves[leaf].kind
            if isinstance(kind, Opaque) and kind.node is not None:
                return kind.node
            if isinstance(kind, Symbol):
                for a in kind.args:
                    if isinstance(a, Argument):
                        try:
                            return self._some_node([(a.leaf, ())])
                        except CannotEmit:
                            continue
        raise CannotEmit("a value of the traced graph", "queries made of constants")

    def _head_roles(self, p: Proof) -> tuple[list[int], list[int]]:
        """Heads are the batch-like roles that a fixed decay depends on; without one, the innermost."""
        space = self.engine.space
        monos = [m for m, _ in (*p.fixed, *p.tokens)]
        used = {v for m in monos for _, idx in m for x in idx for v in space.vars(x)}
        if p.tokens:
            heads = p.batch_like[1:] if len(p.batch_like) > 1 else p.batch_like
        else:
            heads = [r for r in p.batch_like if r in used] or p.batch_like[-1:]
        return heads, [r for r in p.batch_like if r not in heads]

    def _operand(
        self,
        accesses: Sequence[Access],
        weights: Sequence[tuple[Mono, float]],
        groups: Sequence[Sequence[int]],
        dtype: torch.dtype,
        p: Proof,
    ) -> Expr:
        factors = [self.emitter.exponential(m, c) for m, c in weights]
        piece = self.emitter.product(accesses, factors)
        if piece is None:
            ones = Const(1.0, self.emitter.like, dtype)
            expr: Expr = ones
            for _ in self.emitter.order:
                expr = Call(torch.unsqueeze, (expr, 0))
            piece = Piece(expr, frozenset(), dtype)
        return self.emitter.assemble(cast(piece, dtype), groups, shrink=(1,))

    def _log_decay(self, p: Proof, batch: list[int], heads: list[int]) -> tuple[Expr, str]:
        total: Piece | None = None
        sources = []
        for mono, c in (*p.fixed, *p.tokens):
            piece = self.emitter.product(mono)
            if piece is None:
                expr: Expr = Const(c, self.emitter.like)
                for _ in self.emitter.order:
                    expr = Call(torch.unsqueeze, (expr, 0))
                piece = Piece(expr, frozenset(), torch.float32)
                sources.append(f"the constant {math.exp(c):.6g}")
            else:
                piece = cast(piece, torch.float32)
                if c != 1:
                    piece = Piece(Call(torch.mul, (piece.expr, c)), piece.present, piece.dtype)
                sources.append(self._named(mono, c))
            if total is None:
                total = piece
            else:
                total = Piece(Call(torch.add, (total.expr, piece.expr)), total.present | piece.present, torch.float32)
        if total is None:
            expr = Const(0.0, self.emitter.like)
            for _ in self.emitter.order:
                expr = Call(torch.unsqueeze, (expr, 0))
            total = Piece(expr, frozenset(), torch.float32)
            sources.append("none (un-decayed)")
        groups = [batch, heads, [N_ROLE]] if p.tokens else [heads]
        return self.emitter.assemble(total, groups), " + ".join(sources)

    def _named(self, mono: Mono, c: float) -> str:
        def name(leaf: int) -> str:
            kind = self.engine.leaves[leaf].kind
            if isinstance(kind, Opaque):
                return spoken(kind.node) if kind.node is not None else kind.label
            if isinstance(kind, Symbol):
                inner = ", ".join(name(a.leaf) for a in kind.args if isinstance(a, Argument))
                op = getattr(kind.op, "overloadpacket", kind.op)
                return f"{getattr(op, '__name__', op)}({inner})"
            return "a table of numbers"

        factors = " * ".join(name(leaf) for leaf, _ in mono)
        return factors if c == 1 else f"-{factors}" if c == -1 else f"{c:.6g} * {factors}"

    def _assumptions(self, p: Proof, operands: Sequence[Expr]) -> Iterable[Assumption]:
        """log(x) in a weight is the logarithm of a factor: right only where x > 0. And buffers that were read by value."""
        if self.interpreter.statics is not None:
            read = {v.node for e in operands for v in values_of(e)}
            yield from self.interpreter.statics.assumptions(sorted(read | sources_of(p.fact.node, read)))
        seen: set[int] = set()

        def visit(leaf: int) -> Iterable[Assumption]:
            if leaf in seen:
                return
            seen.add(leaf)
            kind = self.engine.leaves[leaf].kind
            if not isinstance(kind, Symbol):
                return
            children = [a.leaf for a in kind.args if isinstance(a, Argument)]
            if kind.op is aten.log.default and children and self.engine.leaves[children[0]].interval[0] <= 0:
                base = self.engine.leaves[children[0]].kind
                if not isinstance(base, Opaque) or base.node is None or base.node.op != "placeholder":
                    raise Refused(
                        "decay",
                        "a positive base of the decay",
                        "a computed base whose sign is not known",
                        6,
                        "write the decay as exp of a log-decay, or bound it with sigmoid",
                    )
                yield Assumption(
                    base.node, "positive", f"{spoken(base.node)} > 0 (it is the base of a power)", _all_positive
                )
            for c in children:
                yield from visit(c)

        for mono, _ in (*p.fixed, *p.tokens):
            for leaf, _ in mono:
                yield from visit(leaf)

    def _replacement(
        self, p: Proof, fact: DecayedAttention, batch: list[int], heads: list[int], e_group: list[int], residual: list[Term]
    ) -> Expr:
        """The operator's output in the target's dimensions, times row factors, plus residual terms."""
        expr: Expr = Attend(fact, 0)
        order: list[int] = []
        at = 0
        for group in (batch, heads, [N_ROLE], e_group):
            if not group:
                expr = Call(torch.squeeze, (expr, at))
                continue
            if len(group) > 1:
                sizes = [self._length(p, [r]) for r in group]
                if any(not isinstance(s, int) for s in sizes):
                    raise CannotEmit("known sizes", "several symbolic batch dimensions")
                expr = Call(torch.unflatten, (expr, at, sizes))
            order += group
            at += len(group)
        dims = [p.place[r] for r in order]
        permutation = [dims.index(d) for d in range(len(dims))]
        if permutation != list(range(len(permutation))):
            expr = Call(torch.permute, (expr, permutation))
        target_groups = [[r] for r in sorted(p.place, key=lambda r: p.place[r])]
        factors = [self.emitter.exponential(m, c) for m, c in p.outer_weights]
        outer = self.emitter.product(p.outer, factors)
        if outer is not None:
            expr = Call(torch.mul, (expr, self._in_target(outer, target_groups)))
        for t in residual:
            factors = [self.emitter.exponential(m, float(f.const)) for m, f in t.exp.lin if m]
            coef = t.coef * math.exp(sum(float(f.const) for m, f in t.exp.lin if not m))
            piece = self.emitter.product(t.accs, factors)
            added: Any = coef
            if piece is not None:
                added = self._in_target(piece, target_groups)
                if coef != 1:
                    added = Call(torch.mul, (added, coef))
            expr = Call(torch.add, (expr, added))
        return expr

    def _in_target(self, piece: Piece, groups: list[list[int]]) -> Expr:
        return self.emitter.assemble(piece, groups, shrink=range(len(groups)))




def sources_of(node: fx.Node, given: set[fx.Node]) -> set[fx.Node]:
    """The inputs of the graph that a value is computed from, other than through the ``given`` values."""
    seen: set[fx.Node] = set()
    work = [node]
    while work:
        at = work.pop()
        if at not in seen and at not in given:
            seen.add(at)
            work += at.all_input_nodes
    return {n for n in seen if n.op == "placeholder"}


def _all_positive(tensor: torch.Tensor) -> bool:
    return bool((tensor > 0).all())


def formulation(p: Proof, given: set[fx.Node]) -> Literal["parallel", "chunkwise", "recurrent"]:
    """How the program wrote it, between the ``given`` values and the result; for the report only."""
    length = p.roles[N_ROLE]
    steps, seen, work = 0, set(given), [p.fact.node]
    square = False
    while work:
        node = work.pop()
        if node in seen or node.op == "placeholder":
            continue
        seen.add(node)
        example = node.meta.get("example_value")
        if isinstance(example, torch.Tensor):
            sizes = [s for s in example.shape[-2:] if isinstance(s, int) and length.is_const and s == length.const]
            symbolic = [s for s in example.shape if not isinstance(s, int)]
            square |= len(sizes) >= 2 or len({str(s) for s in symbolic}) < len(symbolic)
            steps += 1
        work += node.all_input_nodes
    if not length.is_const or length.const <= 1:
        return "parallel" if square else "recurrent" if length.is_const else "chunkwise"
    if steps > 4 * length.const:
        return "recurrent"
    return "parallel" if square else "chunkwise"


# ----------------------------------------------------------------------------------------------------------- search

MAX_STEPS_BACK = 24


def held_symbols(interpreter: Interpreter) -> dict[int, tuple[fx.Node, tuple[Aff, ...]]]:
    """Graph nodes that hold a symbol leaf as it is, so that a rewrite refers to them instead of computing it again."""
    out: dict[int, tuple[fx.Node, tuple[Aff, ...]]] = {}
    for node, fact in interpreter.facts.items():
        t = fact.value.one
        if t is None or t.coef != 1 or len(t.accs) != 1 or t.exp or t.guards or not t.poly.is_const:
            continue
        leaf, idx = t.accs[0]
        if leaf in out or not isinstance(interpreter.engine.leaves[leaf].kind, Symbol):
            continue
        covered: set[int] = set()
        whole = True
        for n, a in enumerate(idx):
            if a.is_const:
                whole &= interpreter.engine.leaf_shapes[leaf][n] == ONE
            elif len(a.terms) == 1 and a.terms[0][1] == 1 and not a.const and a.terms[0][0] < FIRST_DIV:
                covered.add(a.terms[0][0])
                whole &= interpreter.engine.leaf_shapes[leaf][n] == fact.value.shape[a.terms[0][0]]
            else:
                whole = False
        if whole:
            out[leaf] = (node, idx)
    return out


def search(interpreter: Interpreter) -> tuple[list[Match], list[Refusal]]:
    """Every decayed attention among the values that something opaque consumes, and the reasons for the others."""
    builder = Builder(interpreter, held_symbols(interpreter))
    matches: list[Match] = []
    refusals: list[Refusal] = []
    proofs: list[tuple[Proof, DecayedAttention]] = []
    done: set[fx.Node] = set()
    states: list[Fact] = []
    explained: set[int] = set()
    for node in interpreter.demanded:
        fact = interpreter.facts[node]
        if node in done:
            continue
        best: Refusal | None = None
        if _looks_like_state(interpreter.engine, fact):
            states.append(fact)
            try:
                _explain_missing(interpreter.engine, fact.value.terms, explained)
            except Refused as r:
                refusals.append(Refusal("match", r.obligation, node, r.expected, r.found, r.hint, r.progress))
            continue
        frontier, seen, whole = [node], set(), fact.tensor.numel()
        while frontier and len(seen) < MAX_STEPS_BACK:
            at = frontier.pop(0)
            if at in seen or at in done:
                continue
            seen.add(at)
            fact = interpreter.facts.get(at)
            if fact is None or not interpreter.engine.contracts(fact.value):
                continue
            try:
                proof = prove(interpreter.engine, fact, explained)
                if best is not None and best.progress >= 2 and proof.is_part:
                    continue  # one chunk of a loop whose whole is something else
                attention, replacement = builder.build(proof)
            except Refused as r:
                refusal = Refusal("match", r.obligation, at, r.expected, r.found, r.hint, r.progress)
                size = fact.tensor.numel()
                if best is None or (refusal.progress > best.progress and size >= whole):
                    best = refusal
                if r.progress or len(seen) == 1:
                    frontier += at.all_input_nodes
                continue
            proof, attention, replacement = _closest(interpreter, builder, proof, attention, replacement)
            at = proof.fact.node
            if at not in done:
                matches.append(Match(at, replacement, (attention,), proof.fact.after))
                proofs.append((proof, attention))
            done.add(at)
            best = None
            break
        if best is not None and best.progress > 0:
            refusals.append(best)
    matches += _final_states(interpreter, states, proofs)
    return matches, sorted(refusals, key=lambda r: -r.progress)


def _closest(
    interpreter: Interpreter, builder: Builder, proof: Proof, attention: DecayedAttention, replacement: Expr
) -> tuple[Proof, DecayedAttention, Expr]:
    """The same attention at the earliest value that is it: before views, row factors and residuals."""
    work = list(proof.fact.node.all_input_nodes)
    seen: set[fx.Node] = set()
    while work and len(seen) < MAX_STEPS_BACK:
        at = work.pop(0)
        fact = interpreter.facts.get(at)
        if at in seen or fact is None or not interpreter.engine.contracts(fact.value):
            continue
        seen.add(at)
        try:
            earlier = prove(interpreter.engine, fact)
            if earlier.size != proof.size or not earlier.leaves <= proof.leaves:
                continue
            found, expr = builder.build(earlier)
        except Refused:
            continue
        proof, attention, replacement = earlier, found, expr
        work = list(at.all_input_nodes)
    return proof, attention, replacement


def _looks_like_state(engine: Engine, fact: Fact) -> bool:
    """A weighted sum of outer products over all positions: no position is left."""
    if not fact.value.single:
        return False
    return any(t.bound(engine.space) and _sequence_index(engine, t) is None for t in fact.value.terms) and not any(
        _sequence_index(engine, t) is not None for t in fact.value.terms
    )


def _final_states(
    interpreter: Interpreter, states: Sequence[Fact], proofs: Sequence[tuple[Proof, DecayedAttention]]
) -> list[Match]:
    out: list[Match] = []
    for fact in states:
        for proof, attention in proofs:
            expr = final_state(interpreter.engine, fact, proof, attention)
            if expr is not None:
                out.append(Match(fact.node, expr, (attention,), fact.after))
                break
    return out


def final_state(engine: Engine, fact: Fact, p: Proof, attention: DecayedAttention) -> Expr | None:
    """``fact`` as the state after the last position of a proved attention; None if it is not that state."""
    space, shape = engine.space, fact.value.shape
    real = [d for d in range(len(shape)) if shape[d] != ONE]
    features = len(p.key_features)
    has_e = E_ROLE in p.roles and p.roles[E_ROLE] != ONE
    if features > 1 or not fact.value.single:
        return None
    last = p.roles[N_ROLE] - 1
    for d in real if features and p.roles[D_ROLE] != ONE else [None]:
        for e in [x for x in real if x != d] if has_e else [None]:
            batch = [x for x in range(len(shape)) if x not in (d, e)]
            want = [r for r in p.batch_like if p.roles[r] != ONE]
            have = [x for x in batch if shape[x] != ONE]
            if [p.roles[r] for r in want] != [shape[x] for x in have]:
                continue
            rename = {x: Aff.var(r) for r, x in zip(want, have, strict=True)}
            if d is not None:
                if shape[d] != p.roles[D_ROLE]:
                    continue
                rename[d] = Aff.var(D_ROLE)
            if e is not None:
                if shape[e] != p.roles[E_ROLE]:
                    continue
                rename[e] = Aff.var(E_ROLE)
            if _is_state(engine, fact, p, rename, last):
                return _state_expr(p, attention, shape, want, have, d, e)
    return None


def _is_state(engine: Engine, fact: Fact, p: Proof, rename: dict[int, Aff], last: Aff) -> bool:
    space = engine.space
    seen_sum = seen_start = False
    for t in fact.value.terms:
        bound = t.bound(space)
        if not bound and p.state is not None and not seen_start:
            accs = sorted(sub_access(space, a, rename) for a in t.accs)
            weight = _decay_over(p, last + 1, ZERO)
            if accs == sorted(p.state) and t.exp.sub(space, rename) == weight and not t.guards and t.coef == 1:
                seen_start = True
                continue
            return False
        if len(bound) != 1 or seen_sum or t.coef != 1:
            return False
        (j,) = bound
        if t.guards != {Aff.var(j), last - Aff.var(j)}:
            return False
        rename_j = {**rename, j: Aff.var(N_ROLE)}
        accs = sorted(sub_access(space, a, rename_j) for a in t.accs)
        if accs != sorted([*p.k, *p.v]):
            return False
        weight = _decay_over(p, last + 1, Aff.var(N_ROLE) + 1)
        for mono, c in p.k_weights:
            weight = weight + Exponent.of([(mono, Aff.lit(c))], ())
        if t.exp.sub(space, rename_j) != weight:
            return False
        seen_sum = True
    return seen_sum and seen_start == (p.state is not None)


def _decay_over(p: Proof, end: Aff, start: Aff) -> Exponent:
    """G(end) - G(start) in prefix-sum positions."""
    lin = [(mono, (end - start) * c) for mono, c in p.fixed]
    sums = []
    for mono, c in p.tokens:
        running = tuple(
            sorted(
                (leaf, tuple(a.without(N_ROLE) + Aff.var(TAU) * a.coef(N_ROLE) if a.coef(N_ROLE) else a for a in idx))
                for leaf, idx in mono
            )
        )
        sums += [((running, end), c), ((running, start), -c)]
    return Exponent.of(lin, sums)


def _state_expr(
    p: Proof,
    attention: DecayedAttention,
    shape: Sequence[Aff],
    want: Sequence[int],
    have: Sequence[int],
    d: int | None,
    e: int | None,
) -> Expr:
    """The operator's second output in the dimensions of the value it replaces."""
    order = [*have]
    tail = [x for x in (d, e) if x is not None]
    expr: Expr = Attend(attention, 1)
    sizes = [int(shape[x].const) if shape[x].is_const else -1 for x in (*order, *tail)]
    expr = Call(torch.reshape, (expr, sizes))
    dims = [*order, *tail]
    ranked = sorted(range(len(dims)), key=lambda n: dims[n])
    if ranked != list(range(len(ranked))):
        expr = Call(torch.permute, (expr, ranked))
    for x, n in enumerate(shape):
        if n == ONE:
            expr = Call(torch.unsqueeze, (expr, x))
    return expr


