"""Digits of roles: a role that a view of the program had split, as in ``k[h // 4]``, is handled as h // 4 and h % 4.

The digits of one role are flattened at the very end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from ...domain.affine import FIRST_DIV, FIRST_MIXED, ONE, ZERO, Aff, Range
from ...domain.exponent import Access
from ...domain.space import Space
from .pieces import CannotEmit

FIRST_DIGIT = 200
PER_ROLE = 20


class Digits:
    """The digits of a fixed list of roles, and their lengths.

    Args:
        space: the index space of the analysis.
        roles: role variable -> its length.
        accesses: every access that will be emitted, so that roles are split once and for all.
    """

    def __init__(self, space: Space, roles: Mapping[int, Aff], accesses: Sequence[Access]):
        self.space = space
        self.sizes: dict[int, Aff] = {}
        self._of: dict[int, tuple[int, ...]] = {}
        self._substitution: dict[int, Aff] = {}
        self._quotients: dict[int, Aff] = {}
        for role, size in roles.items():
            self._split(role, size, *self._cuts(role, accesses))
        self.order = self.of(roles)

    @property
    def ranges(self) -> dict[int, Range]:
        return {d: (ZERO, size - 1) for d, size in self.sizes.items()}

    def of(self, roles: Iterable[int]) -> list[int]:
        """The digits of these roles, the outermost first."""
        return [d for role in roles for d in self._of[role]]

    def over(self, a: Aff) -> Aff:
        """An index over roles as one over digits."""
        for v, c in a.terms:
            if v in self._quotients:
                a = a - Aff(((v, c),)) + self._quotients[v] * c
        return self.space.sub(a, self._substitution)

    def _cuts(self, role: int, accesses: Sequence[Access]) -> tuple[set[int], set[Aff]]:
        """What the accesses divide a role by: numbers, and symbolic sizes."""
        numbers: set[int] = set()
        symbolic: set[Aff] = set()
        for a in (a for _, idx in accesses for a in idx):
            for v, _ in a.terms:
                if v < FIRST_DIV or role not in self.space.vars(Aff.var(v)):
                    continue
                if v >= FIRST_MIXED:
                    _, (inner, *more) = self.space.mixed[v]
                    if inner != Aff.var(role) or len(more) != 1:
                        raise CannotEmit("a view of each tensor", f"index {a} of symbolic sizes")
                    symbolic.add(more[0])
                else:
                    inner, m = self.space.div_of[v]
                    if inner != Aff.var(role):
                        raise CannotEmit("a view of each tensor", f"index {inner} // {m}")
                    numbers.add(m)
        return numbers, symbolic

    def _split(self, role: int, size: Aff, cuts: set[int], symbolic: set[Aff]) -> None:
        if symbolic:
            self._split_in_two(role, size, symbolic, bool(cuts))
        elif cuts:
            self._split_at(role, size, cuts)
        else:
            self._of[role] = (role,)
            self.sizes[role] = size

    def _split_at(self, role: int, size: Aff, cuts: set[int]) -> None:
        """``role = sum digit_k * cut_k``, cuts ascending and each dividing the next."""
        if not size.is_const:
            raise CannotEmit("a view of each tensor", "a symbolic dimension that was split")
        steps = [1, *sorted(cuts), int(size.const)]
        if any(b % a for a, b in pairwise(steps)):
            raise CannotEmit("a view of each tensor", f"splits {steps} that do not nest")
        digits, whole = [], ZERO
        for n, (step, following) in enumerate(pairwise(steps)):
            digit = self._fresh() + n
            self.sizes[digit] = Aff.lit(following // step)
            digits.append(digit)
            if following // step > 1:
                whole = whole + Aff.var(digit) * step
        self._of[role] = tuple(reversed(digits))
        self._substitution[role] = whole
        for m in cuts:
            quotient = ZERO
            for digit, step in zip(digits, steps, strict=False):
                if step >= m and self.sizes[digit] != ONE:
                    quotient = quotient + Aff.var(digit) * (step // m)
            self._quotients[self.space.floordiv(Aff.var(role), m).terms[0][0]] = quotient

    def _split_in_two(self, role: int, size: Aff, cuts: set[Aff], others: bool) -> None:
        """A role that is split at a symbolic size."""
        cut = next(iter(cuts))
        outer = self.space.divided(size, cut)
        if len(cuts) > 1 or others or outer is None:
            raise CannotEmit("a view of each tensor", "a dimension that is split in several ways at symbolic sizes")
        first = self._fresh()
        self.sizes[first], self.sizes[first + 1] = outer, cut
        self._of[role] = (first, first + 1)
        self._substitution[role] = self.space.join(Aff.var(first), Aff.var(first + 1), cut)

    def _fresh(self) -> int:
        """The first of the numbers that the digits of the next role may have."""
        return FIRST_DIGIT + PER_ROLE * len(self._of)
