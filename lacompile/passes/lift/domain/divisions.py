"""Symbolic sizes, floor divisions, and the bounds of affine forms over a box."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from .affine import FIRST_DIV, FIRST_MIXED, FIRST_SYMBOL, INF, Aff, Number, Ranges

Key = TypeVar("Key")


class Interned(dict[int, Key]):
    """Functions of forms, each of which is one variable from ``first`` on."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self._first = first
        self._variables: dict[Key, int] = {}

    def variable(self, key: Key) -> int:
        var = self._variables.get(key)
        if var is None:
            var = self._variables[key] = self._first + len(self)
            self[var] = key
        return var


class Divisions:
    """Symbolic sizes, floor divisions by numbers, and the bounds of affine forms over a box.

    What a symbolic radix needs besides is in :class:`~.space.Space`, which every analysis has one of.
    """

    def __init__(self) -> None:
        self.symbol_range: dict[int, tuple[Number, Number]] = {}
        self.div_of: Interned[tuple[Aff, int]] = Interned(FIRST_DIV)
        self._deep: dict[int, frozenset[int]] = {}

    def symbol(self, low: Number, high: Number) -> int:
        """A new size variable known to lie in ``[low, high]``."""
        var = FIRST_SYMBOL + len(self.symbol_range)
        self.symbol_range[var] = (low, high)
        return var

    def is_size(self, aff: Aff) -> bool:
        """Whether it is a number, or one in each run of the program."""
        return all(v in self.symbol_range for v in self.vars(aff))

    def vars(self, aff: Aff) -> frozenset[int]:
        """Every variable ``aff`` depends on, those inside floor divisions included."""
        if not aff.terms or aff.terms[-1][0] < FIRST_DIV:  # one call less than ``aff.divides``, in the hottest place
            return aff.vars
        return frozenset().union(*[self._deep[v] if v >= FIRST_DIV else (v,) for v, _ in aff.terms])

    def vars_of(self, affs: Iterable[Aff]) -> frozenset[int]:
        """Every variable that some of the forms depend on."""
        return frozenset().union(*[self.vars(a) for a in affs])

    def sub(self, aff: Aff, mapping: Mapping[int, Aff]) -> Aff:
        """``aff`` with variables replaced, inside floor divisions too."""
        moved: list[tuple[Number, Aff]] = []
        kept: dict[int, Number] = {}
        for v, c in aff.terms:
            new = mapping.get(v)
            if new is None and v >= FIRST_DIV and not self._deep[v].isdisjoint(mapping):
                new = self._made_again(v, lambda a: self.sub(a, mapping))
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
            for digit in sorted({math.gcd(m, int(c)) for _, c in rest.terms} - {1} | {m}, reverse=True):
                if (found := self.digits(rest, digit, ranges)) is not None:
                    return whole + self.floordiv(found, m // digit, ranges)
        if len(rest.terms) == 1 and FIRST_DIV <= rest.terms[0][0] < FIRST_MIXED and rest.terms[0][1] == 1:
            # floor((floor(a / n) + k) / m) is floor((a + n k) / (n m))
            inner, n = self.div_of[rest.terms[0][0]]
            return whole + self.floordiv(inner + int(rest.const) * n, n * m, ranges)
        var = self.div_of.variable((rest, m))
        if var not in self._deep:
            self._deep[var] = self.vars(rest)
        return whole + Aff.var(var)

    def digits(self, aff: Aff, m: int, ranges: Ranges) -> Aff | None:
        """``floor(aff / m)`` where what is no multiple of m stays between two of them; None where it may not.

        Of a coefficient it is what it is, or the remainder nearest to 0: ``63 i + j`` is ``64 i + (j - i)``.
        """
        as_is = Aff.of({v: c for v, c in aff.terms if c % m}, aff.const)
        nearest = Aff.of({v: m // 2 - (m // 2 - int(c)) % m for v, c in aff.terms}, aff.const)
        for rest in (as_is, nearest) if as_is != nearest else (as_is,):
            low, high = self.lower(rest, ranges), self.upper(rest, ranges)
            if low > -INF and high < INF and low // m == high // m:
                return Aff(tuple((v, int(c) // m) for v, c in (aff - rest).terms), int(low // m))
        return None

    def settle(self, aff: Aff, ranges: Ranges) -> Aff:
        """Floor divisions inside ``aff`` simplified again, now that a tighter box is known."""
        for v, c in aff.terms:
            if v >= FIRST_DIV:
                new = self._made_again(v, lambda a: self.settle(a, ranges), ranges)
                if new != Aff.var(v):
                    aff = aff - Aff(((v, c),)) + new * c
        return aff

    def _made_again(self, v: int, change: Callable[[Aff], Aff], ranges: Ranges | None = None) -> Aff:
        """The variable ``v`` of changed arguments."""
        if v >= FIRST_MIXED:
            return self.mixed_again(v, change)
        inner, m = self.div_of[v]
        return self.floordiv(change(inner), m, ranges)

    def mixed_again(self, v: int, change: Callable[[Aff], Aff]) -> Aff:
        """A variable of a symbolic radix, of changed arguments."""
        raise NotImplementedError

    def mixed_bound(self, v: int, below: bool, ranges: Ranges) -> Aff | None:
        """A form that such a variable never falls below, or never exceeds; None where none is known."""
        raise NotImplementedError

    def lower(self, aff: Aff, ranges: Ranges) -> Number:
        """A number that ``aff`` never falls below on the box; -inf where none is known."""
        terms = aff.terms
        if terms and terms[-1][0] >= FIRST_DIV:
            v, c = terms[-1]
            if v >= FIRST_MIXED:
                bound = self.mixed_bound(v, c > 0, ranges)
                return -INF if bound is None else self.lower(aff.without(v) + bound * c, ranges)
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
        return self._lower_of_sizes(Aff.of(left, total), ranges) if left else Aff.lit(total).const

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
        if len(aff.terms) == 1 and FIRST_DIV <= (v := aff.terms[0][0]) < FIRST_MIXED:
            (inner, m), c = self.div_of[v], aff.terms[0][1]
            if c > 0:
                return self.guard(inner + m * (int(aff.const) // int(c)))
            return self.guard(-inner + m * (int(aff.const) // int(-c)) + m - 1)
        g = math.gcd(*(int(c) for _, c in aff.terms)) if aff.terms else 0
        if g > 1:
            return Aff(tuple((v, int(c) // g) for v, c in aff.terms), int(aff.const) // g)
        return aff
