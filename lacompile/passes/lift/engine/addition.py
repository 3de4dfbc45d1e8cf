"""The sum of two values: what is added term by term, what is one term more of a sum, and what is taken as it is."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import torch

from ..domain.affine import Aff
from ..domain.exponent import Access
from ..domain.kinds import Opaque
from ..domain.term import NO_GUARDS, Case, Term, Val, value
from ..normal.ends import two_points
from ..normal.multiples import gathered, mixture
from ..normal.running import running_terms
from ..normal.weights import align_weights, scalar_factors
from .limits import MAX_TERMS, GiveUp
from .multiplication import Multiplication
from .structure import summed

aten = torch.ops.aten


class Addition(Multiplication):
    """What is added term by term, and what is taken as it is."""

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
        a, b = self._bound_as_data(a, b), self._bound_as_data(b, a)
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
                found = self.sum_of(a.shape, (*a.terms, *b.terms))
                return found if self._is_access(found) else replace(found, alt=self._alt_of_sum(a, b, out))
        a, b = (self.pick(v) if _of_rates(w) and self.projects(v) else v for v, w in ((a, b), (b, a)))
        left, right = self._gathered(a, b)
        left, right = align_weights(self.space, self.leaves, a.shape, left, right)
        return self.sum_of(a.shape, (*left, *right), limit=MAX_TERMS)

    def _bound_as_data(self, v: Val, w: Val) -> Val:
        """A gate's lower bound ``m``, summed over layers, as the tensor that it is in ``m + (1 - m) x``.

        No normaliser is taken from a number, and none is added to what was computed from it.
        """
        if (v.alt is None and v.own is None) or not self._sums_places(v) or not self.plain(w):
            return self.as_data(v, w)
        number = w.number
        positive = all(self.leaves[t.accs[0][0]].interval[0] >= 0 for t in v.terms)
        left = number is not None and number > 0 and positive and all(t.coef < 0 for t in v.terms)
        held = {leaf for t in (v.alt, v.own) if t is not None for leaf in t.signature}
        beside_itself = not held.isdisjoint(self.leaves.data(leaf for t in w.terms for leaf in t.leaves))
        return (self.as_held(v) or self.whole(v)) if left or beside_itself else self.as_data(v, w)

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
        """Whether products that hold all of a product that a cast has narrowed are taken away from each other."""
        bodies = {t.body: t.coef for c in a.cases for t in c.terms}
        gone = [t for c in b.cases for t in c.terms if t.coef * bodies.get(t.body, 0.0) < 0]
        return any(product.issubset(t.leaves) for t in gone for product in self.narrowed)

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
        if self._is_access(found) and not came_in:
            return found
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

    def _is_access(self, v: Val) -> bool:
        """Whether nothing is left of a sum but one factor, as of two running sums that are taken from each other."""
        t = v.one
        return t is not None and self.plain_term(t) and len(t.accs) == 1 and not t.exp and t.coef == 1

    def _of_one_token(self, a: Val, b: Val) -> bool:
        """Whether they are products of what is read at the same places, neither an outer product: no state has such a
        sum, but a token that is turned by its position, ``x cos + rotated x sin``.

        Of all tokens at once they are told by an exponential that has every dimension, which no decay of a state has.
        """
        places, at_places, exponentials = [], True, False
        for v in (a, b):
            t = v.one
            if v.alt is not None or t is None or t.exp.sums or not t.poly.is_const or t.bound(self.space) or t.guards:
                return False
            weights = [mono for mono, f in t.exp.lin if mono and f.is_const]
            if len(weights) < len(t.exp.lin) or len(t.accs) + len(weights) < 2:
                return False
            free = t.vars(self.space)
            whole = [a for a in t.accs if self.space.vars_of(a[1]) == free]
            features = any(self.space.vars_of(i for _, idx in mono for i in idx) == free for mono in weights)
            if not whole and not features:
                return False
            exponentials |= features
            at_places &= features or any(map(self.places, whole))
            places.append({i for accs in (t.accs, *weights) for a in accs for i in self.places(a)})
        if places[0] != places[1] or a.terms[0].body == b.terms[0].body:
            return False
        return at_places if places[0] else exponentials

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
