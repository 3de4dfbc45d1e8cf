"""From leaf accesses back to tensors: the recipe whose element at the role indices is the product of the accesses.

Roles are the index variables of a match (batch, head, position, feature). A role that the program had split by a view,
as in ``k[h // 4]``, is handled as its *digits*; the digits of one role are flattened at the very end.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from ..facts import Call, Const, Expr, Value
from .affine import FIRST_DIV, FIRST_MIXED, ONE, ZERO, Aff
from .engine import Engine
from .holders import is_part, place_of
from .leaves import Argument, Extended, Number, Opaque, Symbol, Table
from .term import Access, Mono

aten = torch.ops.aten


class CannotEmit(Exception):
    """An access that no chain of views yields, or a leaf that is no value of the graph."""

    def __init__(self, expected: str, found: str, node: fx.Node | None = None):
        super().__init__(found)
        self.expected, self.found, self.node = expected, found, node


@dataclass(frozen=True)
class Piece:
    """A recipe with one dimension per digit, in the emitter's order; ``present`` tells which are not of size 1."""

    expr: Expr
    present: frozenset[int]
    dtype: torch.dtype


FIRST_DIGIT = 200


class Emitter:
    """Emits accesses over a fixed list of roles.

    Args:
        engine: the analysis the accesses belong to.
        roles: role variable -> its length.
        accesses: every access that will be emitted, so that roles are split into digits once and for all.
        held: leaf -> (node, index) of graph nodes that hold a symbol leaf already.
        like: a value of the graph; what is made of known numbers alone lives on its device.
        exact: the format of known numbers.
        computed: how a leaf that no node holds, but of which it is known what it is, is computed.
    """

    def __init__(
        self,
        engine: Engine,
        roles: Mapping[int, Aff],
        accesses: Sequence[Access],
        held: Mapping[int, tuple[fx.Node, tuple[Aff, ...]]],
        like: fx.Node,
        exact: torch.dtype,
        computed: Callable[[int], Expr],
    ):
        self.engine = engine
        self.computed = computed
        self.held = held
        self.like = Value(like)
        self.exact = exact
        self.sizes: dict[int, Aff] = {}
        self.digits: dict[int, tuple[int, ...]] = {}
        self._substitution: dict[int, Aff] = {}
        self._quotients: dict[int, Aff] = {}
        for role, size in roles.items():
            self._split(role, size, accesses)
        self.order = [d for role in roles for d in self.digits[role]]

    def _split(self, role: int, size: Aff, accesses: Sequence[Access]) -> None:
        cuts: set[int] = set()
        symbolic: set[Aff] = set()
        for _, idx in accesses:
            for a in idx:
                for v, _ in a.terms:
                    if v >= FIRST_MIXED and role in self.engine.space.vars(Aff.var(v)):
                        _, (inner, *more) = self.engine.space.mixed[v]
                        if inner != Aff.var(role) or len(more) != 1:
                            raise CannotEmit("a view of each tensor", f"index {a} of symbolic sizes")
                        symbolic.add(more[0])
                    elif v >= FIRST_DIV and role in self.engine.space.vars(Aff.var(v)):
                        inner, m = self.engine.space.div_of[v]
                        if inner != Aff.var(role):
                            raise CannotEmit("a view of each tensor", f"index {inner} // {m}")
                        cuts.add(m)
        if symbolic:
            self._split_in_two(role, size, symbolic, bool(cuts))
            return
        if not cuts:
            self.digits[role] = (role,)
            self.sizes[role] = size
            return
        if not size.is_const:
            raise CannotEmit("a view of each tensor", "a symbolic dimension that was split")
        # x = sum digit_k * cut_k, cuts ascending and each dividing the next
        steps = [1, *sorted(cuts), int(size.const)]
        if any(b % a for a, b in pairwise(steps)):
            raise CannotEmit("a view of each tensor", f"splits {steps} that do not nest")
        digits, whole = [], ZERO
        for n, (step, following) in enumerate(pairwise(steps)):
            digit = FIRST_DIGIT + 20 * len(self.digits) + n
            self.sizes[digit] = Aff.lit(following // step)
            digits.append(digit)
            if following // step > 1:
                whole = whole + Aff.var(digit) * step
        self.digits[role] = tuple(reversed(digits))
        self._substitution[role] = whole
        for m in cuts:
            quotient = ZERO
            for digit, step in zip(digits, steps, strict=False):
                if step >= m and self.sizes[digit] != ONE:
                    quotient = quotient + Aff.var(digit) * (step // m)
            self._quotients[self.engine.space.floordiv(Aff.var(role), m).terms[0][0]] = quotient

    def _split_in_two(self, role: int, size: Aff, cuts: set[Aff], others: bool) -> None:
        """A role that is split at a symbolic size."""
        (cut,), outer = list(cuts)[:1], self.engine.space.divided(size, next(iter(cuts)))
        if len(cuts) > 1 or others or outer is None:
            raise CannotEmit("a view of each tensor", "a dimension that is split in several ways at symbolic sizes")
        first = FIRST_DIGIT + 20 * len(self.digits)
        self.sizes[first], self.sizes[first + 1] = outer, cut
        self.digits[role] = (first, first + 1)
        self._substitution[role] = self.engine.space.join(Aff.var(first), Aff.var(first + 1), cut)

    # ---------------------------------------------------------------------------------------------------- accesses

    def _over_digits(self, a: Aff) -> Aff:
        for v, c in a.terms:
            if v in self._quotients:
                a = a - Aff(((v, c),)) + self._quotients[v] * c
        return self.engine.space.sub(a, self._substitution)

    def access(self, access: Access) -> Piece:
        leaf_id, idx = access
        leaf = self.engine.leaves[leaf_id]
        kind = leaf.kind
        if isinstance(kind, Opaque):
            if kind.node is None and kind.reading is not None:
                return self._indexed(self.computed(leaf_id), leaf.shape, idx, leaf.dtype)
            if kind.node is None:
                raise CannotEmit("a value of the traced graph", f"a value inside an operation ({kind.label})")
            return self._indexed(Value(kind.node), leaf.shape, idx, leaf.dtype)
        if leaf_id in self.held:
            node, pattern = self.held[leaf_id]
            with suppress(CannotEmit):  # a part of it is held, and another read: then it is computed
                found = self._through(node, pattern, idx)
                if found is not None:
                    return found
        if isinstance(kind, Table):
            numbers = Const(_nested(kind.array), self.like, self.exact)
            return self._indexed(numbers, leaf.shape, idx, self.exact)
        if isinstance(kind, Extended):
            return self._extended(kind.of, idx)
        assert isinstance(kind, Symbol)
        return self._symbol(kind, idx, leaf.dtype)

    def _extended(self, leaf_id: int, idx: tuple[Aff, ...]) -> Piece:
        """A leaf read beyond its ends too, where it is zero: a value of the graph, padded."""
        leaf = self.engine.leaves[leaf_id]
        if isinstance(leaf.kind, Opaque) and leaf.kind.node is not None:
            return self._indexed(Value(leaf.kind.node), leaf.shape, idx, leaf.dtype, padded=True)
        if leaf_id in self.held:
            node, pattern = self.held[leaf_id]
            whole = not is_part(self.engine.shape(node.meta["example_value"]), pattern, leaf.shape)
            if whole and (found := self._through(node, pattern, idx, padded=True)) is not None:
                return found
        return self.access((leaf_id, idx))

    def _through(
        self, node: fx.Node, pattern: tuple[Aff, ...], idx: tuple[Aff, ...], padded: bool = False
    ) -> Piece | None:
        """Reads a symbol leaf from a node that holds it: pattern tells which dimension of the node each index is."""
        example = node.meta.get("example_value")
        if not isinstance(example, torch.Tensor):
            return None
        at: dict[int, Aff] = {}
        for p, i in zip(pattern, idx, strict=True):
            if (d := place_of(p)) is not None and at.setdefault(d, i) != i:
                return None
        if any(self.engine.space.sub(p, at) != i for p, i in zip(pattern, idx, strict=True)):
            return None
        shape = self.engine.shape(example)
        index = tuple(at.get(d, ZERO) for d in range(len(shape)))
        return self._indexed(Value(node), shape, index, example.dtype, padded)

    def _symbol(self, kind: Symbol, idx: tuple[Aff, ...], dtype: torch.dtype) -> Piece:
        args: list[Any] = []
        present: frozenset[int] = frozenset()
        start = 0
        for arg in kind.args:
            if isinstance(arg, Argument):
                piece = self.access((arg.leaf, idx[start : start + arg.rank]))
                start += arg.rank
                if arg.dtype is not None and arg.dtype != piece.dtype:
                    piece = cast(piece, arg.dtype)
                if kind.op is aten.log.default and not self.engine.leaves.truth(arg.leaf):
                    piece = _above_zero(piece)
                    dtype = piece.dtype
                args.append(piece.expr)
                present |= piece.present
            elif isinstance(arg, Number):
                args.append(Const(arg.value if arg.scalar else (arg.value,), self.like, arg.dtype))
            else:
                args.append(arg)
        return Piece(Call(kind.op, tuple(args), dict(kind.kwargs)), present, dtype)

    def _indexed(
        self, base: Expr, shape: Sequence[Aff], idx: Sequence[Aff], dtype: torch.dtype, padded: bool = False
    ) -> Piece:
        """Views that turn ``base[idx]`` into one dimension per digit; ``padded`` with zeros where it is none."""
        expr = base
        held: list[int] = []  # the digit each remaining dimension runs over
        dim = 0
        for size, a in zip(shape, idx, strict=True):
            a = self._over_digits(a)
            if padded and (around := self._beyond(size, a)) is not None:
                expr, size = _with_zeros(expr, dim, *around), self.sizes[a.terms[0][0]]
                a = a - a.const
            expr, digits = self._dimension(expr, dim, size, a)
            held += digits
            dim += len(digits)
        if len(set(held)) != len(held):
            raise CannotEmit("a view of each tensor", "one index used for two dimensions of a tensor (a diagonal)")
        ranked = sorted(range(len(held)), key=lambda n: self.order.index(held[n]))
        if ranked != list(range(len(held))):
            expr = Call(torch.permute, (expr, ranked))
        for n, digit in enumerate(self.order):
            if digit not in held:
                expr = Call(torch.unsqueeze, (expr, n))
        return Piece(expr, frozenset(held), dtype)

    def _dimension(self, expr: Expr, dim: int, size: Aff, a: Aff) -> tuple[Expr, list[int]]:
        """Dimension ``dim`` of length ``size`` indexed by ``a``: the digits it becomes, outermost first."""
        if not a.terms or all(v >= 1000 for v, _ in a.terms):
            at = a - size if not a.is_const else a
            if not at.is_const:
                raise CannotEmit("a view of each tensor", f"a symbolic position {a}")
            if self.engine.space.lower(a, {}) < 0 or self.engine.space.lower(size - 1 - a, {}) < 0:
                raise CannotEmit("indices inside the tensor", f"{a} of {size}")
            return Call(torch.select, (expr, dim, int(at.const))), []
        if (joined := self.engine.space.joined(a)) is not None:
            i, j, radix = joined
            outer = self.engine.space.divided(size, radix)
            if outer is None:
                raise CannotEmit("a view of each tensor", f"a dimension of length {size} in steps of {radix}")
            sizes = [size_of(self.engine, n) for n in (outer, radix)]
            expr, left = self._dimension(Call(torch.unflatten, (expr, dim, sizes)), dim, outer, i)
            expr, right = self._dimension(expr, dim + len(left), radix, j)
            return expr, [*left, *right]
        terms = sorted(a.terms, key=lambda t: t[1])
        if any(c <= 0 or v not in self.sizes for v, c in terms):
            raise CannotEmit("a view of each tensor", f"index {a}")
        (v, c), (last, radix) = terms[0], terms[-1]
        step = c if c != 1 or len(terms) == 1 else terms[1][1]
        whole = self.sizes[last] * radix
        if self.engine.space.divided(size, Aff.lit(int(step))) is None and size != whole:
            # a part of the dimension is made of whole steps: the heads of q in what holds q, k, v and gates
            start = Aff.lit(int(a.const))
            return self._dimension(self._narrow(expr, dim, size, start, whole), dim, whole, a - start)
        rest = Aff(tuple(sorted(terms[1:])), a.const)
        if c != 1:
            # a stride: split off the part that stays fixed
            expr, offset = self._split_off(expr, dim, size, int(c), rest)
            inner = Call(torch.select, (expr, dim + 1, offset))
            return self._dimension(
                inner, dim, self._quotient(size, int(c)), Aff.var(v) + _divided(rest, int(c), offset)
            )
        length = self.sizes[v]
        if not rest.terms:
            return self._narrow(expr, dim, size, rest, length), [v]
        outer = int(terms[1][1])
        expr, offset = self._split_off(expr, dim, size, outer, rest)
        expr = self._narrow(expr, dim + 1, Aff.lit(outer), Aff.lit(offset), length)
        expr, digits = self._dimension(expr, dim, self._quotient(size, outer), _divided(rest, outer, offset))
        return expr, [*digits, v]

    def _beyond(self, size: Aff, a: Aff) -> tuple[int, int] | None:
        """How far an index that moves by one leaves a dimension in front and behind; None if it stays inside."""
        if len(a.terms) != 1 or a.terms[0][1] != 1 or a.terms[0][0] not in self.sizes:
            return None
        before, after = -a.const, self.sizes[a.terms[0][0]] + a.const - size
        if not after.is_const or (before <= 0 and after.const <= 0):
            return None
        longest = max(int(before), int(after.const))
        return (int(before), int(after.const)) if self.engine.space.lower(size - longest - 1, {}) >= 0 else None

    def _split_off(self, expr: Expr, dim: int, size: Aff, m: int, rest: Aff) -> tuple[Expr, int]:
        if any(c % m for _, c in rest.terms):
            raise CannotEmit("a view of each tensor", f"index {rest} in steps of {m}")
        sizes = [size_of(self.engine, self._quotient(size, m)), m]
        return Call(torch.unflatten, (expr, dim, sizes)), int(rest.const) % m

    def _quotient(self, size: Aff, m: int) -> Aff:
        found = self.engine.space.divided(size, Aff.lit(m))
        if found is None:
            raise CannotEmit("a view of each tensor", f"a dimension of length {size} in steps of {m}")
        return found

    def _narrow(self, expr: Expr, dim: int, size: Aff, start: Aff, length: Aff) -> Expr:
        if start == ZERO and size == length:
            return expr
        space = self.engine.space
        if not space.is_size(start) or not space.is_size(length):
            raise CannotEmit("a view of each tensor", f"a part [{start}, {start} + {length}) of a dimension")
        if space.lower(start, {}) < 0 or space.lower(size - start - length, {}) < 0:
            raise CannotEmit("indices inside the tensor", f"[{start}, {start + length}) of {size}")
        return Call(torch.narrow, (expr, dim, size_of(self.engine, start), size_of(self.engine, length)))

    # ----------------------------------------------------------------------------------------------------- products

    def product(self, accesses: Sequence[Access], factors: Sequence[Piece] = ()) -> Piece | None:
        """The product of accesses; None for the empty product."""
        pieces = [*(self.access(a) for a in accesses), *factors]
        if not pieces:
            return None
        out = pieces[0]
        for p in pieces[1:]:
            dtype = torch.promote_types(out.dtype, p.dtype)
            out = Piece(Call(torch.mul, (out.expr, p.expr)), out.present | p.present, dtype)
        return out

    def exponential(self, mono: Mono, coef: float) -> Piece:
        """In fp32 at least: what the program computed it in is not known, and it grows with the number of steps."""
        inner = self.product(mono)
        assert inner is not None
        inner = cast(inner, torch.promote_types(inner.dtype, torch.float32))
        scaled = inner.expr if coef == 1 else Call(torch.mul, (inner.expr, coef))
        return Piece(Call(torch.exp, (scaled,)), inner.present, inner.dtype)

    def summed(self, piece: Piece, roles: Sequence[int]) -> Piece:
        """The sum over those of the roles that the piece has."""
        digits = {d for role in roles for d in self.digits[role]} & piece.present
        if not digits:
            return piece
        dims = [n for n, d in enumerate(self.order) if d in digits]
        return Piece(Call(torch.sum, (piece.expr, dims, True)), piece.present - digits, piece.dtype)

    def assemble(self, piece: Piece, groups: Sequence[Sequence[int]], shrink: Sequence[int] = ()) -> Expr:
        """One dimension per group of roles. Groups in ``shrink`` keep absent trailing digits unexpanded."""
        expr = piece.expr
        wanted: list[Any] = []
        expand = False
        short: list[int] = []
        position = {d: n for n, d in enumerate(self.order)}
        flat = [d for g in groups for role in g for d in self.digits[role]]
        for n, group in enumerate(groups):
            digits = [d for role in group for d in self.digits[role]]
            last = max((k for k, d in enumerate(digits) if d in piece.present), default=-1)
            for k, d in enumerate(digits):
                if d in piece.present or self.sizes[d] == ONE:
                    wanted.append(-1)
                elif n in shrink and k > last:
                    wanted.append(1)
                    short.append(d)
                else:
                    wanted.append(self.size(d))
                    expand = True
        order = [position[d] for d in flat]
        dropped = [n for n in range(len(self.order)) if n not in order]
        lost = [self.order[n] for n in dropped if self.order[n] in piece.present]
        if lost:
            raise CannotEmit("a factor over the dimensions of its operand", f"one that also holds {Aff.var(lost[0])}")
        for n in sorted(dropped, reverse=True):
            expr = squeezed(expr, n)
        ranks = {n: k for k, n in enumerate(sorted(order))}
        permutation = [ranks[n] for n in order]
        if permutation != list(range(len(permutation))):
            expr = Call(torch.permute, (expr, permutation))
        if expand:
            expr = Call(torch.broadcast_to, (expr, wanted))
        for at, group in enumerate(groups):
            count = sum(len(self.digits[role]) for role in group)
            if count == 0:
                expr = Call(torch.unsqueeze, (expr, at))
            elif count > 1:
                expr = Call(torch.flatten, (expr, at, at + count - 1))
        return expr

    def size(self, digit: int) -> Any:
        """The length of a digit, as a number or as a recipe for a symbolic one."""
        return size_of(self.engine, self.sizes[digit])


def size_of(engine: Engine, size: Aff) -> Any:
    """A number, or a recipe that computes it from the sizes among the inputs of the graph.

    Raises:
        CannotEmit: they do not say it.
    """
    if size in engine.size_nodes:
        return Value(engine.size_nodes[size])
    out: Any = int(size.const)
    for v, c in size.terms:
        part = _size_variable(engine, v)
        part = part if c == 1 else Call(operator.mul, (part, int(c)))
        out = part if isinstance(out, int) and out == 0 else Call(operator.add, (part, out))
    return out


def _size_variable(engine: Engine, v: int) -> Any:
    for known, node in engine.size_nodes.items():
        if len(known.terms) == 1 and known.terms[0][0] == v and known.terms[0][1] > 0 and not known.const:
            times = int(known.terms[0][1])
            return Value(node) if times == 1 else Call(operator.floordiv, (Value(node), times))
    factors = engine.space.factors_of(v)
    if factors:
        out = size_of(engine, factors[0])
        for f in factors[1:]:
            out = Call(operator.mul, (out, size_of(engine, f)))
        return out
    if FIRST_DIV <= v < FIRST_MIXED:
        inner, m = engine.space.div_of[v]
        return Call(operator.floordiv, (size_of(engine, inner), m))
    shown = engine.symints.get(Aff.var(v), Aff.var(v))
    raise CannotEmit("lengths computed from sizes and numbers", f"the symbolic length {shown}")


def squeezed(expr: Expr, dim: int) -> Expr:
    """``expr`` without its dimension ``dim`` of length 1; an unsqueeze that made it is undone instead."""
    if isinstance(expr, Call) and expr.op is torch.unsqueeze:
        inner, made = expr.args
        if made == dim:
            return inner
        shift = 1 if made < dim else 0
        return Call(torch.unsqueeze, (squeezed(inner, dim - shift), made - 1 + shift))
    if isinstance(expr, Call) and expr.op is torch.mul and isinstance(expr.args[1], float):
        return Call(torch.mul, (squeezed(expr.args[0], dim), expr.args[1]))
    return Call(torch.squeeze, (expr, dim))


def _with_zeros(expr: Expr, dim: int, before: int, after: int) -> Expr:
    """Zeros in front and behind; fewer of them than there are entries, and where less than none, entries less."""

    def part(start: int | None, end: int | None) -> Expr:
        return Call(operator.getitem, (expr, (*[slice(None)] * dim, slice(start, end))))

    kept = part(max(-before, 0) or None, min(after, 0) or None) if min(before, after) < 0 else expr
    front = [Call(torch.zeros_like, (part(0, before),))] if before > 0 else []
    behind = [Call(torch.zeros_like, (part(0, after),))] if after > 0 else []
    return Call(torch.cat, ([*front, kept, *behind], dim))


def _above_zero(piece: Piece) -> Piece:
    """A positive factor before its logarithm: where it has underflowed, so has what its gradient is multiplied by."""
    piece = cast(piece, torch.promote_types(piece.dtype, torch.float32))
    return Piece(Call(torch.clamp, (piece.expr, torch.finfo(piece.dtype).tiny)), piece.present, piece.dtype)


def cast(piece: Piece, dtype: torch.dtype) -> Piece:
    if piece.dtype == dtype:
        return piece
    return Piece(Call(torch.Tensor.to, (piece.expr, dtype)), piece.present, dtype)


def _divided(rest: Aff, m: int, offset: int) -> Aff:
    return Aff(tuple((v, int(c) // m) for v, c in rest.terms), (int(rest.const) - offset) // m)


def _nested(array: Any) -> Any:
    return float(array) if array.ndim == 0 else tuple(_nested(x) for x in array)
