"""The leaf table of one analysis, and what is known of the entries of a leaf from what it is made of."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import fx

from .affine import FIRST_SYMBOL, ONE, Aff
from .exponent import Access
from .intervals import ANY, OPEN, POSITIVE, Interval, interval_of
from .kinds import Argument, Extended, Number, Opaque, Positions, Scalar, Symbol, Table

aten = torch.ops.aten

MAX_SYMBOL_INDICES = 24
NINE_DIGITS = 1e-9  # relative; coefficients of exponents are compared to as much

# Whatever positive numbers they are given, the result is positive.
POSITIVE_OF_POSITIVE = {
    aten.where.self, aten.mul.Tensor, aten.add.Tensor, aten.maximum.default, aten.minimum.default,
    aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default, aten.reciprocal.default, aten.sqrt.default,
    aten.detach.default, aten.lerp.Tensor,
}  # fmt: skip


@dataclass
class Leaf:
    kind: Opaque | Symbol | Table | Extended | Scalar | Positions
    shape: tuple[Aff, ...]
    dtype: torch.dtype
    interval: Interval = ANY
    rests_on: frozenset[fx.Node] = frozenset()
    """The inputs whose values the interval was read off."""
    constant: bool = False
    """Whether it is a buffer, whose numbers are the same in each call."""
    parameter: bool = False
    """Whether it is a parameter of a module as it stands: a product with one is a projection."""


class Leaves:
    """The leaf table of one analysis."""

    def __init__(self, shapes: dict[int, tuple[Aff, ...]]) -> None:
        self._all: list[Leaf] = []
        self._interned: dict[Any, int] = {}
        self._shapes = shapes
        self._bases: list[int] = []
        self._made: dict[int, np.ndarray] = {}
        self._multiples: dict[int, tuple[int, float]] = {}

    def __getitem__(self, leaf: int) -> Leaf:
        return self._all[leaf]

    def __len__(self) -> int:
        return len(self._all)

    def add(self, leaf: Leaf) -> int:
        self._all.append(leaf)
        self._shapes[len(self._all) - 1] = leaf.shape
        return len(self._all) - 1

    def intern(self, key: Any, leaf: Leaf) -> int:
        if key not in self._interned:
            self._interned[key] = self.add(leaf)
        return self._interned[key]

    def table(self, values: np.ndarray, shape: tuple[Aff, ...], made: np.ndarray | None = None) -> int:
        """Known numbers; ``made`` are what the program has made of them, where its format has rounded them."""
        array = np.array(values, dtype=np.float64, order="C")
        kind = Table(array.tobytes(), array.shape)
        interval = (float(array.min()), float(array.max())) if array.size else ANY
        leaf = self.intern(kind, Leaf(kind, shape, torch.float32, interval))
        before = self._made.setdefault(leaf, array if made is None else made)
        if made is not None and not np.array_equal(before, made):
            self._made[leaf] = array  # of several formats
        return leaf

    def made(self, leaf: int) -> np.ndarray:
        """The numbers of a table as the program computes with them; no rule that compares rates reads these."""
        return self._made[leaf]

    def multiple(self, leaf: int) -> tuple[int, float]:
        """``(base, c)``: the numbers of a table are ``c`` times those of the base, to nine significant digits.

        The rates of a chunk and of a token are one rate: log(gamma^64) is 64 log(gamma).
        """
        kind = self[leaf].kind
        if not isinstance(kind, Table):
            return leaf, 1.0
        if leaf not in self._multiples:
            self._multiples[leaf] = self._multiple_of_a_base(leaf, kind)
        return self._multiples[leaf]

    def _multiple_of_a_base(self, leaf: int, kind: Table) -> tuple[int, float]:
        mine, shape = kind.array, self[leaf].shape
        largest = int(np.abs(mine).argmax())
        for base in self._bases:
            other = self[base]
            assert isinstance(other.kind, Table)
            theirs = other.kind.array
            if other.shape == shape and theirs.flat[largest] and mine.flat[largest]:
                c = float(mine.flat[largest] / theirs.flat[largest])
                if np.allclose(theirs * c, mine, rtol=NINE_DIGITS, atol=0.0):
                    return base, float(round(c)) if abs(c - round(c)) <= NINE_DIGITS * abs(c) else c
        self._bases.append(leaf)
        return leaf, 1.0

    def extended(self, of: int) -> int:
        inner = self[of]
        if isinstance(inner.kind, Extended):
            return of
        low, high = inner.interval
        interval = (min(low, 0.0), max(high, 0.0))
        return self.intern(Extended(of), Leaf(Extended(of), inner.shape, inner.dtype, interval, inner.rests_on))

    def joined(self, leaf: int, outer: int, inner: int) -> int:
        """An opaque leaf with two dimensions as one, in the place of the inner one, whose size is a number."""
        found, sizes = self[leaf], list(self[leaf].shape)
        assert isinstance(found.kind, Opaque) and found.kind.joined is None
        sizes[inner] = sizes[outer] * int(sizes[inner].const)
        del sizes[outer]
        joined = replace(found, kind=replace(found.kind, joined=(outer, inner)), shape=tuple(sizes))
        return self.intern(("joined", leaf, outer, inner), joined)

    def scalar(self, kind: Scalar, interval: Interval) -> Access:
        return self.intern(kind, Leaf(kind, (), torch.float64, interval)), ()

    def at_position(self, place: Aff, length: Aff) -> Access:
        """A position as data; they have as many entries as are asked for."""
        return self.intern(Positions(), Leaf(Positions(), (length,), torch.float64)), (place,)

    def tensors(self, accesses: Iterable[Access]) -> tuple[Access, ...]:
        """Those that are more than one number, which is a factor as a coefficient is."""
        return tuple(a for a in accesses if not self._one_number(a))

    def _one_number(self, access: Access) -> bool:
        leaf, idx = access
        return self.counts(leaf) and not any(v < FIRST_SYMBOL for i in idx for v, _ in i.terms)

    def counts(self, leaf: int) -> bool:
        """Whether it is made of nothing but positions, and numbers that sizes decide."""
        kind = self[leaf].kind
        return isinstance(kind, Scalar | Positions) or (
            bool(made := self.made_of(leaf)) and all(map(self.counts, made))
        )

    def written(self, leaf: int) -> bool:
        """Whether it holds what the program makes of its own numbers, whether or not they are known."""
        kind = self[leaf].kind
        if isinstance(kind, Opaque):
            return kind.numbers
        return isinstance(kind, Table | Scalar | Positions) or (
            bool(made := self.made_of(leaf)) and all(map(self.written, made))
        )

    def same_in_each_call(self, leaf: int) -> bool:
        """Whether it is made of such numbers and of buffers alone."""
        made = self.made_of(leaf)
        return self[leaf].constant or self.written(leaf) or (bool(made) and all(map(self.same_in_each_call, made)))

    def symbol(self, op: Any, args: list[Any], kwargs: dict[str, Any], dtype: torch.dtype) -> Access | None:
        """The access of ``op(*args)`` where an argument is an ``(Access, dtype it is used in)`` pair or a number.

        None if the access would hold more than MAX_SYMBOL_INDICES indices.
        """
        idx: list[Aff] = []
        spec: list[Any] = []
        shape: list[Aff] = []
        intervals: list[Interval | None] = []
        rests_on: frozenset[fx.Node] = frozenset()
        for arg in args:
            if isinstance(arg, tuple):
                (leaf, where), used = arg
                native = self[leaf].dtype
                spec.append(Argument(leaf, len(where), used if used != native and used is not None else None))
                idx.extend(where)
                shape.extend(self[leaf].shape)
                known = self[leaf].interval
                intervals.append((0.0, 1.0) if known == ANY and self.truth(leaf) else known)
                rests_on |= self[leaf].rests_on
            else:
                spec.append(arg)
                number = arg.value if isinstance(arg, Number) else arg
                if number is None or (isinstance(number, int | float) and not isinstance(number, bool)):
                    intervals.append(None if number is None else (float(number), float(number)))
        if len(idx) > MAX_SYMBOL_INDICES:
            return None
        kind = Symbol(op, tuple(spec), tuple(sorted(kwargs.items())))
        if (same := self._less_twice(kind)) is not None and self[same].dtype == dtype:
            return (same, tuple(idx))
        squared = op is aten.mul.Tensor and len(args) == 2 and isinstance(args[0], tuple) and args[0] == args[1]
        interval = interval_of(aten.square, intervals[:1]) if squared else interval_of(op, intervals)
        if interval[0] == 0 and self._stays_above(kind):
            interval = (POSITIVE, interval[1])
        if interval == ANY and self._makes_truth(kind, dtype):
            interval = (0.0, 1.0)
        key = (kind, dtype, squared)  # of two places of one tensor it is another function, of another interval
        leaf = self.intern(key, Leaf(kind, tuple(shape), dtype, interval, rests_on))
        return (leaf, tuple(idx))

    def _stays_above(self, kind: Any, least: bool = True) -> bool:
        """Whether a function does not reach its least (or else its largest) value: tanh and erf, where it is that of
        infinity, and what is a multiple of one and a number more.
        """
        if not isinstance(kind, Symbol) or kind.kwargs:
            return False
        given = [a for a in kind.args if isinstance(a, Argument)]
        if len(given) != 1:
            return False
        below = self[given[0].leaf]
        if getattr(kind.op, "overloadpacket", kind.op) in OPEN:
            return math.isinf(below.interval[0 if least else 1])
        if kind.op not in (aten.add.Tensor, aten.mul.Tensor) or given[0].dtype is not None:
            return False
        numbers = [a.value if isinstance(a, Number) else a for a in kind.args if not isinstance(a, Argument)]
        if not all(isinstance(n, int | float) and n for n in numbers):
            return False
        falls = kind.op is aten.mul.Tensor and any(n < 0 for n in numbers)
        return self._stays_above(below.kind, least != falls)

    def truth(self, leaf: int) -> bool:
        """Whether a leaf is zeros and ones that a condition made: no gradient flows through it."""
        kind, dtype = self[leaf].kind, self[leaf].dtype
        return dtype is torch.bool or (isinstance(kind, Symbol) and self._makes_truth(kind, dtype))

    def _makes_truth(self, kind: Symbol, dtype: torch.dtype) -> bool:
        if dtype is torch.bool:
            return True
        given = [a for a in kind.args if isinstance(a, Argument)]
        if len(given) != 1:
            return False
        if kind.op is aten._to_copy.default:
            return self.truth(given[0].leaf)
        less = self.less_than_one(kind)
        return less is not None and self.truth(less.leaf)

    def share(self, leaf: int) -> bool:
        """Whether all entries lie between 0 and 1."""
        low, high = self[leaf].interval
        return self.truth(leaf) or 0 <= low <= high <= 1

    def shares_with(self, leaf: int) -> list[int]:
        """The leaves that must lie between 0 and 1 for this one to be positive: what numbers are mixed by."""
        kind = self[leaf].kind
        if self[leaf].interval[0] > 0 or not isinstance(kind, Symbol):
            return []
        mixed = kind.op is aten.lerp.Tensor and isinstance(kind.args[2], Argument)
        here = [kind.args[2].leaf] if mixed and not self.share(kind.args[2].leaf) else []
        inner = kind.args[:2] if mixed else kind.args
        return here + [n for a in inner if isinstance(a, Argument) for n in self.shares_with(a.leaf)]

    def positive_with(self, leaf: int) -> list[int]:
        """The leaves that must be positive for this one to be: itself, where what it is made of does not say so.

        A mask of tokens chooses between an input's decay and 1, for example.
        """
        kind = self[leaf].kind
        if self[leaf].interval[0] > 0:
            return []
        if not isinstance(kind, Symbol) or kind.op not in POSITIVE_OF_POSITIVE or kind.kwargs:
            return [leaf]
        given = {aten.where.self: kind.args[1:], aten.lerp.Tensor: kind.args[:2]}.get(kind.op, kind.args)
        tensors = [a for a in given if isinstance(a, Argument)]
        numbers = [a.value if isinstance(a, Number) else a for a in given if not isinstance(a, Argument)]
        if any(a.dtype is not None for a in tensors) or not all(n is None or n > 0 for n in numbers):
            return [leaf]
        return [n for a in tensors for n in self.positive_with(a.leaf)]

    def less_than_one(self, kind: Symbol) -> Argument | None:
        """The x of 1 - x."""
        if kind.op is not aten.add.Tensor or 1.0 not in kind.args:
            return None
        (given,) = (a for a in kind.args if isinstance(a, Argument))
        of = self[given.leaf].kind
        if not isinstance(of, Symbol):
            return None
        negated = of.op is aten.mul.Tensor and -1.0 in of.args and isinstance(of.args[0], Argument)
        return of.args[0] if negated and not of.kwargs and not kind.kwargs else None

    def _less_twice(self, kind: Symbol) -> int | None:
        """The x of 1 - (1 - x), which is x: what an average keeps that moves by 1 - x."""
        less = self.less_than_one(kind)
        of = None if less is None or less.dtype is not None else self[less.leaf].kind
        inner = self.less_than_one(of) if isinstance(of, Symbol) else None
        return None if inner is None or inner.dtype is not None else inner.leaf

    def made_of(self, leaf: int) -> tuple[int, ...]:
        """The leaves that this one is a function of, or a continuation."""
        kind = self[leaf].kind
        if isinstance(kind, Symbol):
            return tuple(a.leaf for a in kind.args if isinstance(a, Argument))
        return (kind.of,) if isinstance(kind, Extended) else ()

    def data(self, leaves: Iterable[int]) -> set[int]:
        """The leaves and all that they are made of."""
        work, found = list(leaves), set()
        while work:
            leaf = work.pop()
            if leaf not in found:
                found.add(leaf)
                work += self.made_of(leaf)
        return found

    def places(self, accesses: Iterable[Access]) -> set[tuple[Aff, Aff]]:
        """The numbers that are read at, each with the length of that dimension."""
        read = ((i, n) for leaf, idx in accesses for i, n in zip(idx, self._shapes[leaf], strict=True))
        return {(i, n) for i, n in read if i.is_const and n != ONE}
