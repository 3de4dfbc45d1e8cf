"""Operations on values that every transfer rule is built from."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product as cartesian
from typing import Any

import numpy as np
import torch

from ..._compat import outside_modes
from .affine import ONE, ZERO, Aff
from .evaluate import Evaluator
from .leaves import Interval, Leaf, Leaves, Opaque, Symbol, Table
from .logs import log_summands
from .merge import TooManyTerms, merge_sum
from .normal import Algebra
from .precision import jumps
from .sizes import Sizes
from .term import NO_GUARDS, Access, Case, Exponent, Guards, Mono, Precision, Term, Val, constant, value
from .weights import align_weights, scalar_factors

aten = torch.ops.aten

MAX_TERMS = 12
MAX_CASES = 8
MAX_FACTORS = 10
MAX_TABLE = 4096


class GiveUp(Exception):
    """This operation cannot be looked into; its result becomes an opaque leaf. Never leaves the lift."""


class Engine(Algebra):
    """The algebra of one analysis together with its leaves and the symbolic sizes of the traced program."""

    def __init__(self) -> None:
        super().__init__()
        self.leaves = Leaves(self.leaf_shapes)
        self.sizes = Sizes(self.space)
        self.symints: dict[Aff, torch.SymInt] = {}
        self.size_nodes: dict[Aff, Any] = {}  # sizes that are inputs of the graph
        self.taken_whole: list[int] = []  # leaves that stand for a product that nobody looked into
        self.running: Any = None  # the Dynamo node that is being lifted
        self.relied: dict[Any, set[Any]] = {}  # Dynamo node -> inputs whose values decided how it was lifted

    # -------------------------------------------------------------------------------------------------------- sizes

    def aff(self, size: Any) -> Aff:
        """A size or an integer argument as an affine form over symbolic sizes."""
        if isinstance(size, bool):
            raise GiveUp("a boolean where an index was expected")
        if isinstance(size, int):
            return Aff.lit(size)
        if isinstance(size, torch.SymInt):
            found = self.sizes(size.node.expr, size.node.shape_env)
            self.symints.setdefault(found, size)
            return found
        raise GiveUp(f"index of type {type(size).__name__}")

    def shape(self, tensor: torch.Tensor) -> tuple[Aff, ...]:
        return tuple(self.aff(n) for n in tensor.shape)

    def length(self, n: Aff) -> int:
        """A size that must be a number."""
        if not n.is_const:
            raise GiveUp("a symbolic size where a number is needed")
        return int(n.const)

    # ------------------------------------------------------------------------------------------------------- leaves

    def leaf(self, tensor: torch.Tensor, kind: Opaque, **facts: Any) -> Val:
        """A fresh leaf holding this tensor."""
        shape = self.shape(tensor)
        leaf = self.leaves.add(Leaf(kind, shape, tensor.dtype, **facts))
        return value(shape, [Term(accs=((leaf, self.own_index(shape)),))], precision=Precision.EXACT)

    def interval(self, leaf: int) -> Interval:
        """What all entries of a leaf lie in; that the node being lifted was read by it is noted."""
        found = self.leaves[leaf]
        if found.rests_on:
            self.relied.setdefault(self.running, set()).update(found.rests_on)
        return found.interval

    def own_index(self, shape: Sequence[Aff]) -> tuple[Aff, ...]:
        return tuple(ZERO if n == ONE else Aff.var(d) for d, n in enumerate(shape))

    # ---------------------------------------------------------------------------------------------------- predicates

    def plain_term(self, t: Term) -> bool:
        """No structure: nothing summed, nothing guarded, no weight that moves with an index."""
        return (
            not t.guards
            and t.poly.is_const
            and not t.exp.sums
            and all(f.is_const for _, f in t.exp.lin)
            and not any(v < 0 for _, idx in t.accs for a in idx for v, _ in a.terms)
        )

    def plain(self, v: Val) -> bool:
        return v.single and all(self.plain_term(t) for t in v.terms)

    def index_only(self, v: Val) -> bool:
        """Computed from indices and known numbers alone."""

        def known(accs: Iterable[Access]) -> bool:
            return all(isinstance(self.leaves[leaf].kind, Table) for leaf, _ in accs)

        return all(
            known(t.accs) and all(known(m) for m, _ in t.exp.lin) and all(known(m) for (m, _), _ in t.exp.sums)
            for c in v.cases
            for t in c.terms
        )

    def structured_term(self, t: Term) -> bool:
        """Worth looking into rather than taking as it is: weighted, guarded, or summed over a part of a dimension."""
        if t.exp.sums or any(not f.is_const for _, f in t.exp.lin):
            return True
        if any(m for m, _ in t.exp.lin) and any(v < 0 for _, idx in t.accs for a in idx for v, _ in a.terms):
            return True
        bound: dict[int, Aff] = {}
        fixed = 0
        for leaf, idx in t.accs:
            for d, a in enumerate(idx):
                size = self.leaf_shapes[leaf][d]
                if a.is_const and size != ONE and len(t.accs) > 1:
                    fixed += 1
                for v, c in a.terms:
                    if v < 0:
                        if c != 1 or a.const or len(a.terms) > 1:
                            return True
                        bound[v] = size
        if fixed > 1:
            return True
        for g in t.guards:
            owner = [v for v, _ in g.terms if v in bound]
            if len(owner) != 1:
                return True
            v = owner[0]
            if g not in (Aff.var(v), bound[v] - 1 - Aff.var(v)):
                return True
        return False

    def structured(self, v: Val) -> bool:
        if v.alt is not None and v.single and len(v.terms) > 1:
            if any(m for t in v.terms for m, _ in t.exp.lin) or not self._summed(v):
                return True  # a state and its update
        return any(self.structured_term(t) for c in v.cases for t in c.terms)

    def moves_along_a_feature(self, v: Val, feature: int | None = None) -> bool:
        """Data times a weight scale[d] * i: its rate differs along a dimension (this one) that its distance lacks."""

        def moves(t: Term) -> bool:
            free = [{x for _, idx in m for x in self.space.vars_of(idx)} for m, f in t.exp.lin if not f.is_const]
            return any(bool(held) if feature is None else feature in held for held in free)

        return v.single and not self.index_only(v) and any(moves(t) for t in v.terms)

    def contracts(self, v: Val) -> bool:
        """Holds a sum of products of leaves: the work a rewrite could replace."""

        def products(t: Term) -> bool:
            # exp of plain data, as of a feature map, is a factor like any other
            factors = [*t.accs, *(a for m, f in t.exp.lin if f.is_const for a in m)]
            return len(factors) >= 2 and any(x < 0 for _, idx in factors for a in idx for x, _ in a.terms)

        return (v.alt is not None and self.structured(v)) or any(products(t) for c in v.cases for t in c.terms)

    # --------------------------------------------------------------------------------------------------- index maps

    def index(self, v: Val, mapping: Mapping[int, Aff], shape: tuple[Aff, ...]) -> Val:
        """The tensor of this shape whose element is ``v`` at the mapped index."""
        cases: list[Case] = []
        for c in v.cases:
            guards = self.prune((self.space.sub(g, mapping) for g in c.guards), shape) if c.guards else NO_GUARDS
            if guards is not None:
                cases.append(Case(guards, self._terms((t.sub(self.space, mapping) for t in c.terms), shape)))
        alt, own = (None if t is None else self.normalise(t.sub(self.space, mapping), shape) for t in (v.alt, v.own))
        return Val(shape, tuple(cases), alt, v.precision, own)

    def _terms(self, terms: Iterable[Term], shape: tuple[Aff, ...]) -> tuple[Term, ...]:
        terms = list(terms)
        if any(math.isinf(t.coef) for t in terms):
            return tuple(terms)
        try:
            return merge_sum(self, terms, shape)
        except TooManyTerms:
            raise GiveUp("a sum that does not merge") from None

    def sum_of(self, shape: tuple[Aff, ...], terms: Iterable[Term], alt: Term | None = None, limit: int = 64) -> Val:
        try:
            merged = merge_sum(self, terms, shape, limit)
        except TooManyTerms:
            raise GiveUp("a sum that does not merge") from None
        return value(shape, merged, alt)

    def broadcast(self, v: Val, shape: tuple[Aff, ...]) -> Val:
        if v.shape == shape:
            return v
        shift = len(shape) - len(v.shape)
        if shift < 0:
            raise GiveUp("broadcast to fewer dimensions")
        mapping = {d: Aff.var(d + shift) for d in range(len(v.shape)) if shift and v.shape[d] != ONE}
        return self.index(v, mapping, shape) if mapping else replace(v, shape=shape)

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
            guard = next((g for t in case.terms for g in sorted(t.guards) if not self._speaks_of_bound(g)), None)
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
            cases.append(Case(guards, self._terms(f([c.terms for c in combo]), shape)))
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
                    if a.terms == b.terms and (guards := self._union(a.guards, b.guards, v.shape)) is not None:
                        cases[m] = Case(guards, a.terms)
                        del cases[n]
                        changed = True
                        break
                if changed:
                    break
        if len({c.terms for c in cases}) == 1:
            cases = [Case(NO_GUARDS, cases[0].terms)]
        return replace(v, cases=tuple(cases))

    def _union(self, a: Guards, b: Guards, shape: tuple[Aff, ...]) -> Guards | None:
        for g in a - b:
            rest_b = b - {-g - 1}
            if -g - 1 in b and rest_b == a - {g}:
                return rest_b
        return None

    # --------------------------------------------------------------------------------------------------- plain values

    def pick(self, v: Val) -> Val:
        """The reading of ``v`` a consumer of plain factors wants: its own leaf unless it is worth looking into."""
        if v.alt is None or self.structured(v):
            return v
        self.taken_whole.append(v.alt.accs[0][0])
        return value(v.shape, [v.alt])

    def access(self, v: Val, dtype: torch.dtype | None = None) -> tuple[Access, torch.dtype | None] | float:
        """``v`` as one access of one leaf (a symbol where it takes arithmetic), or as a number.

        Raises:
            GiveUp: ``v`` holds a contraction, a guard or a moving weight.
        """
        if v.alt is not None:
            self.taken_whole.append(v.alt.accs[0][0])
            return self.term_access(v.alt, dtype)
        if not v.single or not self.plain(v):
            if self.index_only(v):
                return self.tabulate(v), None
            raise GiveUp("a contraction or a mask inside a pointwise function")
        if not v.terms:
            return 0.0
        out = self.term_access(v.terms[0], dtype)
        for t in v.terms[1:]:
            out = self._symbol(aten.add.Tensor, [out, self.term_access(t, dtype)], dtype), None
        return out

    def term_access(self, t: Term, dtype: torch.dtype | None) -> tuple[Access, torch.dtype | None] | float:
        out: tuple[Access, torch.dtype | None] | None = None
        coef = t.coef

        def times(other: Any) -> None:
            nonlocal out
            out = other if out is None else (self._symbol(aten.mul.Tensor, [out, other], dtype), None)

        for a in t.accs:
            times((a, dtype))
        for mono, f in t.exp.lin:
            if not f.is_const:
                raise GiveUp("a moving weight inside a pointwise function")
            inner = self.term_access(Term(f.const, accs=mono), dtype)
            if isinstance(inner, float):
                coef *= math.exp(inner)
            else:
                times((self._symbol(aten.exp.default, [inner], dtype), None))
        for (mono, pos), c in t.exp.sums:
            raise GiveUp(f"a prefix sum over {mono} up to {pos} times {c} inside a pointwise function")
        if out is None:
            return coef
        if abs(coef - 1) > 1e-12:
            out = (self._symbol(aten.mul.Tensor, [out, coef], dtype), None)
        return out

    def _symbol(
        self, op: Any, args: list[Any], dtype: torch.dtype | None, kwargs: dict[str, Any] | None = None
    ) -> Access:
        if dtype is None:
            dtypes = [self.leaves[a[0][0]].dtype for a in args if isinstance(a, tuple)]
            dtype = dtypes[0] if dtypes else torch.float32
        out = self.leaves.symbol(op, args, kwargs or {}, dtype)
        if out is None:
            raise GiveUp("a pointwise function of too many indices")
        return out

    def pointwise(
        self,
        op: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        out: torch.Tensor,
        dtypes: Sequence[torch.dtype | None] = (),
    ) -> Val:
        """A function symbol over the plain arguments: f(x)[idx] = f(x[idx]).

        ``dtypes`` are those that floating arguments are computed with, where they are not those of their leaves.
        """
        if any(isinstance(x, Val) for x in kwargs.values()):
            raise GiveUp("a tensor among the keyword arguments")
        shape = self.shape(out)
        used = [d if d is not None and d.is_floating_point else None for d in dtypes] or [None] * len(args)
        vals = [self.broadcast(a, shape) if isinstance(a, Val) else a for a in args]
        if jumps(self.leaves, op, vals, out.dtype):
            raise GiveUp("a decision by numbers that rounding may have changed")
        if all(self.index_only(v) and v.alt is None for v in vals if isinstance(v, Val)):
            return self._fold(op, vals, kwargs, shape)
        spec = [self.access(v, d) if isinstance(v, Val) else v for v, d in zip(vals, used, strict=True)]
        return value(shape, [Term(accs=(self._symbol(op, spec, out.dtype, kwargs),))])

    def _fold(self, op: Any, vals: Sequence[Any], kwargs: dict[str, Any], shape: tuple[Aff, ...]) -> Val:
        """A function of known numbers: case by case where they are constants, else a table."""
        tensors = [v for v in vals if isinstance(v, Val)]

        def number(terms: tuple[Term, ...]) -> float | None:
            if not terms:
                return 0.0
            t = terms[0]
            return t.coef if len(terms) == 1 and not t.accs and not t.exp and t.poly.is_const and not t.guards else None

        def fold(groups: list[tuple[Term, ...]]) -> Iterable[Term]:
            numbers = iter([number(g) for g in groups])
            with outside_modes():
                args = [torch.tensor(next(numbers), dtype=torch.float64) if isinstance(v, Val) else v for v in vals]
                result = float(op(*args, **kwargs))
            if math.isnan(result):
                raise GiveUp("a mask that is not a number")
            return [Term(result)] if result else []

        if tensors and all(number(c.terms) is not None for v in tensors for c in v.cases):
            return self.zip_cases(tensors, fold)
        tables = [self._as_array(v, len(shape)) if isinstance(v, Val) else v for v in vals]
        with outside_modes():
            args = [torch.from_numpy(v) if isinstance(v, np.ndarray) else v for v in tables]
            result = op(*args, **kwargs).to(torch.float64).numpy()
        return self.table_value(result, shape)

    def _as_array(self, v: Val, rank: int) -> np.ndarray:
        """The numbers of a table value, with one dimension for each of the tensor's."""
        (leaf, idx) = self.tabulate(v)
        kind = self.leaves[leaf].kind
        assert isinstance(kind, Table)
        view = [1] * rank
        for axis, a in enumerate(idx):
            view[a.terms[0][0]] = kind.array.shape[axis]
        return kind.array.copy().reshape(view)

    def table_value(self, array: np.ndarray, shape: tuple[Aff, ...]) -> Val:
        """Known numbers as a value; only the dimensions that matter are kept, and a line 0, 1, 2 ... is an index."""
        if not array.size:
            raise GiveUp("an empty table")
        full = array.reshape((1,) * (len(shape) - array.ndim) + array.shape)
        dims = [d for d in range(full.ndim) if full.shape[d] > 1 and not (full == full.take([0], d)).all()]
        core = full[tuple(slice(None) if d in dims else 0 for d in range(full.ndim))]
        if not dims:
            return constant(shape, float(core))
        if len(dims) == 1 and np.isfinite(core).all():
            steps = np.diff(core)
            if (steps == steps[0]).all() and float(steps[0]).is_integer() and float(core[0]).is_integer():
                return value(shape, [Term(1.0, Aff.of({dims[0]: int(steps[0])}, int(core[0])))])
        if core.size > MAX_TABLE or not np.isfinite(core).all():
            raise GiveUp("a large table of numbers")
        leaf = self.leaves.table(core, tuple(shape[d] for d in dims))
        return value(shape, [Term(accs=((leaf, tuple(Aff.var(d) for d in dims)),))])

    def tabulate(self, v: Val) -> Access:
        """A value computed from indices and known numbers alone, as a table of its numbers."""
        used: set[int] = set()
        for c in v.cases:
            for a in (*c.guards, *(a for t in c.terms for a in t.affs())):
                used |= {x for x in self.space.vars(a) if 0 <= x < 100}
        dims = sorted(used)
        lengths = [self.length(v.shape[d]) for d in dims]
        if math.prod(lengths) > MAX_TABLE:
            raise GiveUp("a large table of numbers")
        if any(math.isinf(t.coef) for c in v.cases for t in c.terms):
            raise GiveUp("an infinite value inside a pointwise function")

        def read(leaf: int, idx: tuple[int, ...]) -> float:
            kind = self.leaves[leaf].kind
            assert isinstance(kind, Table)
            return float(kind.array[idx])

        evaluator = Evaluator(self.space, read)
        out = np.empty(lengths)
        for at in np.ndindex(*lengths):
            full = [0] * len(v.shape)
            for d, x in zip(dims, at, strict=True):
                full[d] = x
            out[at] = evaluator.value(v, tuple(full))
        leaf = self.leaves.table(out, tuple(v.shape[d] for d in dims))
        return (leaf, tuple(Aff.var(d) for d in dims))

    def detached(self, v: Val) -> Val:
        """``v`` with every factor detached, those of its weights too."""

        def access(a: Access) -> Access:
            kind = self.leaves[a[0]].kind
            if isinstance(kind, Table) or (isinstance(kind, Symbol) and kind.op is aten.detach.default):
                return a
            return self._symbol(aten.detach.default, [(a, None)], None)

        def mono(m: Mono) -> Mono:
            return tuple(sorted(map(access, m)))

        def term(t: Term) -> Term:
            lin = ((mono(m), f) for m, f in t.exp.lin)
            exp = Exponent.of(lin, (((mono(m), p), c) for (m, p), c in t.exp.sums))
            return t.but(accs=mono(t.accs), exp=exp)

        cases = tuple(Case(c.guards, self._terms(map(term, c.terms), v.shape)) for c in v.cases)
        alt, own = (None if t is None else term(t) for t in (v.alt, v.own))
        return replace(v, cases=cases, alt=alt, own=own)

    # ------------------------------------------------------------------------------------------------------ arithmetic

    def scale(self, v: Val, k: float) -> Val:
        if k == 0:
            return constant(v.shape, 0)
        return v if k == 1 else v.with_terms(lambda t: t.but(coef=t.coef * k))

    def multiply(self, a: Val, b: Val) -> Val:
        """The product of two values of one shape."""
        for x, y in ((a, b), (b, a)):
            t = x.one
            if t is not None and not t.accs and not t.exp and not t.guards and t.poly.is_const:
                return self.scale(y, t.coef)
        moving = [v for v in (a, b) if self.structured(v) or not v.single or any(t.exp.lin for t in v.terms)]
        if not moving:
            a, b = self.pick(a), self.pick(b)
        else:
            a, b = (v if v.alt is None or self._mask_like(w) else self.pick(v) for v, w in ((a, b), (b, a)))

        def times(groups: list[tuple[Term, ...]]) -> Iterable[Term]:
            left, right = groups
            if len(left) * len(right) > MAX_TERMS * 4:
                raise GiveUp("a product of long sums")
            for x in left:
                for y in right:
                    t = self._infinite(x, y) or self.product(x, y)
                    if t is None or len(t.accs) > MAX_FACTORS:
                        raise GiveUp("a product of too many factors")
                    yield t

        if a.single and b.single:
            return self.sum_of(a.shape, times([a.terms, b.terms]))
        return self.zip_cases([a, b], times)

    def _infinite(self, x: Term, y: Term) -> Term | None:
        """inf times something of known sign."""
        if math.isinf(y.coef):
            x, y = y, x
        if not math.isinf(x.coef) or y.guards or not y.poly.is_const:
            return None
        sign = x.coef * y.coef
        for leaf, _ in y.accs:
            low, high = self.interval(leaf)
            if low <= 0 <= high:
                return None
            sign = sign if low > 0 else -sign
        return Term(sign)

    def _mask_like(self, v: Val) -> bool:
        """A factor that weights or guards: multiplied into a product, it makes the product worth looking into."""
        return not self.plain(v) or self.index_only(v) or any(t.exp for c in v.cases for t in c.terms)

    def add(self, a: Val, b: Val, out: torch.Tensor) -> Val:
        """The sum of two values of one shape."""
        for x, y in ((a, b), (b, a)):
            if x.single and not x.terms:
                return y
        if (self.index_only(a) and self.index_only(b)) or not a.single or not b.single:
            return self.zip_cases([a, b], lambda g: _add_infinite(g[0], g[1]))
        if out.is_floating_point() and self.plain(a) and self.plain(b) and (same := self._like_terms(a, b)) is not None:
            return same
        if not (self.structured(a) or self.structured(b) or self._moves(a) or self._moves(b)):
            if not (self._products(a) and self._products(b) and self._shares_signature(a, b)):
                if not (self._summed(a) or self._summed(b) or self._updates(a, b) or self._updates(b, a)):
                    return self.pointwise(aten.add.Tensor, [a, b], {}, out)
                alt = self._alt_of_sum(a, b, out)
                return self.sum_of(a.shape, (*a.terms, *b.terms), alt)
        left, right = align_weights(self.space, self.leaves, a.terms, b.terms)
        return self.sum_of(a.shape, (*left, *right))

    def _like_terms(self, a: Val, b: Val) -> Val | None:
        """x - x is 0 and x + 2 x is 3 x, where each side is a number times one factor; None if they differ."""
        x, y = (v.one if v.alt is None else v.alt for v in (a, b))
        if x is None or y is None or x.body != y.body or len(x.accs) > 1:
            return None
        self.pick(a)
        return value(a.shape, [x.but(coef=x.coef + y.coef)] if x.coef + y.coef else [])

    def _alt_of_sum(self, a: Val, b: Val, out: torch.Tensor) -> Term | None:
        try:
            return self.pointwise(aten.add.Tensor, [a, b], {}, out).one
        except GiveUp:
            return None

    def _updates(self, a: Val, b: Val) -> bool:
        """exp(g) S + k v: one token's update of a state, which a contraction may want to look into."""
        if len(a.terms) != 1 or len(b.terms) != 1 or len(b.terms[0].accs) < 2 or b.terms[0].exp:
            return False
        state, update = a.terms[0], b.terms[0]
        if any(m for m, _ in state.exp.lin if state.accs) or scalar_factors(self.space, state, update):
            return True
        held = [self.space.vars_of(idx) for _, idx in update.accs]
        whole = frozenset().union(*held)
        return whole not in held and len(state.accs) == 1 and self.space.vars_of(state.accs[0][1]) == whole

    def _moves(self, v: Val) -> bool:
        """Proportional to an index, as a fixed decay's exponent is."""
        return any(not t.poly.is_const for t in v.terms)

    def _summed(self, v: Val) -> bool:
        return any(x < 0 for t in v.terms for _, idx in t.accs for f in idx for x, _ in f.terms)

    def _products(self, v: Val) -> bool:
        return any(len(t.accs) >= 2 for t in v.terms)

    def _shares_signature(self, a: Val, b: Val) -> bool:
        """Some term of one side is a product that a term of the other contains: k v, and s k v."""
        return any(
            not Counter(x) - Counter(y) or not Counter(y) - Counter(x)
            for x in {t.signature for t in a.terms if len(t.accs) >= 2}
            for y in {t.signature for t in b.terms if len(t.accs) >= 2}
        )

    def log_terms(self, acc: Access) -> list[Term]:
        """The logarithm of a factor that must be positive; the match proves that, or demands it."""
        return [Term(c, accs=() if x is None else (x,)) for c, x in log_summands(self.leaves, acc)]


def _add_infinite(a: tuple[Term, ...], b: tuple[Term, ...]) -> tuple[Term, ...]:
    """inf + finite = inf of the same sign; inf - inf is not a mask."""
    infinite = [t for t in (*a, *b) if math.isinf(t.coef)]
    if infinite:
        if len({t.coef > 0 for t in infinite}) > 1:
            raise GiveUp("inf - inf")
        return (Term(infinite[0].coef),)
    return (*a, *b)
