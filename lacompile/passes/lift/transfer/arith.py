"""Sums, products and casts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..domain.affine import Aff
from ..domain.kinds import Table
from ..domain.precision import EXACT_UP_TO
from ..domain.space import box
from ..domain.term import Case, Precision, Term, Val, constant, value
from ..engine import SMALLEST, GiveUp
from . import Op, rule
from .conditions import both

aten = torch.ops.aten


@rule(aten._to_copy)
def cast(op: Op) -> Val:
    """The identity between floating formats, and wherever the numbers are known to stay what they are.

    In eight bits little is left of a number, and a program that computes with that means it.
    """
    v: Val = op.args[0]
    source, target = op.dtypes[0], op.out.dtype
    floats = source is None or source.is_floating_point
    if source == target or (floats and target in EXACT_UP_TO):
        if source is not None and EXACT_UP_TO.get(source, 0) > EXACT_UP_TO[target]:
            products = {frozenset(t.signature or t.leaves) for c in v.cases for t in c.terms}
            op.engine.narrowed |= products - {frozenset()}
        return v
    if op.engine.index_only(v) and not floats and target is not torch.bool:
        return v
    if source is torch.bool and target.is_floating_point:
        if not op.engine.plain(v) or any(len(t.accs) > 1 for t in v.terms):
            return v  # a mask of tokens on a part of the positions, or masks of both positions
    return op.engine.pointwise(aten._to_copy.default, [v], {"dtype": target}, op.out)


@rule(aten.add)
def add(op: Op) -> Val:
    return added(op, op.operand(0), op.operand(1), float(op.arg(2, "alpha", 1)))


def added(op: Op, a: Val, b: Val, alpha: float = 1.0) -> Val:
    return op.engine.add(a, op.engine.scale(b, alpha), op.out)


@rule(aten.sub)
def sub(op: Op) -> Val:
    return added(op, op.operand(0), op.operand(1), -float(op.arg(2, "alpha", 1)))


@rule(aten.rsub)
def rsub(op: Op) -> Val:
    return added(op, op.operand(1), op.operand(0), -float(op.arg(2, "alpha", 1)))


@rule(aten.neg)
def neg(op: Op) -> Val:
    return op.engine.scale(op.args[0], -1.0)


@rule(aten.mul)
def mul(op: Op) -> Val:
    if any(d is torch.bool for d in op.dtypes if d) and op.out.dtype is torch.bool:
        return both(op)
    if (op.engine.choices.weighed_whole or not op.engine.weighed) and _weighs_features(op):
        op.engine.weighed = True
        if op.engine.choices.weighed_whole:
            raise GiveUp("features times known numbers, which are taken as they are")
    number = op.args[1]
    if isinstance(number, torch.SymInt | torch.SymFloat):
        v = op.operand(0)
        # a size is a number of tokens beside rates and positions: exp(-slope * n) is the decay of so many
        if isinstance(number, torch.SymFloat) or op.engine.contracts(v):
            return op.engine.times_number(v, op.engine.scalar(number))
    return op.engine.multiply(op.operand(0), op.operand(1))


def _weighs_features(op: Op) -> bool:
    """Whether data of one token or chunk is multiplied by known numbers along its last dimension, and by no weight."""
    if not all(isinstance(x, Val) for x in op.args):
        return False
    engine = op.engine
    taken = [v if v.taken is None else value(v.shape, [v.taken]) for v in op.args]
    return any(engine.in_part(w) and engine.of_features(v, w) for v, w in (taken, taken[::-1]))


@rule(aten.div)
def div(op: Op) -> Val:
    mode, by = op.kwargs.get("rounding_mode"), op.args[1]
    if mode is None and isinstance(by, torch.SymInt | torch.SymFloat):
        return op.engine.times_number(op.operand(0), op.engine.scalar(by, inverse=True))
    a, b = op.operand(0), op.operand(1)
    divisor = b.number
    if mode is not None:
        return floor_divided(op, a, divisor, mode)
    if divisor is not None:
        if divisor == 0:
            raise GiveUp("division by zero")
        return op.engine.scale(a, 1.0 / divisor)
    if _at_two_places(op, a, b):
        raise GiveUp("a quotient c_i / c_j, which is finite where 1 / c_j may not be")
    return op.engine.multiply(a, inverse(op, b))


def _at_two_places(op: Op, a: Val, b: Val) -> bool:
    """Whether a tensor of data is divided by itself at another place, as a running product is, which may be very small.

    Taken apart, 1 / c_j would be a factor of the keys. A sum from the first position on, as of a row of scores, is no
    smaller than what it begins with; in fp16 one over it may still be none, where the scores are small.
    """
    x, y = a.taken, b.taken
    if x is None or y is None:
        return False
    space, wide = op.engine.space, op.out.dtype is not torch.float16
    later = {
        v for g in y.guards for v, c in g.terms if v < 0 < c and len(space.vars(g)) > 1 and not _ends_with(y, g, v)
    }

    def elsewhere(idx: Sequence[Aff], at: Sequence[Aff]) -> bool:
        other = (i for i, j in zip(idx, at, strict=True) if i != j)
        return not all(wide and any(v < 0 and v not in later for v, _ in i.terms) for i in other)

    divided = {leaf for leaf, _ in x.accs}
    apart = {a for a, idx in y.accs if a in divided and all(elsewhere(idx, at) for b, at in x.accs if b == a)}
    found = [op.engine.leaves[leaf] for leaf in apart]
    return any(not isinstance(f.kind, Table) and f.interval[0] < SMALLEST for f in found)


def _ends_with(t: Term, begin: Aff, v: int) -> bool:
    """Whether the range of a bound index is as long everywhere, as that of a head's features among those of all."""
    return any(g.coef(v) == -begin.coef(v) and (g + begin).is_const for g in t.guards)


@rule(aten.addcmul)
def addcmul(op: Op) -> Val:
    product = op.engine.multiply(op.operand(1), op.operand(2))
    return added(op, op.operand(0), product, float(op.kwargs.get("value", 1)))


@rule(aten.lerp)
def lerp(op: Op) -> Val:
    """``start + weight (end - start)``, each of them once: a state that is mixed with something new stays one."""
    start, end, weight = (op.operand(n) for n in range(3))
    rest = added(op, constant(op.shape, 1.0), weight, -1.0)
    return added(op, op.engine.multiply(start, rest), op.engine.multiply(end, weight))


@rule(aten.floor_divide)
def floor_divide(op: Op) -> Val:
    return floor_divided(op, op.operand(0), op.operand(1).number, "floor")


@rule(aten.remainder)
def remainder(op: Op) -> Val:
    a, m = op.operand(0), op.operand(1).number
    whole = floor_divided(op, a, m, "floor")
    assert m is not None
    return op.engine.add(a, op.engine.scale(whole, -m), op.out)


def floor_divided(op: Op, a: Val, divisor: float | None, mode: str) -> Val:
    t = a.one
    if (
        mode != "floor"
        or a.precision is not Precision.EXACT
        or divisor is None
        or divisor <= 0
        or not float(divisor).is_integer()
        or t is None
        or t.accs
        or t.exp
        or t.guards
        or not all(float(x).is_integer() for x in (t.coef, t.poly.const, *(c for _, c in t.poly.terms)))
    ):
        raise GiveUp("a rounded division")
    poly = t.poly * int(t.coef)
    whole = Term(1.0, op.engine.space.floordiv(poly, int(divisor), box(a.shape)))
    return Val(a.shape, (Case(a.cases[0].guards, (whole,)),))


@rule(aten.reciprocal)
def reciprocal(op: Op) -> Val:
    c = op.args[0].number
    return constant(op.shape, 1.0 / c) if c else inverse(op, op.args[0])


def inverse(op: Op, v: Val) -> Val:
    """1 / v: of a weight the weight of the opposite exponent, of data a function symbol."""
    t = v.one
    if t is None or v.alt is not None or not t.exp or t.guards or not t.poly.is_const or op.engine.plain_term(t):
        return op.engine.pointwise(aten.reciprocal.default, [v], {}, op.out)
    rest = constant(v.shape, 1 / t.coef)
    if t.accs:
        data = value(v.shape, [Term(t.coef, accs=t.accs)])
        rest = op.engine.pointwise(aten.reciprocal.default, [data], {}, op.out)
    return rest.with_terms(lambda x: x.but(exp=t.exp * -1))
