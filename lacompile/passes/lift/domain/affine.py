"""Integer-affine index arithmetic: the one kind of index the lift understands.

An :class:`Aff` is ``sum(coef * var) + const``. Variables are ints with one meaning per interval:

    0 .. 99          free dimension of the tensor at hand
    < 0              bound (summed) index, local to its term
    TAU              the running position inside a prefix sum
    1_000 ..         a symbolic size of the traced program
    1_000_000 ..     floor(aff / m), interned per analysis
    2_000_000 ..     the same with a symbolic m, and what a symbolic radix needs besides (space.py)

There is no modulo: ``a mod m = a - m * floor(a/m)``, so splitting a dimension and merging it again
cancels by linear algebra. Coefficients are ints for indices and floats in exponents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache

Number = int | float

MAX_DIMS = 100  # variables from 0 on below it are dimensions of the tensor at hand
TAU = 500
FIRST_SYMBOL = 1_000
FIRST_DIV = 1_000_000
FIRST_MIXED = 2_000_000
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

    __slots__ = ("_hash", "_key", "_vars", "const", "terms")

    def __init__(self, terms: tuple[tuple[int, Number], ...] = (), const: Number = 0):
        self.terms = terms
        self.const = const
        self._hash: int | None = None  # of most forms nobody asks
        self._vars: frozenset[int] | None = None

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
    @lru_cache(4096)
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
    def vars(self) -> frozenset[int]:
        """The variables that it is written with; a floor division is one of them, and what is inside it is not."""
        if self._vars is None:
            self._vars = frozenset([v for v, _ in self.terms])
        return self._vars

    @property
    def divides(self) -> bool:
        """Whether it is written with a floor division."""
        return bool(self.terms) and self.terms[-1][0] >= FIRST_DIV

    @property
    def is_const(self) -> bool:
        return not self.terms

    def __repr__(self) -> str:
        def name(v: int) -> str:
            if v < 0:
                return f"j{-v}"
            if v < MAX_DIMS:
                return f"x{v}"
            return "t" if v == TAU else f"s{v - FIRST_SYMBOL}" if v < FIRST_DIV else f"div{v - FIRST_DIV}"

        return self.spelled(name)

    def spelled(self, name: Callable[[int], str]) -> str:
        """The form with its variables by their names."""
        parts = [f"{'' if c == 1 else '-' if c == -1 else f'{c}*'}{name(v)}" for v, c in self.terms]
        if self.const or not parts:
            parts.append(str(self.const))
        return "+".join(parts).replace("+-", "-")


ZERO = Aff()
ONE = Aff((), 1)

Range = tuple[Aff, Aff]
Ranges = Mapping[int, Range]
