"""A tensor at affine indices, as a chain of views: one dimension for each digit.

An index that mixes digits, ``48 h + d``, is an unflatten of a part that its steps fill, if they nest; a number is a
select, and a range a narrow, with a step perhaps, all of which must be known to lie inside the tensor.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch

from ....facts import Call, Expr
from ...domain.affine import FIRST_SYMBOL, ZERO, Aff, Number
from ...engine import Engine
from .calls import permuted, with_zeros
from .digits import Digits
from .lengths import size_of
from .pieces import CannotEmit, Piece


class Views:
    """Chains of views over the digits of an emitter."""

    def __init__(self, engine: Engine, digits: Digits):
        self.engine, self.space, self.digits = engine, engine.space, digits

    def indexed(
        self, base: Expr, shape: Sequence[Aff], idx: Sequence[Aff], dtype: torch.dtype, padded: bool = False
    ) -> Piece:
        """Views that turn ``base[idx]`` into one dimension per digit; ``padded`` with zeros where it is none."""
        expr = base
        held: list[int] = []  # the digit each remaining dimension runs over
        dim = 0
        for size, a in zip(shape, idx, strict=True):
            a = self.digits.over(a)
            if padded and (around := self._beyond(size, a)) is not None:
                expr, size = with_zeros(expr, dim, *around), self.digits.sizes[a.terms[0][0]]
                a = a - a.const
            expr, digits = self._dimension(expr, dim, size, a)
            held += digits
            dim += len(digits)
        if len(set(held)) != len(held):
            raise CannotEmit("a view of each tensor", "one index used for two dimensions of a tensor (a diagonal)")
        expr = permuted(expr, sorted(range(len(held)), key=lambda n: self.digits.order.index(held[n])))
        for n, digit in enumerate(self.digits.order):
            if digit not in held:
                expr = Call(torch.unsqueeze, (expr, n))
        return Piece(expr, frozenset(held), dtype)

    def bounds(self, a: Aff) -> tuple[int, int]:
        """The first and the last place that an index reads."""
        a = self.digits.over(a)
        low, high = self.space.lower(a, self.digits.ranges), self.space.upper(a, self.digits.ranges)
        if math.isinf(low) or math.isinf(high):
            raise CannotEmit("places that are numbers", f"index {a}")
        return int(low), int(high)

    def ends_by(self, a: Aff, size: Aff) -> bool:
        """Whether an index reads no place from ``size`` on."""
        return self.space.lower(size - 1 - self.digits.over(a), self.digits.ranges) >= 0

    def _dimension(self, expr: Expr, dim: int, size: Aff, a: Aff) -> tuple[Expr, list[int]]:
        """Dimension ``dim`` of length ``size`` indexed by ``a``: the digits it becomes, outermost first."""
        if not a.terms or all(v >= FIRST_SYMBOL for v, _ in a.terms):
            return self._selected(expr, dim, size, a), []
        if (joined := self.space.joined(a)) is not None:
            return self._parted(expr, dim, size, *joined)
        if turned := [v for v, c in a.terms if c < 0 and v in self.digits.sizes]:
            forwards = self.space.sub(a, {v: self.digits.sizes[v] - 1 - Aff.var(v) for v in turned})
            expr, digits = self._dimension(expr, dim, size, forwards)
            return Call(torch.flip, (expr, [dim + digits.index(v) for v in turned])), digits
        terms = sorted(a.terms, key=lambda t: t[1])
        if any(c <= 0 or v not in self.digits.sizes for v, c in terms):
            raise CannotEmit("a view of each tensor", f"index {a}")
        (v, c), (last, radix) = terms[0], terms[-1]
        if len(terms) == 1:
            return self._steps(expr, dim, size, Aff.lit(a.const), self.digits.sizes[v], int(c)), [v]
        step, length = int(c if c != 1 else terms[1][1]), self.digits.sizes[v]
        whole = self.digits.sizes[last] * radix
        in_steps = self.space.divided(size, Aff.lit(step)) is not None
        across = c == 1 and self.space.upper(length + int(a.const) % step, {}) > step
        if size != whole and (across or not in_steps):
            # whole steps are a part of the dimension: the heads of q, k and v in what holds gates, too
            start = _start(size, whole, a.const)
            return self._dimension(self._narrow(expr, dim, size, start, whole), dim, whole, a - start)
        rest = Aff(tuple(sorted(terms[1:])), a.const)
        expr, offset = self._split_off(expr, dim, size, step, rest)
        outer, above = self._outer(size, Aff.lit(step)), _divided(rest, step, offset)
        if c != 1:  # a stride, whose part that stays fixed is split off
            return self._dimension(Call(torch.select, (expr, dim + 1, offset)), dim, outer, Aff.var(v) + above)
        expr = self._narrow(expr, dim + 1, Aff.lit(step), Aff.lit(offset), length)
        expr, digits = self._dimension(expr, dim, outer, above)
        return expr, [*digits, v]

    def _selected(self, expr: Expr, dim: int, size: Aff, a: Aff) -> Expr:
        """One place of a dimension: a number, counted from its end where its length is none."""
        at = a - size if not a.is_const else a
        if not at.is_const:
            raise CannotEmit("a view of each tensor", f"a symbolic position {a}")
        self._inside(size, a, a + 1)
        return Call(torch.select, (expr, dim, int(at.const)))

    def _steps(self, expr: Expr, dim: int, size: Aff, start: Aff, count: Aff, step: int) -> Expr:
        """So many places of a dimension, of whose length the step need not be a divisor."""
        expr = self._narrow(expr, dim, size, start, (count - 1) * step + 1)
        return expr if step == 1 else Call(operator.getitem, (expr, (*[slice(None)] * dim, slice(None, None, step))))

    def _parted(self, expr: Expr, dim: int, size: Aff, i: Aff, j: Aff, radix: Aff) -> tuple[Expr, list[int]]:
        """A dimension indexed by ``i radix + j``, as one indexed by i and one of length ``radix`` by j."""
        outer = self._outer(size, radix)
        sizes = [size_of(self.engine, n) for n in (outer, radix)]
        expr, left = self._dimension(Call(torch.unflatten, (expr, dim, sizes)), dim, outer, i)
        expr, right = self._dimension(expr, dim + len(left), radix, j)
        return expr, [*left, *right]

    def _split_off(self, expr: Expr, dim: int, size: Aff, m: int, rest: Aff) -> tuple[Expr, int]:
        if any(c % m for _, c in rest.terms):
            raise CannotEmit("a view of each tensor", f"index {rest} in steps of {m}")
        sizes = [size_of(self.engine, self._outer(size, Aff.lit(m))), m]
        return Call(torch.unflatten, (expr, dim, sizes)), int(rest.const) % m

    def _outer(self, size: Aff, inner: Aff) -> Aff:
        """The length that is left of a dimension of which steps of ``inner`` are split off."""
        found = self.space.divided(size, inner)
        if found is None:
            raise CannotEmit("a view of each tensor", f"a dimension of length {size} in steps of {inner}")
        return found

    def _narrow(self, expr: Expr, dim: int, size: Aff, start: Aff, length: Aff) -> Expr:
        if start == ZERO and size == length:
            return expr
        space = self.space
        if not space.is_size(start) or not space.is_size(length):
            raise CannotEmit("a view of each tensor", f"a part [{start}, {start} + {length}) of a dimension")
        self._inside(size, start, start + length)
        return Call(torch.narrow, (expr, dim, size_of(self.engine, start), size_of(self.engine, length)))

    def _inside(self, size: Aff, start: Aff, end: Aff) -> None:
        if self.space.lower(start, {}) < 0 or self.space.lower(size - end, {}) < 0:
            raise CannotEmit(
                "tensors with an entry for each place of q, k, v or a gate (differences and shifted tokens that begin "
                "with a token, as torch.diff(x, prepend=...) does, and not with zeros)",
                f"places {start} to {end - 1} of a dimension of length {size}",
            )

    def _beyond(self, size: Aff, a: Aff) -> tuple[int, int] | None:
        """How far an index that moves by one leaves a dimension in front and behind; None if it stays inside."""
        if len(a.terms) != 1 or a.terms[0][1] != 1 or a.terms[0][0] not in self.digits.sizes:
            return None
        before, after = -a.const, self.digits.sizes[a.terms[0][0]] + a.const - size
        if not after.is_const or (before <= 0 and after.const <= 0):
            return None
        longest = max(int(before), int(after.const))
        return (int(before), int(after.const)) if self.space.lower(size - longest - 1, {}) >= 0 else None


def _start(size: Aff, whole: Aff, first: Number) -> Aff:
    """Where a part of length ``whole`` begins that is read from ``first`` on: there, or earlier if it ends too late.

    The last step need not be read to its end: of heads that hold q, k and v the values are its last third.
    """
    room = size - whole
    return Aff.lit(min(first, room.const) if room.is_const else first)


def _divided(rest: Aff, m: int, offset: int) -> Aff:
    return Aff(tuple((v, int(c) // m) for v, c in rest.terms), (int(rest.const) - offset) // m)
