"""Contractions: matrix products, sums and prefix sums, all of them products with a summed index."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace

import torch

from ..domain.affine import ONE, ZERO, Aff
from ..domain.intervals import ANY, product
from ..domain.kinds import Opaque
from ..domain.term import Case, Term, Val, constant, value
from ..engine import MAX_TERMS, Engine, GiveUp, bounded
from . import Op, rule
from .arith import added
from .exponentials import exponential

aten = torch.ops.aten

FRESH = -1_000_000


@rule(aten.bmm)
def bmm(op: Op) -> Val:
    return _of_batches(op, op.args[0], op.args[1])


@rule(aten.mm)
def mm(op: Op) -> Val:
    return _of_matrices(op, op.args[0], op.args[1])


@rule(aten.mv)
def mv(op: Op) -> Val:
    return product_sum(op, op.args[0], op.args[1], {0: 0}, {}, 1, 0)


@rule(aten.dot)
def dot(op: Op) -> Val:
    return product_sum(op, op.args[0], op.args[1], {}, {}, 0, 0)


@rule(aten.baddbmm)
def baddbmm(op: Op) -> Val:
    return _onto(op, _of_batches(op, op.args[1], op.args[2]))


@rule(aten.addmm)
def addmm(op: Op) -> Val:
    """A product added to a state; one with a bias is a projection."""
    onto: Val = op.args[0]
    if onto.cases[0].terms and not op.engine.structured(onto):
        raise GiveUp("a projection with a bias")
    return _onto(op, _of_matrices(op, op.args[1], op.args[2]))


@rule(aten.addr)
def addr(op: Op) -> Val:
    rows, columns = op.args[1:3]
    rows = op.engine.index(rows, {}, op.shape)
    columns = op.engine.index(columns, {0: Aff.var(1)}, op.shape)
    return _onto(op, op.engine.multiply(rows, columns))


def _of_batches(op: Op, a: Val, b: Val) -> Val:
    return product_sum(op, a, b, {0: 0, 1: 1}, {0: 0, 2: 2}, 2, 1)


def _of_matrices(op: Op, a: Val, b: Val) -> Val:
    return product_sum(op, a, b, {0: 0}, {1: 1}, 1, 0)


def _onto(op: Op, v: Val) -> Val:
    beta, alpha = op.kwargs.get("beta", 1), op.kwargs.get("alpha", 1)
    return added(op, op.engine.scale(op.operand(0), float(beta)), op.engine.scale(v, float(alpha)))


def product_sum(op: Op, a: Val, b: Val, keep_a: dict[int, int], keep_b: dict[int, int], sum_a: int, sum_b: int) -> Val:
    """sum over one index of a * b; ``keep`` maps the other dimensions to those of the result."""
    engine, shape = op.engine, op.shape
    length = a.shape[sum_a]
    if length == ONE:  # nothing is summed
        return engine.multiply(_kept(engine, a, keep_a, shape), _kept(engine, b, keep_b, shape))
    bound = Aff.var(FRESH)
    a, b = _operand(engine, a, sum_a, b), _operand(engine, b, sum_b, a)
    if _projects(engine, a, sum_a, b) or _projects(engine, b, sum_b, a):
        raise GiveUp("a projection of what is looked into")
    left, right = _over(engine, a, keep_a, sum_a, bound), _over(engine, b, keep_b, sum_b, bound)
    x, y = _as_one(engine, a), _as_one(engine, b)
    if x is not a or y is not b:
        whole = _over(engine, x, keep_a, sum_a, bound), _over(engine, y, keep_b, sum_b, bound)
        left, right = whole if _is_projection(engine, *whole) else (left, right)
    if len(left) * len(right) > MAX_TERMS * 4:
        raise GiveUp("a product of long sums")
    ranges = (Aff.var(FRESH), length - 1 - Aff.var(FRESH))
    terms = list(_products(engine, left, right, ranges))
    plain = engine.plain(a) and engine.plain(b)
    alt = _as_it_is(op, terms, [length]) if plain and terms else None
    return engine.sum_of(shape, terms, alt, MAX_TERMS)


def _as_it_is(op: Op, terms: Sequence[Term], lengths: Iterable[Aff], scale: float = 1.0) -> Term | None:
    """A sum of these over dimensions of these lengths as one leaf, not looked into."""
    engine = op.engine
    of = tuple(dict.fromkeys(leaf for t in terms for leaf, _ in t.accs))
    within = engine.within(terms)
    for n in () if within == ANY else lengths:
        within = product(within, (max(engine.space.lower(n, {}), 0.0), engine.space.upper(n, {})))
    kind = Opaque(None, str(op.func.overloadpacket), of)
    return engine.leaf(op.out, kind, **engine.lies_in(product(within, (scale, scale)), of)).one


def _projects(engine: Engine, v: Val, summed: int, weight: Val) -> bool:
    """Whether a structured value is multiplied by a parameter along a dimension that is no position of its weights.

    So is data that has a position added to it, or a multiple of one: ``x + arange(n) * p``.
    """
    t = weight.one
    if t is None or len(t.accs) != 1 or not engine.leaves[t.accs[0][0]].parameter:
        return False
    if not engine.structured(v) and not _beside_positions(engine, v):
        return False
    weights = (a for t in v.terms for a in (*t.guards, *(f for _, f in t.exp.lin), *(p for (_, p), _ in t.exp.sums)))
    return not any(a.coef(summed) for a in (*weights, *(t.poly for t in v.terms)))


def _beside_positions(engine: Engine, v: Val) -> bool:
    """Whether it is a sum of data, no parameter, and of what is proportional to a position."""
    if not v.single or all(t.poly.is_const for t in v.terms):
        return False
    data = {leaf for t in v.terms if t.poly.is_const for leaf in t.leaves}
    return bool(data) and not all(map(engine.of_parameters, data))


def _as_one(engine: Engine, v: Val) -> Val:
    """Data that is weighed, or a sum of such, as the one tensor that it is; all else, as an outer product, as it is."""
    if v.alt is not None or not engine.plain(v) or engine.index_only(v) or any(map(engine.outer_product, v.terms)):
        return v
    if [len(t.accs) + len(t.exp.lin) for t in v.terms] == [1]:
        return v
    with suppress(GiveUp):
        found = engine.access(v)
        if isinstance(found, tuple):
            return value(v.shape, [Term(accs=(found[0],))], precision=v.precision)
    return v


def _is_projection(engine: Engine, left: Sequence[Term], right: Sequence[Term]) -> bool:
    """Whether one tensor is projected by another: ``(norm(x) * w) @ W``, of which no factor is projected by itself."""
    if [len(t.accs) for t in left] != [1] or [len(t.accs) for t in right] != [1]:
        return False
    (x,), (y,) = left[0].accs, right[0].accs
    return engine.projects_by(x, y) or engine.projects_by(y, x)


def _operand(engine: Engine, v: Val, summed: int, other: Val) -> Val:
    """An operand as it will be multiplied; one whose weights move along the summed feature as the program holds it."""
    if engine.moves_along_a_feature(v, summed) and (held := engine.as_held(v)) is not None:
        return held
    if v.alt is not None and other.alt is not None and engine.structured(v) and engine.structured(other):
        return engine.whole(v)  # no state is a product of two sums: these are projections of a part of their features
    return engine.flat(v if _scores_of_the_last(engine, v, summed) else engine.pick_beside(v, other))


def _scores_of_the_last(engine: Engine, v: Val, summed: int) -> bool:
    """Whether it is the product of one token with all up to it, as a step that keeps its keys holds it."""
    t = v.one
    if v.alt is None or t is None or not t.bound(engine.space) or engine.projects(v):
        return False
    places = [{(i, engine.seen(n)) for i, n in zip(idx, engine.leaf_shapes[leaf], strict=True)} for leaf, idx in t.accs]
    rows = {(i, n) for read in places for i, n in read if i.is_const}
    lengths = {n for read in places for i, n in read if i == Aff.var(summed)}
    return any(n in lengths and v.shape[summed] - i in (ONE, ZERO) for i, n in rows)


def _kept(engine: Engine, v: Val, keep: dict[int, int], shape: tuple[Aff, ...]) -> Val:
    """An operand without its summed dimension, which has length 1, spread over the result."""
    return engine.index(v, {d: Aff.var(n) for d, n in keep.items() if d != n and v.shape[d] != ONE}, shape)


def _over(engine: Engine, v: Val, keep: dict[int, int], summed: int, bound: Aff) -> list[Term]:
    # Bound indices of the operand move far away first, so that the fresh one is not captured.
    mapping = {d: Aff.var(n) for d, n in keep.items() if d != n and v.shape[d] != ONE}
    mapping[summed] = bound
    return [t.sub(engine.space, mapping) for t in v.terms]


def _products(engine: Engine, left: Sequence[Term], right: Sequence[Term], ranges: Iterable[Aff]) -> Iterable[Term]:
    ranges = tuple(ranges)
    for x in left:
        for y in right:
            if math.isinf(x.coef) or math.isinf(y.coef):
                raise GiveUp("a contraction of a mask in log space")
            if not (x.poly.is_const or y.poly.is_const):  # queries and keys, each times its position and no sum
                if len(left) > 1 or len(right) > 1 or not engine.leaves.tensors((*x.accs, *y.accs)):
                    raise GiveUp("a contraction of positions")
                y = engine.counted(y)
            shared = {FRESH}
            own = {v for v in y.bound(engine.space) if v not in shared}
            taken = x.bound(engine.space) | own | shared
            start = min(v for v in taken if v not in shared) - 1 if len(taken) > 1 else -1
            if start <= FRESH:
                raise GiveUp("too many bound indices")
            y2 = y.sub(engine.space, {v: Aff.var(start - n) for n, v in enumerate(sorted(own, reverse=True))})
            term = Term(
                x.coef * y2.coef,
                y2.poly if x.poly.is_const else x.poly,
                tuple(sorted(x.accs + y2.accs)),
                x.exp + y2.exp,
                {*x.guards, *y2.guards, *ranges},
            )
            yield bounded(term)


@rule(aten.sum, aten.mean)
def total(op: Op) -> Val:
    _keeps_entries(op, op.arg(3, "dtype", None))
    v: Val = op.args[0]
    rank = len(v.shape)
    dims = op.arg(1, "dim", None)
    dims = list(range(rank)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
    dims = sorted(op.dim(d, rank) for d in dims)
    keepdim = bool(op.arg(2, "keepdim", False))
    if op.func.overloadpacket is aten.mean:
        count = math.prod(op.engine.length(v.shape[d]) for d in dims)
        return summed(op, v, dims, keepdim, 1.0 / count)
    return summed(op, v, dims, keepdim)


def _keeps_entries(op: Op, dtype: torch.dtype | None) -> None:
    """That entries are summed as they are: in a ``dtype`` that was asked for they are converted first.

    Raises:
        GiveUp: fractions are lost then, or numbers are truths.
    """
    source = op.dtypes[0]
    fractions = source is None or source.is_floating_point
    if dtype is torch.bool or (dtype is not None and fractions and not dtype.is_floating_point):
        raise GiveUp(f"a sum of what the entries are in {dtype}")


def summed(op: Op, v: Val, dims: Sequence[int], keepdim: bool, scale: float = 1.0) -> Val:
    engine = op.engine
    lengths = [v.shape[d] for d in dims]
    if ZERO in lengths:
        return constant(op.shape, 0.0)
    if all(n == ONE for n in lengths) and op.dtypes[0] is op.out.dtype and op.out.is_floating_point():
        return engine.scale(_of_one_entry(op, v, dims, keepdim), scale)
    if any(engine.moves_along_a_feature(v, d) for d in dims):
        v = engine.as_held(v) or v
    if v.alt is not None and not engine.structured(v) and not engine.scores_of_a_row(v, dims):
        raise GiveUp("a reduction of a projection")
    flat = engine.flat(v)
    if engine.plain(flat) and all(len(t.accs) < 2 for t in flat.terms) and any(t.accs for t in flat.terms):
        # A reduction of one tensor: a leaf for every purpose but a prefix total of log-decays.
        alt = _as_it_is(op, flat.terms, lengths, scale)
    else:
        alt = None
    if engine.plain(flat) and any(len(t.accs) >= 2 for t in flat.terms):
        alt = _as_it_is(op, flat.terms, lengths, scale)
    mapping: dict[int, Aff] = {}
    guards: list[Aff] = []
    kept = 0
    for d in range(len(v.shape)):
        if d in dims:
            if v.shape[d] != ONE:
                b = Aff.var(FRESH - d)
                mapping[d] = b
                guards += [b, v.shape[d] - 1 - b]
            kept += keepdim
            continue
        if kept != d and v.shape[d] != ONE:
            mapping[d] = Aff.var(kept)
        kept += 1
    terms = []
    for t in flat.terms:
        moved = t.sub(engine.space, mapping)
        terms.append(moved.but(guards=moved.guards | set(guards)))
    out = engine.scale(engine.sum_of(op.shape, terms), scale)
    if alt is None:
        return out
    if engine.structured(out) and all(len(set(t.accs)) == 1 for t in flat.terms):
        # Of a part of a dimension: of a chunk's tokens, which a decay is summed over, or of the features of a head.
        if engine.choices.parts_whole:
            return value(op.shape, [alt])
        engine.parts |= {t.signature for t in out.terms}
    return replace(out, alt=alt)


def _of_one_entry(op: Op, v: Val, dims: Sequence[int], keepdim: bool) -> Val:
    """A sum over dimensions of one entry each is these entries: the first of a row of sums is no tensor of its own."""
    kept = [d for d in range(len(v.shape)) if keepdim or d not in dims]
    return op.engine.index(v, {d: Aff.var(n) for n, d in enumerate(kept) if d != n and v.shape[d] != ONE}, op.shape)


@rule(aten.cumsum)
def cumsum(op: Op) -> Val:
    _keeps_entries(op, op.arg(2, "dtype", None))
    engine = op.engine
    v = engine.flat(op.args[0])
    if v.alt is not None:
        v = engine.pick(v)
    d = op.dim(op.args[1], len(v.shape))
    if v.shape[d] == ONE:
        return v
    b = Aff.var(FRESH)
    terms = []
    for t in v.terms:
        moved = t.sub(engine.space, {d: b})
        terms.append(moved.but(guards=moved.guards | {b, Aff.var(d) - b}))
    return engine.sum_of(v.shape, terms)


@rule(aten.cumprod)
def cumprod(op: Op) -> Val:
    """A running product of positive factors is the exponential of a running sum of logarithms."""
    engine = op.engine
    v: Val = op.args[0]
    d = op.dim(op.args[1], len(v.shape))
    v = engine.pick(v) if v.single else v
    logs = [(c.guards, x) for c in v.cases for x in _logarithm(engine, c)]
    if v.shape[d] == ONE:
        return v
    b = Aff.var(FRESH)
    terms = (x.but(guards=guards).sub(engine.space, {d: b}) for guards, x in logs)
    running = engine.sum_of(v.shape, (t.but(guards=t.guards | {b, Aff.var(d) - b}) for t in terms))
    return exponential(op, running, 1.0)


@rule(aten.prod)
def prod(op: Op) -> Val:
    """The product of positive factors at a part of the tokens, as the exponential of a sum of logarithms."""
    engine = op.engine
    v: Val = op.args[0]
    if op.func is not aten.prod.dim_int or op.dtypes[0] is not op.out.dtype or not op.out.is_floating_point():
        raise GiveUp("a product of all entries, or of what they are in another format")
    d, keepdim = op.dim(op.args[1], len(v.shape)), bool(op.arg(2, "keepdim", False))
    if v.shape[d] == ZERO:
        return constant(op.shape, 1.0)
    if v.shape[d] == ONE and not engine.in_part(v):
        return _of_one_entry(op, v, [d], keepdim)
    v = engine.pick(v) if v.single else v
    logs = engine.flat(Val(v.shape, tuple(Case(c.guards, tuple(_logarithm(engine, c))) for c in v.cases)))
    total = replace(summed(op, logs, [d], keepdim), alt=None)
    if v.shape[d] != ONE and not engine.structured(total):
        raise GiveUp("a product of a whole dimension, which may be one of features")
    return exponential(op, total, 1.0)


def _logarithm(engine: Engine, c: Case) -> list[Term]:
    """The summands of the logarithm of a case that is one positive factor."""
    t = c.terms[0] if len(c.terms) == 1 else None
    if t is None or t.guards or t.exp.sums or not t.poly.is_const or t.coef <= 0 or math.isinf(t.coef):
        raise GiveUp("a running product of something that is not one positive factor")
    logs = [Term(1.0, f, mono) for mono, f in t.exp.lin]
    logs += [x for a in t.accs for x in engine.log_terms(a)]
    return [*logs, Term(math.log(t.coef))] if t.coef != 1 else logs
