"""A tensor at affine indices, as a chain of views: one dimension for each digit.

An index that mixes digits, ``48 h + d``, is an unflatten if strides nest and sizes divide; a number is a select, and a
range a narrow, both of which must be known to lie inside the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ....facts import Call, Expr
from ...domain.affine import FIRST_SYMBOL, ZERO, Aff
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
        ranges = {d: (ZERO, size - 1) for d, size in self.digits.sizes.items()}
        a = self.digits.over(a)
        low, high = self.space.lower(a, ranges), self.space.upper(a, ranges)
        if math.isinf(low) or math.isinf(high):
            raise CannotEmit("places that are numbers", f"index {a}")
        return int(low), int(high)

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
        step = c if c != 1 or len(terms) == 1 else terms[1][1]
        whole = self.digits.sizes[last] * radix
        if self.space.divided(size, Aff.lit(int(step))) is None and size != whole:
            # whole steps are a part of the dimension: the heads of q in what holds q, k, v and gates
            start = Aff.lit(a.const)
            return self._dimension(self._narrow(expr, dim, size, start, whole), dim, whole, a - start)
        rest = Aff(tuple(sorted(terms[1:])), a.const)
        if c != 1:  # a stride: split off the part that stays fixed
            m = int(c)
            expr, offset = self._split_off(expr, dim, size, m, rest)
            inner = Call(torch.select, (expr, dim + 1, offset))
            return self._dimension(inner, dim, self._outer(size, Aff.lit(m)), Aff.var(v) + _divided(rest, m, offset))
        length = self.digits.sizes[v]
        if not rest.terms:
            return self._narrow(expr, dim, size, rest, length), [v]
        outer = int(terms[1][1])
        expr, offset = self._split_off(expr, dim, size, outer, rest)
        expr = self._narrow(expr, dim + 1, Aff.lit(outer), Aff.lit(offset), length)
        expr, digits = self._dimension(expr, dim, self._outer(size, Aff.lit(outer)), _divided(rest, outer, offset))
        return expr, [*digits, v]

    def _selected(self, expr: Expr, dim: int, size: Aff, a: Aff) -> Expr:
        """One place of a dimension: a number, counted from its end where its length is none."""
        at = a - size if not a.is_const else a
        if not at.is_const:
            raise CannotEmit("a view of each tensor", f"a symbolic position {a}")
        if self.space.lower(a, {}) < 0 or self.space.lower(size - 1 - a, {}) < 0:
            raise CannotEmit("indices inside the tensor", f"{a} of {size}")
        return Call(torch.select, (expr, dim, int(at.const)))

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
        if space.lower(start, {}) < 0 or space.lower(size - start - length, {}) < 0:
            raise CannotEmit("indices inside the tensor", f"[{start}, {start + length}) of {size}")
        return Call(torch.narrow, (expr, dim, size_of(self.engine, start), size_of(self.engine, length)))

    def _beyond(self, size: Aff, a: Aff) -> tuple[int, int] | None:
        """How far an index that moves by one leaves a dimension in front and behind; None if it stays inside."""
        if len(a.terms) != 1 or a.terms[0][1] != 1 or a.terms[0][0] not in self.digits.sizes:
            return None
        before, after = -a.const, self.digits.sizes[a.terms[0][0]] + a.const - size
        if not after.is_const or (before <= 0 and after.const <= 0):
            return None
        longest = max(int(before), int(after.const))
        return (int(before), int(after.const)) if self.space.lower(size - longest - 1, {}) >= 0 else None


def _divided(rest: Aff, m: int, offset: int) -> Aff:
    return Aff(tuple((v, int(c) // m) for v, c in rest.terms), (int(rest.const) - offset) // m)
