"""Products of sizes, and mixed radix with symbolic ones.

A dimension of ``b * h`` entries that a view split off ``[b, h]`` has the index ``x = i_b * h + i_h``, which is affine
only if ``h`` is a number. With a symbolic ``h`` three functions of forms stand as variables, interned per analysis:

    quotient(x, h) = floor(x / h)      remainder(x, h) = x mod h      join(i, j, h) = i * h + j with 0 <= j < h

``join`` is made by views alone, for an index ``j`` of a dimension of ``h`` entries; wherever a term counts, ``j`` lies
inside. So a view and its inverse cancel: quotient(join(i, j, h), h) is i, remainder(join(i, j, h), h) is j, and
join(quotient(x, h), remainder(x, h), h) is x.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from .affine import FIRST_MIXED, INF, ONE, ZERO, Aff, Number, Range, Ranges
from .divisions import Divisions, Interned

QUOTIENT, REMAINDER, JOIN = "quotient", "remainder", "join"


class Space(Divisions):
    """The variables of one analysis and what is known of them.

    One instance per analysis: an intern table shared between graphs would leak the shapes of one into the other.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mixed: Interned[tuple[str, tuple[Aff, ...]]] = Interned(FIRST_MIXED)
        self._factors: dict[int, tuple[Aff, ...]] = {}
        self._product_of: dict[tuple[Aff, ...], Aff] = {}

    # ----------------------------------------------------------------------------------------------- products of sizes

    def factors(self, size: Aff) -> tuple[int, Counter[Aff]]:
        """A number and forms whose product is ``size``."""
        if size.is_const:
            return int(size.const), Counter()
        g = math.gcd(*(int(c) for _, c in size.terms), int(size.const))
        if all(c <= 0 for _, c in size.terms) and size.const <= 0:
            g = -g
        rest = Aff(tuple((v, int(c) // g) for v, c in size.terms), int(size.const) // g)
        if g < 0 and len(rest.terms) == 1 and not rest.const and rest.terms[0][0] not in self._factors:
            return -g, Counter([-rest])
        if len(rest.terms) == 1 and rest.terms[0][1] == 1 and not rest.const:
            return g, Counter(self._factors.get(rest.terms[0][0], (rest,)))
        return g, Counter([rest])

    def factors_of(self, v: int) -> tuple[Aff, ...]:
        """The sizes whose product the variable ``v`` is; none if it is no product."""
        return self._factors.get(v, ())

    def times(self, a: Aff, b: Aff) -> Aff:
        """The product of two sizes; that of two symbolic ones is a variable of its own."""
        if a.is_const or b.is_const:
            return b * a.const if a.is_const else a * b.const
        (m, x), (n, y) = self.factors(a), self.factors(b)
        return self._product(m * n, x + y)

    def _product(self, coefficient: int, of: Counter[Aff]) -> Aff:
        forms = tuple(sorted(of.elements()))
        if len(forms) < 2:
            return (forms[0] if forms else ONE) * coefficient
        if forms not in self._product_of:
            low: Number = 1
            high: Number = 1
            for f in forms:
                low, high = low * max(self.lower(f, {}), 0), high * max(self.upper(f, {}), 0)
            var = self.symbol(0 if math.isnan(low) else low, INF if math.isnan(high) else high)
            self._factors[var] = forms
            self._product_of[forms] = Aff.var(var)
        return self._product_of[forms] * coefficient

    def divided(self, size: Aff, by: Aff) -> Aff | None:
        """``size / by`` where that is a product of sizes again, else None."""
        if size == by:
            return ONE
        (m, x), (n, y) = self.factors(size), self.factors(by)
        if n == 0 or m % n or y - x:
            return None
        return self._product(m // n, x - y)

    # ----------------------------------------------------------------------------------------------------- mixed radix

    def _mix(self, kind: str, *args: Aff) -> Aff:
        var = self.mixed.variable((kind, args))
        if var not in self._deep:
            self._deep[var] = self.vars_of(args)
        return Aff.var(var)

    def _as(self, kind: str, a: Aff) -> tuple[Aff, ...] | None:
        """The arguments of a form that is one such function."""
        if len(a.terms) == 1 and not a.const and a.terms[0][1] == 1 and a.terms[0][0] in self.mixed:
            found, args = self.mixed[a.terms[0][0]]
            return args if found == kind else None
        return None

    def joined(self, a: Aff) -> tuple[Aff, ...] | None:
        """``(i, j, size)`` of a form that is ``join(i, j, size)``."""
        return self._as(JOIN, a)

    def join(self, i: Aff, j: Aff, size: Aff) -> Aff:
        """``i * size + j`` for an index ``j`` of a dimension of that size."""
        if size.is_const:
            return i * size.const + j
        if i == ZERO:
            return j
        high, low = self._as(QUOTIENT, i), self._as(REMAINDER, j)
        if high is not None and high == low and high[1] == size:
            return high[0]
        return self._mix(JOIN, i, j, size)

    def quotient(self, x: Aff, size: Aff, ranges: Ranges | None = None) -> Aff:
        return self._split(QUOTIENT, x, size, ranges)

    def remainder(self, x: Aff, size: Aff, ranges: Ranges | None = None) -> Aff:
        return self._split(REMAINDER, x, size, ranges)

    def _split(self, kind: str, x: Aff, size: Aff, ranges: Ranges | None) -> Aff:
        first = kind == QUOTIENT
        if size.is_const:
            whole = self.floordiv(x, int(size.const), ranges)
            return whole if first else x - whole * int(size.const)
        if x == ZERO:
            return ZERO
        if ranges is not None and self.lower(x, ranges) >= 0 and self.lower(size - 1 - x, ranges) >= 0:
            return ZERO if first else x
        joined = self._as(JOIN, x)
        if joined is not None:
            i, j, radix = joined
            if radix == size:
                return i if first else j
            if (k := self.divided(radix, size)) is not None:
                return self.join(i, self.quotient(j, size), k) if first else self.remainder(j, size)
            if (k := self.divided(size, radix)) is not None:
                return self.quotient(i, k) if first else self.join(self.remainder(i, k), j, radix)
        return self._mix(kind, x, size)

    def mixed_again(self, v: int, change: Callable[[Aff], Aff]) -> Aff:
        kind, args = self.mixed[v]
        make: Any = {QUOTIENT: self.quotient, REMAINDER: self.remainder, JOIN: self.join}[kind]
        return make(*map(change, args))

    def mixed_bound(self, v: int, below: bool, ranges: Ranges) -> Aff | None:
        kind, args = self.mixed[v]
        if not below:
            return args[1] - 1 if kind == REMAINDER else None
        if kind == REMAINDER or all(self.lower(a, ranges) >= 0 for a in args[:-1]):
            return ZERO
        return None


def box(shape: Iterable[Aff]) -> dict[int, Range]:
    """The ranges of the free dimensions of a tensor of this shape."""
    return {d: (ZERO, n - 1) for d, n in enumerate(shape)}


def own_index(shape: Iterable[Aff]) -> tuple[Aff, ...]:
    """Where a tensor of this shape is read for each of its entries."""
    return tuple(ZERO if n == ONE else Aff.var(d) for d, n in enumerate(shape))
