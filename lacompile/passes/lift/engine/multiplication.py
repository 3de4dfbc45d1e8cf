"""The product of two values: what is multiplied out, and which reading of each that takes."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ..domain.affine import MAX_DIMS, ONE, Aff
from ..domain.exponent import Access, Exponent
from ..domain.term import Term, Val, constant, value
from .limits import MAX_TERMS, GiveUp, bounded
from .symbols import Symbols


class Multiplication(Symbols):
    """What is multiplied out, and what is taken as it is."""

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
        a, b = (self.as_data(v, w) for v, w in ((a, b), (b, a)))
        a, b = (v if self.index_only(w) else self._numbers_of_heads(v) for v, w in ((a, b), (b, a)))
        for x, y in ((a, b), (b, a)):
            t = x.one
            if t is not None and not t.accs and not t.exp and not t.guards and t.poly.is_const:
                return self.scale(y, t.coef)
        a, b = self._as_factor(a, b), self._as_factor(b, a)
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

    def as_data(self, v: Val, w: Val) -> Val:
        """A sum of parameters, as a gate's lower bound of all layers up to one, as the tensor that it is.

        Beside another sum of parameters it is a part of that, or one of rates that are learned for each position.
        """
        if (v.alt is None and v.own is None) or not self._sums_parameters(v) or not self.plain(w):
            return v
        given = {leaf for t in w.terms for leaf in t.leaves}
        if given and all(map(self.of_parameters, given)):
            return v
        return self.as_held(v) or self.whole(v)

    def _as_factor(self, v: Val, w: Val) -> Val:
        """``v`` as the tensor that it is, where what it weighs is a state: a gate by a mean is no product of that."""
        if v.alt is None or not w.single or not w.terms:
            return v
        held = self.space.vars_of(i for _, idx in v.alt.accs for i in idx)
        free = [t.vars(self.space) - t.bound(self.space) for t in w.terms]
        states = not self.projects(w) and all(len(t.accs) > 1 and self.outer_product(t) for t in w.terms)
        return self.whole(v) if states and all(held < x for x in free) else v

    def _one_index(self, x: Term, y: Term, shape: tuple[Aff, ...]) -> tuple[Term, Term]:
        """Two terms, of which at most one is multiplied by an index: the rate (h + 1) / H of a head is a table.

        A position is a whole number, and a rate need not be; else a table is of the index that has fewer values.
        """
        if x.poly.is_const or y.poly.is_const:
            return x, y
        free = [self.space.vars(t.poly) for t in (x, y)]
        if any(not 0 <= v < MAX_DIMS or not shape[v].is_const for vs in free for v in vs):
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
            if any(x < 0 for x in self.space.vars_of(mine)):
                continue  # the features of scores, which are summed already
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


def _weighted(t: Term) -> bool:
    """Whether some weight is more than a number, which the size of a coefficient is."""
    return any(m or not f.is_const for m, f in t.exp.lin)
