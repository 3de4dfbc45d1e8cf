"""Products and sums of values."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import torch

from ..domain.affine import ONE, Aff
from ..domain.exponent import Access, Exponent
from ..domain.leaves import Opaque
from ..domain.term import NO_GUARDS, Case, Term, Val, constant, value
from ..normal.ends import two_points
from ..normal.multiples import gathered, mixture
from ..normal.running import running_terms
from ..normal.weights import align_weights, scalar_factors
from .limits import MAX_TERMS, GiveUp, bounded
from .structure import summed
from .symbols import Symbols

aten = torch.ops.aten


class Arithmetic(Symbols):
    """What is multiplied out, what is added term by term, and what is taken as it is."""

    def scale(self, v: Val, k: float) -> Val:
        if math.isinf(k) and any(len(c.terms) != 1 for c in v.cases):
            raise GiveUp("zero, or a sum, times infinity")
        if k == 0:
            if any(math.isinf(t.coef) for c in v.cases for t in c.terms):
                raise GiveUp("zero times infinity")
            return constant(v.shape, 0)
        return v if k == 1 else v.with_terms(lambda t: t.but(coef=t.coef * k))

    def times_number(self, v: Val, number: Access) -> Val:
        """Every reading of ``v`` times one number, which is for it what a coefficient is."""

        def times(t: Term) -> Term:
            if not math.isinf(t.coef):
                return bounded(t.but(accs=tuple(sorted((*t.accs, number)))))
            if not self.interval(number[0])[0] > 0:
                raise GiveUp("infinity times a number of unknown sign")
            return t

        return v.with_terms(times)

    def multiply(self, a: Val, b: Val) -> Val:
        """The product of two values of one shape."""
        a, b = (v if self.index_only(w) else self._numbers_of_heads(v) for v, w in ((a, b), (b, a)))
        for x, y in ((a, b), (b, a)):
            t = x.one
            if t is not None and not t.accs and not t.exp and not t.guards and t.poly.is_const:
                return self.scale(y, t.coef)
        moving = [v for v in (a, b) if self.structured(v) or not v.single or any(map(_weighted, v.terms))]
        whole = None
        if not moving:
            looked_into, whole = (a, b), (self.pick_beside(a, b), self.pick_beside(b, a))
            a, b = looked_into if any(map(self._may_be_masked, looked_into)) else whole
        else:
            a, b = (
                v
                if v.alt is None or (self._mask_like(w) and not self._projects_beside(v, w))
                else self.pick_beside(v, w)
                for v, w in ((a, b), (b, a))
            )

        def times(groups: list[tuple[Term, ...]]) -> Iterable[Term]:
            left, right = groups
            if not (left and right) and any(math.isinf(t.coef) for t in (*left, *right)):
                raise GiveUp("zero times infinity")
            if len(left) * len(right) > MAX_TERMS * 4:
                raise GiveUp("a product of long sums")
            for x in left:
                for y in right:
                    t = self._infinite(x, y) or self.product(*self._one_index(x, y, a.shape))
                    if t is None:
                        raise GiveUp("a product of two positions, or of infinities")
                    yield self._token_product(bounded(t))

        if a.single and b.single:
            alt = None
            if whole is not None and whole != (a, b) and all(v.one is not None for v in whole):
                (alt,) = times([v.terms for v in whole])
            return self.sum_of(a.shape, times([a.terms, b.terms]), alt)
        return self.zip_cases([a, b], times)

    def _one_index(self, x: Term, y: Term, shape: tuple[Aff, ...]) -> tuple[Term, Term]:
        """Two terms, of which at most one is multiplied by an index: the rate (h + 1) / H of a head is a table.

        A position is a whole number, and a rate need not be; else a table is of the index that has fewer values.
        """
        if x.poly.is_const or y.poly.is_const:
            return x, y
        free = [self.space.vars(t.poly) for t in (x, y)]
        if any(not 0 <= v < 100 or not shape[v].is_const for vs in free for v in vs):
            return x, y
        pair = [x, y]
        steps = [[t.coef * c for _, c in t.poly.terms] for t in pair]
        of_positions = [all(float(c).is_integer() for c in cs) or len(cs) > 1 for cs in steps]
        values = [math.prod(int(shape[v].const) for v in vs) for vs in free]
        few = min((0, 1), key=lambda n: (of_positions[n], values[n]))
        numbers = self.tabulate(value(shape, [Term(poly=pair[few].poly)]))
        pair[few] = pair[few].but(poly=ONE, accs=tuple(sorted((*pair[few].accs, numbers))))
        return pair[0], pair[1]

    def _projects_beside(self, v: Val, w: Val) -> bool:
        """Whether it is a projection beside this weight: one that weighs the columns of the matrix makes it scores."""
        return self.projects(v) and not self.weighs_columns(v, w)

    def _may_be_masked(self, v: Val) -> bool:
        """A product that may be looked into, and that is no projection: a mask of its rows or keys may come first."""
        return v.alt is not None and v.one is not None and not self.projects(v)

    def pick_beside(self, v: Val, w: Val) -> Val:
        """The reading of ``v`` that a product with ``w`` wants: the sum over all tokens where w is the last of them."""
        summed = {
            n
            for t in (v.terms if v.alt is not None and v.single else ())
            for leaf, idx in t.accs
            for n, i in zip(self.leaf_shapes[leaf], idx, strict=True)
            if any(x < 0 for x, _ in i.terms)
        }
        last = (
            n in summed and i == n - 1
            for t in (w.terms if summed and w.single else ())
            for leaf, idx in (*t.accs, *(a for m, _ in t.exp.lin for a in m))
            for n, i in zip(self.leaf_shapes[leaf], idx, strict=True)
        )
        return v if any(last) and not self.projects(v) else self.pick(v)

    def _token_product(self, t: Term) -> Term:
        """``exp(k) v`` of one token, neither of which has all dimensions: there the exponential is no weight of v."""
        if len(t.accs) != 1 or not t.exp.lin:
            return t
        held, places = self.space.vars_of(t.accs[0][1]), {i for i in t.accs[0][1] if i.is_const}
        for mono, f in t.exp.lin:
            mine = [i for _, idx in mono for i in idx]
            if f.is_const and not self.space.vars_of(mine) <= held and places & {i for i in mine if i.is_const}:
                found = self.term_access(Term(exp=Exponent(((mono, f),))), None)
                if isinstance(found, tuple):
                    rest = Exponent(tuple(x for x in t.exp.lin if x[0] != mono), t.exp.sums)
                    return t.but(accs=tuple(sorted((*t.accs, found[0]))), exp=rest)
        return t

    def _numbers_of_heads(self, v: Val) -> Val:
        """``1 - 2 ** (-5 - h)``, and other sums of known numbers, or of multiples of fractions, as a table.

        Of data it is one factor, whose powers are powers of one rate; beside a number it may still be a position.
        """
        if not v.single or v.alt is not None or not self.index_only(v) or not self._differs_alone(v):
            return v
        try:
            return value(v.shape, [Term(accs=(self.tabulate(v),))], precision=v.precision)
        except GiveUp:
            return v

    def _differs_alone(self, v: Val) -> bool:
        """Whether it is a sum of numbers, or of functions of one index, none of which is a position."""
        if len(v.terms) > 1 and self.plain(v):
            return True
        if any(t.guards or t.exp.sums or t.bound(self.space) for t in v.terms):
            return False
        if len({x for t in v.terms for a in t.factors() for x in self.space.vars(a)}) != 1:
            return False
        t = v.one
        if t is None:
            return any(t.exp for t in v.terms) and all(t.poly.is_const for t in v.terms)
        if t.accs:  # -expm1(-x), which is a positive table
            return t.coef < 0 and not t.exp and t.poly == ONE and all(self.interval(leaf)[1] < 0 for leaf, _ in t.accs)
        numbers = (t.poly.const, *(c for _, c in t.poly.terms))
        return not t.exp and not any(float(t.coef * c).is_integer() for c in numbers)

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
        """The sum of two values of one shape.

        Raises:
            GiveUp: what is left of it is what a cast has rounded off.
        """
        if self.narrowed and out.is_floating_point() and self._cancels(a, b):
            raise GiveUp("a difference of a tensor and what a cast has left of it")
        for x, y in ((a, b), (b, a)):
            if x.single and not x.terms:
                return y
        if (self.index_only(a) and self.index_only(b)) or not a.single or not b.single:
            return self.zip_cases([a, b], lambda g: _add_infinite(g[0], g[1]))
        if out.is_floating_point() and self._of_one_token(a, b):
            return self.pointwise(aten.add.Tensor, [a, b], {}, out)
        for x, y in ((a, b), (b, a)):
            if out.is_floating_point() and (running := self._running_sum(x, y, out)) is not None:
                return running
        if out.is_floating_point() and self.plain(a) and self.plain(b) and (same := self._like_terms(a, b)) is not None:
            return same
        if out.is_floating_point() and (mixed := self._mixture(a, b)) is not None:
            return mixed
        if not (self.structured(a) or self.structured(b) or _moves(a) or _moves(b)):
            if self.projects(a) and self.projects(b):
                return self.pointwise(aten.add.Tensor, [a, b], {}, out)
            if not (_products(a) and _products(b) and _shares_signature(a, b)):
                if not (summed(a) or summed(b) or self._updates(a, b) or self._updates(b, a)):
                    return self.pointwise(aten.add.Tensor, [a, b], {}, out)
                if len(a.terms) + len(b.terms) > MAX_TERMS:  # a residual stream: no layer looks into all before it
                    return self.pointwise(aten.add.Tensor, [a, b], {}, out)
                alt = self._alt_of_sum(a, b, out)
                return self.sum_of(a.shape, (*a.terms, *b.terms), alt)
        a, b = (self.pick(v) if _of_rates(w) and self.projects(v) else v for v, w in ((a, b), (b, a)))
        left, right = self._gathered(a, b)
        left, right = align_weights(self.space, self.leaves, a.shape, left, right)
        return self.sum_of(a.shape, (*left, *right), limit=MAX_TERMS)

    def _gathered(self, a: Val, b: Val) -> tuple[list[Term], list[Term]]:
        """The terms of both sides, multiples of one sum in one; two tokens apart where their line is none of both."""
        left, right = gathered(self.space, self.leaves, self._together, a.terms, b.terms)
        if right and len(a.terms) == len(b.terms):
            apart = [[p for t in v.terms for p in self._points(t, v.shape)] for v in (a, b)]
            if any(len(of) > len(v.terms) for of, v in zip(apart, (a, b), strict=True)):
                again = gathered(self.space, self.leaves, self._together, *apart)
                return (left, right) if again[1] else again
        return left, right

    def _points(self, t: Term, shape: tuple[Aff, ...]) -> list[Term]:
        points = next(two_points(self, t, shape), [])
        return [p for p in points if p is not None] or [t]

    def _together(self, scalars: list[Term]) -> Access | float:
        found = self.access(value((), scalars))
        return found[0] if isinstance(found, tuple) else found

    def _cancels(self, a: Val, b: Val) -> bool:
        """Whether products of what a cast has narrowed somewhere are taken away from each other."""
        bodies = {t.body: t.coef for c in a.cases for t in c.terms if not self.narrowed.isdisjoint(t.leaves)}
        return any(t.coef * bodies.get(t.body, 0.0) < 0 for c in b.cases for t in c.terms)

    def _mixture(self, a: Val, b: Val) -> Val | None:
        """Data and a number, each times its share, as one function of both; None if they are something else."""
        if a.alt is not None or b.alt is not None or a.one is None or b.one is None:
            return None
        if not self.plain(a) or not self.plain(b):
            return None
        found = mixture(self.leaves, self._together, a.one, b.one)
        return None if found is None else value(a.shape, [Term(accs=(found,))])

    def _like_terms(self, a: Val, b: Val) -> Val | None:
        """x - x is 0 and x + 2 x is 3 x, where each side is a number times one factor; None if they differ."""
        x, y = (v.taken for v in (a, b))
        if x is None or y is None or x.body != y.body or len(x.accs) > 1:
            return None
        if a.alt is not None and b.alt is not None and a.one is not None and b.one is not None:
            if a.one.body == b.one.body and x.coef + y.coef:
                return self.scale(a, 1 + y.coef / x.coef)  # a product that may be looked into stays one
        self.pick(a)
        return value(a.shape, [x.but(coef=x.coef + y.coef)] if x.coef + y.coef else [])

    def _running_sum(self, before: Val, new: Val, out: torch.Tensor) -> Val | None:
        """A sum over tokens and the next one, as it is and as the tensor that the program holds; None if it is none."""
        if new.alt is not None and self.structured(new):
            return None  # what a chunk adds is a sum over its tokens
        token = new.one if new.alt is None else new.alt
        if token is None or not self.plain_term(token):
            return None
        single = len(token.accs) + len(token.exp.lin) == 1
        if not single and self.outer_product(token):
            return None
        terms = before.terms if before.alt is None or self.structured(before) else (before.alt,)
        named = {tuple(leaf for leaf, _ in m) for m, _ in token.exp.lin}
        terms = [t.but(exp=self.placed(t.exp, lambda m: tuple(leaf for leaf, _ in m) in named)) for t in terms]

        def as_access(t: Term) -> Access | None:
            try:
                found = self.term_access(t, None)
            except GiveUp:
                return None
            return found[0] if isinstance(found, tuple) else None

        running = running_terms(self.space, self.leaves, as_access, terms, token)
        if running is None:
            return None
        summands, came_in = running
        if not (single or came_in):
            return None  # a key and its gate are factors: those of a sum share them
        try:
            found = self.sum_of(before.shape, summands)
        except GiveUp:
            return None
        if len(found.terms) != 1:
            return None
        found = replace(found, cases=(Case(NO_GUARDS, (*came_in, *found.terms)),)) if came_in else found
        alt = self._alt_of_sum(before, new, out) or self.leaf(out, Opaque(None, "add")).one
        return replace(found, alt=alt)

    def _alt_of_sum(self, a: Val, b: Val, out: torch.Tensor) -> Term | None:
        if any(v.alt is None and not self.plain(v) and not self.index_only(v) for v in (a, b)):
            return None  # the sum of a sum that is looked into is looked into
        try:
            return self.pointwise(aten.add.Tensor, [a, b], {}, out).one
        except GiveUp:
            return None

    def _of_one_token(self, a: Val, b: Val) -> bool:
        """Whether they are products of what is read at the same places, neither an outer product: no state has such a
        sum, but a token that is turned by its position, ``x cos + rotated x sin``.
        """
        places = []
        for v in (a, b):
            t = v.one
            if v.alt is not None or t is None or len(t.accs) < 2 or t.exp or not t.poly.is_const or t.bound(self.space):
                return False
            free = t.vars(self.space)
            whole = [a for a in t.accs if self.space.vars_of(a[1]) == free and self.places(a)]
            if t.guards or not whole:
                return False
            places.append({i for a in t.accs for i in self.places(a)})
        return places[0] == places[1] and a.terms[0].body != b.terms[0].body

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


def _weighted(t: Term) -> bool:
    """Whether some weight is more than a number, which the size of a coefficient is."""
    return any(m or not f.is_const for m, f in t.exp.lin)


def _moves(v: Val) -> bool:
    """Proportional to an index, as a fixed decay's exponent is."""
    return any(not t.poly.is_const for t in v.terms)


def _factors(t: Term) -> Counter[int]:
    """The leaves that a term is a product of; exp of plain data, as of a feature map, is a factor like any other."""
    return Counter([leaf for leaf, _ in (*t.accs, *(a for m, f in t.exp.lin if f.is_const for a in m))])


def _products(v: Val) -> bool:
    """Whether some term is a product of data, which a sum may look into."""
    return any(_factors(t).total() >= 2 for t in v.terms)


def _shares_signature(a: Val, b: Val) -> bool:
    """Some term of one side is a product that a term of the other contains: k v, and s k v."""
    left, right = ([f for t in v.terms if (f := _factors(t)).total() >= 2] for v in (a, b))
    return any(not x - y or not y - x for x in left for y in right)


def _add_infinite(a: tuple[Term, ...], b: tuple[Term, ...]) -> tuple[Term, ...]:
    """inf + finite = inf of the same sign; inf - inf is not a mask."""
    infinite = [t for t in (*a, *b) if math.isinf(t.coef)]
    if infinite:
        if len({t.coef > 0 for t in infinite}) > 1:
            raise GiveUp("inf - inf")
        return (Term(infinite[0].coef),)
    return (*a, *b)


def _of_rates(v: Val) -> bool:
    """Whether it is a sum of single factors, as log-gates summed over tokens are: a state has products."""
    return v.single and all(len(t.accs) == 1 and not t.exp for t in v.terms)
