"""Integer-affine index arithmetic: the one kind of index the lift understands.

An :class:`Aff` is ``sum(coef * var) + const``. Variables are ints with one meaning per interval:

    0 .. 99          free dimension of the tensor at hand
    < 0              bound (summed) index, local to its term
    TAU              the running position inside a prefix sum
    1_000 ..         a symbolic size of the traced program
    1_000_000 ..     floor(aff / m), interned per analysis

There is no modulo: ``a mod m = a - m * floor(a/m)``, so splitting a dimension and merging it again
cancels by linear algebra. Coefficients are ints for indices and floats in exponents.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import lru_cache

Number = int | float

TAU = 500
FIRST_SYMBOL = 1_000
FIRST_DIV = 1_000_000
INF = math.inf
TINY = 1e-12  # a float coefficient below this is what is left of a cancellation


def _number(x: Number) -> Number:
    """Whole floats as ints."""
    return int(x) if isinstance(x, float) and x.is_integer() and abs(x) < 2**53 else x


def _const(x: Number) -> Number:
    if type(x) is int:
        return x
    return 0 if abs(x) <= TINY else _number(x)


def _rounded(x: Number) -> Number:
    """Nine significant digits: two exponents computed in different orders are the same exponent."""
    if isinstance(x, int) or not math.isfinite(x):
        return x
    return round(x, 8 - math.floor(math.log10(abs(x))))


class Aff:
    """An immutable affine form; ``terms`` is sorted by variable and holds no zero coefficient.

    Float coefficients keep their full precision and are compared to nine significant digits: an exponent that is equal
    to nine digits gives a weight that is equal to far below float32's rounding.
    """

    __slots__ = ("_hash", "_key", "const", "terms")

    def __init__(self, terms: tuple[tuple[int, Number], ...] = (), const: Number = 0):
        self.terms = terms
        self.const = const
        self._hash: int | None = None  # of most forms nobody asks

    @staticmethod
    def of(coefs: Mapping[int, Number], const: Number = 0) -> Aff:
        kept = [(v, c if type(c) is int else _number(c)) for v, c in coefs.items() if abs(c) > TINY]
        kept.sort()
        return Aff(tuple(kept), const if type(const) is int else _const(const))

    @staticmethod
    @lru_cache(4096)
    def var(v: int) -> Aff:
        return Aff(((v, 1),), 0)

    @staticmethod
    def lit(c: Number) -> Aff:
        return Aff((), _const(c))

    @property
    def key(self) -> tuple:
        """What two forms are equal and ordered by."""
        if self._hash is None:
            hash(self)
        return self._key

    def __hash__(self) -> int:
        if self._hash is None:
            terms, const = self.terms, self.const
            for _, c in terms:
                if type(c) is not int:
                    terms = tuple((v, _rounded(c)) for v, c in terms)
                    break
            self._key = (terms, const if type(const) is int else _rounded(const))
            self._hash = hash(self._key)
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Aff) and hash(self) == hash(other) and self._key == other._key

    def __lt__(self, other: Aff) -> bool:
        return self.key < other.key

    def __add__(self, other: Aff | Number) -> Aff:
        return self._plus(other, 1)

    def __sub__(self, other: Aff | Number) -> Aff:
        return self._plus(other, -1)

    def _plus(self, other: Aff | Number, k: int) -> Aff:
        if not isinstance(other, Aff):
            return Aff(self.terms, _const(self.const + k * other)) if other else self
        const = self.const + k * other.const
        if type(const) is not int:
            const = _const(const)
        if not other.terms:
            return Aff(self.terms, const) if other.const else self
        coefs = dict(self.terms)
        for v, c in other.terms:
            total = coefs.get(v, 0) + k * c
            if type(total) is not int:
                total = 0 if abs(total) <= TINY else _number(total)
            if total:
                coefs[v] = total
            else:
                coefs.pop(v, None)
        return Aff(tuple(sorted(coefs.items())), const)

    def __neg__(self) -> Aff:
        return Aff(tuple([(v, -c) for v, c in self.terms]), -self.const)

    def __mul__(self, k: Number) -> Aff:
        if k == 1:
            return self
        if k == 0:
            return ZERO
        return Aff(tuple([(v, _number(c * k)) for v, c in self.terms]), _const(self.const * k))

    def coef(self, var: int) -> Number:
        for v, c in self.terms:
            if v == var:
                return c
        return 0

    def without(self, var: int) -> Aff:
        return Aff(tuple(t for t in self.terms if t[0] != var), self.const)

    @property
    def is_const(self) -> bool:
        return not self.terms

    def __repr__(self) -> str:
        def name(v: int) -> str:
            if v < 0:
                return f"j{-v}"
            if v < 100:
                return f"x{v}"
            return "t" if v == TAU else f"s{v - FIRST_SYMBOL}" if v < FIRST_DIV else f"div{v - FIRST_DIV}"

        parts = [f"{'' if c == 1 else '-' if c == -1 else f'{c}*'}{name(v)}" for v, c in self.terms]
        if self.const or not parts:
            parts.append(str(self.const))
        return "+".join(parts).replace("+-", "-")


ZERO = Aff()
ONE = Aff((), 1)

Range = tuple[Aff, Aff]
Ranges = Mapping[int, Range]


class Space:
    """Symbolic sizes and floor-division variables of one analysis, and the bounds of affine forms over a box.

    One instance per analysis: an intern table shared between graphs would leak the shapes of one into the other.
    """

    def __init__(self) -> None:
        self.symbol_range: dict[int, tuple[Number, Number]] = {}
        self.div_of: dict[int, tuple[Aff, int]] = {}
        self._divs: dict[tuple[Aff, int], int] = {}
        self._deep: dict[int, frozenset[int]] = {}

    def symbol(self, low: Number, high: Number) -> int:
        """A new size variable known to lie in ``[low, high]``."""
        var = FIRST_SYMBOL + len(self.symbol_range)
        self.symbol_range[var] = (low, high)
        return var

    def vars(self, aff: Aff) -> frozenset[int]:
        """Every variable ``aff`` depends on, those inside floor divisions included."""
        terms = aff.terms
        if not terms or terms[-1][0] < FIRST_DIV:
            return frozenset([v for v, _ in terms])
        return frozenset().union(*(self._deep[v] if v >= FIRST_DIV else (v,) for v, _ in terms))

    def vars_of(self, affs: Iterable[Aff]) -> frozenset[int]:
        """Every variable that some of the forms depend on."""
        return frozenset().union(*(self.vars(a) for a in affs))

    def sub(self, aff: Aff, mapping: Mapping[int, Aff]) -> Aff:
        """``aff`` with variables replaced, inside floor divisions too."""
        moved: list[tuple[Number, Aff]] = []
        kept: dict[int, Number] = {}
        for v, c in aff.terms:
            new = mapping.get(v)
            if new is None and v >= FIRST_DIV and not self._deep[v].isdisjoint(mapping):
                inner, m = self.div_of[v]
                new = self.floordiv(self.sub(inner, mapping), m)
            if new is None:
                kept[v] = c
            else:
                moved.append((c, new))
        if not moved:
            return aff
        const = aff.const
        for c, new in moved:
            const += c * new.const
            for v, d in new.terms:
                kept[v] = kept.get(v, 0) + c * d
        return Aff.of(kept, const)

    def floordiv(self, aff: Aff, m: int, ranges: Ranges | None = None) -> Aff:
        """``floor(aff / m)`` for m > 0, simplified by dropping multiples of m and by the box of the rest."""
        if m == 1:
            return aff
        whole = Aff(tuple((v, int(c) // m) for v, c in aff.terms if c % m == 0))
        rest_terms = tuple((v, int(c)) for v, c in aff.terms if c % m)
        whole, const = whole + int(aff.const) // m, int(aff.const) % m
        if not rest_terms:
            return whole
        g = math.gcd(m, *(c for _, c in rest_terms))
        rest = Aff(tuple((v, c // g) for v, c in rest_terms), const // g)
        m //= g
        if m == 1:
            return whole + rest
        if ranges is not None:
            low, high = self.lower(rest, ranges), self.upper(rest, ranges)
            if low > -INF and high < INF and low // m == high // m:
                return whole + int(low // m)
        if len(rest.terms) == 1 and rest.terms[0][0] >= FIRST_DIV and rest.terms[0][1] == 1:
            # floor((floor(a / n) + k) / m) is floor((a + n k) / (n m))
            inner, n = self.div_of[rest.terms[0][0]]
            return whole + self.floordiv(inner + int(rest.const) * n, n * m, ranges)
        key = (rest, m)
        var = self._divs.get(key)
        if var is None:
            var = FIRST_DIV + len(self._divs)
            self._divs[key] = var
            self.div_of[var] = key
            self._deep[var] = self.vars(rest)
        return whole + Aff.var(var)

    def settle(self, aff: Aff, ranges: Ranges) -> Aff:
        """Floor divisions inside ``aff`` simplified again, now that a tighter box is known."""
        for v, c in aff.terms:
            if v >= FIRST_DIV:
                inner, m = self.div_of[v]
                new = self.floordiv(self.settle(inner, ranges), m, ranges)
                if new != Aff.var(v):
                    aff = aff - Aff(((v, c),)) + new * c
        return aff

    def lower(self, aff: Aff, ranges: Ranges) -> Number:
        """A number that ``aff`` never falls below on the box; -inf where none is known."""
        terms = aff.terms
        if terms and terms[-1][0] >= FIRST_DIV:
            v, c = terms[-1]
            return max(self._lower_by_interval(aff, v, c, ranges), self._lower_by_remainder(aff, v, c, ranges))
        total = aff.const
        left: dict[int, Number] = {}
        for v, c in terms:
            if (found := ranges.get(v)) is None:
                left[v] = left.get(v, 0) + c
                continue
            end = found[0] if c > 0 else found[1]
            total += c * end.const
            for w, d in end.terms:
                left[w] = left.get(w, 0) + c * d
        return self._lower_of_sizes(Aff.of(left, total), ranges) if left else _const(total)

    def _lower_of_sizes(self, rest: Aff, ranges: Ranges) -> Number:
        """The same of a form whose indices have been replaced by the ends of their ranges."""
        total: Number = rest.const
        for v, c in rest.terms:
            if v >= FIRST_DIV:
                return self.lower(rest, ranges)
            if v not in self.symbol_range:
                return -INF
            low, high = self.symbol_range[v]
            total += c * (low if c > 0 else high)
        return total

    def upper(self, aff: Aff, ranges: Ranges) -> Number:
        """A number that ``aff`` never exceeds on the box; inf where none is known."""
        return -self.lower(-aff, ranges)

    def _lower_by_interval(self, aff: Aff, v: int, c: Number, ranges: Ranges) -> Number:
        inner, m = self.div_of[v]
        bound = self.lower(inner, ranges) if c > 0 else self.upper(inner, ranges)
        if not math.isfinite(bound):
            return -INF
        return self.lower(aff.without(v) + int(bound // m) * c, ranges)

    def _lower_by_remainder(self, aff: Aff, v: int, c: Number, ranges: Ranges) -> Number:
        # m * floor(a/m) = a - rem with rem in [0, m-1]: exact where `a` cancels against the rest of the form.
        inner, m = self.div_of[v]
        scaled = aff.without(v) * m + inner * c - (c * (m - 1) if c > 0 else 0)
        low = self.lower(scaled, ranges)
        return -INF if low == -INF else low / m if not isinstance(low, int) else -((-low) // m)

    def guard(self, aff: Aff) -> Aff:
        """The condition ``aff >= 0`` with coprime integer coefficients, and without a floor division alone.

        ``floor(a / m) >= k`` is ``a >= m k``, and ``floor(a / m) <= k`` is ``a <= m k + m - 1``.
        """
        if len(aff.terms) == 1 and (v := aff.terms[0][0]) >= FIRST_DIV:
            (inner, m), c = self.div_of[v], aff.terms[0][1]
            if c > 0:
                return self.guard(inner + m * (int(aff.const) // int(c)))
            return self.guard(-inner + m * (int(aff.const) // int(-c)) + m - 1)
        g = math.gcd(*(int(c) for _, c in aff.terms)) if aff.terms else 0
        if g > 1:
            return Aff(tuple((v, int(c) // g) for v, c in aff.terms), int(aff.const) // g)
        return aff


def box(shape: Iterable[Aff]) -> dict[int, Range]:
    """The ranges of the free dimensions of a tensor of this shape."""
    return {d: (ZERO, n - 1) for d, n in enumerate(shape)}
