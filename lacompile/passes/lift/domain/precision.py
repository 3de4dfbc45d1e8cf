"""How far the program's own numbers are those of the normal form, which is computed over the reals.

For positions and known numbers the difference matters where the program decides by them: a comparison, a rounding to
integers, the piece of a clamp that a position is on. What rounding may have changed decides nothing here; such an
operation gives up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from ...._compat import outside_modes
from .affine import ONE
from .intervals import BOUNDS, product
from .kinds import Table
from .leaves import Leaves
from .term import Case, Precision, Term, Val

if TYPE_CHECKING:
    from ..engine import Engine
    from ..transfer import Op

aten = torch.ops.aten

# Integers up to this size are exact in the format.
EXACT_UP_TO = {torch.bfloat16: 2**8, torch.float16: 2**11, torch.float32: 2**24, torch.float64: 2**53}
WIDE = (torch.float32, torch.float64, torch.int32)
"""Formats in which the length of a tensor is taken for small enough where it is not known."""
SHORT = (torch.bfloat16, torch.float16)
"""Formats in which a position, or a rate, is soon none that is near."""
NARROW = (torch.float32, torch.int32)
"""Those of which the memory of a machine may hold longer tensors."""
STEEPEST = 2**8  # step of positions from one to the next, where their number is not known
FINEST = 8  # binary digits after the point that are counted as exact
NOISE = 2.0**16  # times a rounding error of float32: no longer what rounding changes

# Continuous functions: what rounding changed in the argument changes the result as little.
SMOOTH = {
    aten.add, aten.sub, aten.rsub, aten.mul, aten.div, aten.neg, aten.reciprocal, aten.square, aten.pow, aten.sqrt,
    aten.rsqrt, aten.exp, aten.exp2, aten.expm1, aten.log, aten.log2, aten.log10, aten.log1p, aten.sigmoid,
    aten.log_sigmoid, aten.softplus, aten.silu, aten.gelu, aten.elu, aten.tanh, aten.sin, aten.cos, aten.erf,
    aten.where, *BOUNDS,
}  # fmt: skip
POSITIVE = (aten.exp, aten.exp2, aten.sigmoid, aten.softplus, aten.pow, aten.sqrt, aten.rsqrt)
SUMS, PRODUCTS = (aten.add, aten.sub, aten.rsub), (aten.mul, aten.div, aten.reciprocal, aten.square)
BOUNDED = (*BOUNDS, aten.relu)
RUNNING = (aten.cumsum, aten.sum)
IN_ORDER = (aten.view, aten.unsqueeze, aten.squeeze, aten.select, aten.slice, aten.expand, aten.alias)
"""Views that hold the same numbers in the same order, if they hold them all."""
MATRIX_PRODUCTS = (aten.mm, aten.bmm, aten.mv, aten.dot, aten.baddbmm, aten.mean)


def positional(leaves: Leaves, v: Val) -> bool:
    """Whether positions, known numbers or weights of such are a factor of some term; zero is a known number."""
    return any(not c.terms or any(_known(leaves, t) for t in c.terms) for c in v.cases)


def _known(leaves: Leaves, t: Term) -> bool:
    return not t.poly.is_const or _of_tables(leaves, t)


def _of_tables(leaves: Leaves, t: Term) -> bool:
    if t.accs:
        moving = leaves.tensors(t.accs)
        return not moving or any(isinstance(leaves[leaf].kind, Table) or leaves.counts(leaf) for leaf, _ in moving)
    rates = t.exp.monos
    return all(isinstance(leaves[leaf].kind, Table) for m in rates for leaf, _ in m)


def jumps(
    leaves: Leaves, op: Any, vals: Iterable[Any], formats: Iterable[torch.dtype | None], out: torch.dtype
) -> bool:
    """Whether rounding inside ``vals`` may change what ``op`` makes of them by more than rounding.

    A number beside a tensor is rounded to the tensor's format before anything is made of it.
    """
    packet = getattr(op, "overloadpacket", op)
    if packet in SMOOTH or (packet is aten._to_copy and out.is_floating_point):
        return False
    vals = list(vals)
    known = [v for v in vals if isinstance(v, Val) and positional(leaves, v)]
    if any(v.precision is not Precision.EXACT for v in known):
        return True
    used = {d if d.is_floating_point else torch.get_default_dtype() for d in formats if d is not None}
    numbers = [x for x in vals if isinstance(x, float)]
    return bool(known) and any(in_format(x, d) != x for x in numbers for d in used)


def in_format(x: float, dtype: torch.dtype) -> float:
    with outside_modes():
        return float(torch.tensor(x, dtype=dtype))


def decidable(op: Op, a: Val, b: Val) -> bool:
    """Whether the program finds the order of ``a`` and ``b`` that their normal forms have, entry by entry.

    It compares in one format: both must be exact in it, or one is 0 and the other has the right sign.
    """
    engine = op.engine
    formats = [d for d in op.dtypes if isinstance(d, torch.dtype)]
    if any(isinstance(x, float) for x in op.args) and not any(d.is_floating_point for d in formats):
        formats.append(torch.get_default_dtype())
    for x, y in ((a, b), (b, a)):
        if x.precision >= Precision.SIGN and y.precision is Precision.EXACT and y.single and not y.terms:
            return not any(_vanishes(x, d) for d in formats)
    if not a.precision is b.precision is Precision.EXACT:
        return False
    if not (engine.index_only(a) and engine.index_only(b)):
        return True
    return all(
        (held(engine, x, d) and (d not in NARROW or _never_long(engine, x))) or _between_whole_numbers(engine, x, y, d)
        for x, y in ((a, b), (b, a))
        for d in formats
    )


def _between_whole_numbers(engine: Engine, x: Val, other: Val, dtype: torch.dtype) -> bool:
    """Whether ``x`` is a number that rounding leaves between the same two integers, and ``other`` made of integers."""
    t = x.one
    if t is None or t.accs or t.exp or t.guards or not t.poly.is_const or _unit(engine, other) != 1:
        return False
    rounded = in_format(t.coef, dtype)
    return not rounded.is_integer() and not t.coef.is_integer() and math.floor(rounded) == math.floor(t.coef)


def _never_long(engine: Engine, v: Val) -> bool:
    """Whether an unknown length among the positions of ``v`` is that of two dimensions: no memory holds its square."""
    space = engine.space
    sizes = [space.vars(n) for n in v.shape]
    for c in v.cases:
        for d in {x for t in c.terms for x in space.vars(t.poly) if 0 <= x < len(sizes)}:
            if space.upper(v.shape[d], {}) == math.inf:
                if not any(sizes[d] & other for n, other in enumerate(sizes) if n != d):
                    return False
    return True


def held(engine: Engine, v: Val, dtype: torch.dtype) -> bool:
    """Whether every number of ``v``, made of positions and known numbers, is one of the format's."""
    if not dtype.is_floating_point:
        return True
    unit = _unit(engine, v)
    if unit is None:
        return False
    for c in v.cases:
        terms = [t for t in c.terms if not math.isinf(t.coef)]
        reach = sum(max(abs(t.coef * x) for x in ends(engine, v, c, t)) for t in terms)
        if math.isinf(reach):
            offset = max(abs(t.coef * t.poly.const) for t in terms)
            slope = max((abs(t.coef * k) for t in terms for _, k in t.poly.terms), default=0)
            if unit != 1 or dtype not in WIDE or offset > EXACT_UP_TO[dtype] / 2 or slope > STEEPEST:
                return False
        elif reach / unit > EXACT_UP_TO.get(dtype, 0):
            return False
    return True


def _unit(engine: Engine, v: Val) -> float | None:
    """The power of two, at most 1, that every number of ``v`` is a multiple of; None if there is none or it is tiny."""
    finest = 0
    for c in v.cases:
        for t in c.terms:
            if math.isinf(t.coef):
                continue
            kinds = [engine.leaves[leaf].kind for leaf, _ in t.accs]
            tables = [k.array for k in kinds if isinstance(k, Table)]
            if t.exp or len(tables) < len(kinds) or len(tables) > 1 or (tables and not t.poly.is_const):
                return None
            if any(x < 0 for a in t.affs() for x in engine.space.vars(a)):
                return None
            numbers = [t.poly.const * t.coef, *(k * t.coef for _, k in t.poly.terms)]
            digits = _digits(x * t.coef for x in tables[0].flat) if tables else _digits(numbers)
            if digits is None:
                return None
            finest = max(finest, digits)
    return 2.0**-finest


def _digits(numbers: Iterable[float]) -> int | None:
    """Binary digits after the point."""
    most = 0
    for x in numbers:
        n = next((n for n in range(FINEST + 1) if math.isfinite(x) and float(x * 2**n).is_integer()), None)
        if n is None:
            return None
        most = max(most, n)
    return most


def literal(x: float, dtype: torch.dtype) -> bool:
    """Whether a number of the program is one of the format's, and short; so is an infinite one."""
    if math.isinf(x):
        return dtype.is_floating_point
    return _digits([x]) is not None and (not dtype.is_floating_point or abs(x) <= EXACT_UP_TO.get(dtype, 0))


def ends(engine: Engine, v: Val, c: Case, t: Term) -> tuple[float, float]:
    """Bounds of an index-valued factor, times those of tables."""
    ranges = engine.ranges(v.shape, c.guards | t.guards)
    low, high = float(engine.space.lower(t.poly, ranges)), float(engine.space.upper(t.poly, ranges))
    for leaf, _ in t.accs:
        low, high = product((low, high), engine.leaves[leaf].interval)
    return low, high


def amplifies(op: Op, out: Val) -> bool:
    """Whether ``out`` is, as far as is known, made of what rounding changed: of a difference that is nearly nothing,
    or of rounded numbers times one so large that an error of theirs is none of rounding any more.
    """
    engine, packet = op.engine, op.func.overloadpacket
    given = [v for v in _values(op.args) if v.precision is not Precision.EXACT and positional(engine.leaves, v)]
    if packet in PRODUCTS:
        steps = (_size(engine, c.terms, steps_only=True) for c in out.cases)
        return any(v.precision is Precision.ROUNDED for v in given) and max(steps) > NOISE
    if packet not in SUMS or not given or (len(given) > 1 and _same_numbers(*given)):
        return False
    lost = []

    def compare(terms: list[tuple[Term, ...]]) -> tuple[Term, ...]:
        left, *before = (_size(engine, t) for t in terms)
        lost.append(left * NOISE < max(before) and not any(math.isinf(t.coef) for t in terms[0]))
        return ()

    engine.zip_cases([out, *(engine.broadcast(v, out.shape) for v in given)], compare)
    return any(lost)


def _same_numbers(a: Val, b: Val) -> bool:
    return a is b or (a.shape == b.shape and a.rounded is b.rounded is not None)


def numbers_of(op: Op, out: Val) -> object:
    """What stands for the numbers of a result: what does for those that it is a view of, in the same order, or nothing
    that any other value has.
    """
    given = op.args[0] if op.func.overloadpacket in IN_ORDER else None
    if isinstance(given, Val) and given.rounded is not None:
        if [n for n in given.shape if n != ONE] == [n for n in out.shape if n != ONE]:
            return given.rounded
    return object()


def _size(engine: Engine, terms: tuple[Term, ...], steps_only: bool = False) -> float:
    """The largest step from one position to the next, or number, of some terms; weights and data are left out.

    With ``steps_only``, of a term that has steps these alone, wherever it starts from.
    """
    most = 0.0
    for t in terms:
        if math.isinf(t.coef):
            continue  # of a mask
        steps = [abs(k) for _, k in t.poly.terms]
        size = abs(t.coef) * max(steps if steps and steps_only else [*steps, abs(t.poly.const)])
        for leaf, _ in t.accs:
            largest = max(map(abs, engine.leaves[leaf].interval))
            size *= largest if math.isfinite(largest) else 1.0
        most = max(most, size)
    return most


def result_precision(op: Op, out: Val, dtype: torch.dtype) -> Precision:
    """What the result of an operation that did not give up is, from what its arguments are.

    A number that is nothing in the format has lost its sign.
    """
    found = _after_one_rounding(op, out, dtype)
    return Precision.ROUNDED if found is not Precision.ROUNDED and _vanishes(out, dtype) else found


def _vanishes(v: Val, dtype: torch.dtype) -> bool:
    """Whether some number of the program's is so small that the format may have 0 for it."""
    if not dtype.is_floating_point:
        return False
    least = torch.finfo(dtype).tiny
    sizes = (abs(t.coef * x) for c in v.cases for t in c.terms for x in (t.poly.const, *(k for _, k in t.poly.terms)))
    return any(0 < size < least for size in sizes)


def _after_one_rounding(op: Op, out: Val, dtype: torch.dtype) -> Precision:
    """One operation of IEEE 754 rounds once: it is exact where its result is in the format, and never loses a sign."""
    engine, packet = op.engine, op.func.overloadpacket
    if not positional(engine.leaves, out):
        return Precision.EXACT
    tensors = _values(op.args)
    if packet in BOUNDED and not all(_known(engine.leaves, t) for v in tensors for c in v.cases for t in c.terms):
        return Precision.ROUNDED  # where data is at its bound, the program's own may be beside it
    given = [v for v in tensors if positional(engine.leaves, v)]
    worst = min((v.precision for v in given), default=Precision.EXACT)
    if not dtype.is_floating_point or op.func.is_view:  # the numbers of a view are places, and nothing is computed
        return worst
    numbers = [x for x in op.args if isinstance(x, int | float) and not isinstance(x, bool)]
    if packet in SUMS and op.arg(2, "alpha", 1) != 1:
        return Precision.ROUNDED
    if packet in SUMS and (any(v.single and not v.terms for v in tensors) or 0 in numbers[:1]):
        return worst
    exact = worst is Precision.EXACT and all(literal(x, dtype) for x in numbers)
    if packet in SUMS or packet in PRODUCTS:
        if exact and all(held(engine, v, dtype) for v in tensors):
            return Precision.EXACT if held(engine, out, dtype) else Precision.SIGN
        return Precision.ROUNDED if packet in SUMS else min(worst, Precision.SIGN)
    if packet in POSITIVE:
        return Precision.SIGN
    if packet in RUNNING:
        return Precision.EXACT if exact and _all_sums_held(op, out, dtype) else Precision.ROUNDED
    if packet in MATRIX_PRODUCTS or (packet in SMOOTH and packet not in (aten.neg, aten.where)):
        return Precision.ROUNDED
    # Views, selections, casts, factories: nothing is computed, but a number may be rounded to the format.
    same = bool(tensors) and all(d in (dtype, torch.bool) for d in _flat(op.dtypes) if d is not None)
    exact = exact and (same or held(engine, out, dtype))
    return Precision.EXACT if exact else min(worst, Precision.SIGN)


def _all_sums_held(op: Op, out: Val, dtype: torch.dtype) -> bool:
    """Whether the sums of all parts of what is summed are in the format, so that its order does not matter."""
    engine, summand = op.engine, op.args[0]
    total = summand
    for d, n in enumerate(summand.shape):
        shrinks = op.func.overloadpacket is aten.cumsum and d == op.dim(op.args[1], len(summand.shape))
        if shrinks or (op.func.overloadpacket is aten.sum and n.is_const):
            total = engine.scale(total, float(n.const)) if n.is_const else total
    known = all(n.is_const for n in summand.shape)
    return held(engine, out, dtype) and held(engine, total, dtype) and (known or dtype in WIDE)


def _values(args: Iterable[Any]) -> list[Val]:
    found: list[Val] = []
    for a in args:
        found += [a] if isinstance(a, Val) else _values(a) if isinstance(a, list | tuple) else []
    return found


def _flat(dtypes: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    for d in dtypes:
        found += _flat(d) if isinstance(d, tuple) else [d]
    return found
