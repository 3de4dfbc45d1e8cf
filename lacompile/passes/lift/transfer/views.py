"""Views and copies: index maps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..affine import ONE, ZERO, Aff
from ..engine import Engine, GiveUp
from ..leaves import Extended
from ..space import Space, box
from ..term import NO_GUARDS, Case, Term, Val, value
from . import Op, rule

aten = torch.ops.aten


def _own(shape: Sequence[Aff], d: int) -> Aff:
    return ZERO if shape[d] == ONE else Aff.var(d)


@rule(aten.alias, aten.clone, aten.contiguous, aten.lift_fresh, aten.lift_fresh_copy, aten.positive)
def same(op: Op) -> Val:
    return op.args[0]


@rule(aten.detach)
def detach(op: Op) -> Val:
    """No gradient flows through, so none flows to any factor: each is another leaf, for autograd, than it was."""
    return op.engine.detached(op.args[0])


@rule(aten.permute)
def permute(op: Op) -> Val:
    v, dims = op.args[0], [op.dim(d, len(op.args[0].shape)) for d in op.args[1]]
    return reorder(op.engine, v, dims)


@rule(aten.transpose)
def transpose(op: Op) -> Val:
    rank = len(op.args[0].shape)
    dims = list(range(rank))
    a, b = op.dim(op.args[1], rank), op.dim(op.args[2], rank)
    dims[a], dims[b] = dims[b], dims[a]
    return reorder(op.engine, op.args[0], dims)


@rule(aten.t, aten.numpy_T, aten.mT)
def t(op: Op) -> Val:
    return reorder(op.engine, op.args[0], list(reversed(range(len(op.args[0].shape)))))


def reorder(engine: Engine, v: Val, dims: Sequence[int]) -> Val:
    shape = tuple(v.shape[d] for d in dims)
    return engine.index(v, {d: Aff.var(n) for n, d in enumerate(dims) if v.shape[d] != ONE and n != d}, shape)


@rule(aten.unsqueeze)
def unsqueeze(op: Op) -> Val:
    v = op.args[0]
    d = op.dim(op.args[1], len(v.shape) + 1)
    mapping = {k: Aff.var(k + 1) for k in range(d, len(v.shape)) if v.shape[k] != ONE}
    return op.engine.index(v, mapping, op.shape)


@rule(aten.squeeze)
def squeeze(op: Op) -> Val:
    v = op.args[0]
    dims = op.arg(1, "dim", list(range(len(v.shape))))
    dims = {op.dim(d, len(v.shape)) for d in ([dims] if isinstance(dims, int) else dims)}
    kept = [d for d in range(len(v.shape)) if not (d in dims and v.shape[d] == ONE)]
    return reorder(op.engine, v, kept)


@rule(aten.expand, aten.broadcast_to, aten.expand_as)
def expand(op: Op) -> Val:
    return op.engine.broadcast(op.args[0], op.shape)


@rule(aten.select)
def select(op: Op) -> Val:
    v, d, at = op.args[0], op.dim(op.args[1], len(op.args[0].shape)), op.engine.aff(op.args[2])
    return select_at(op.engine, v, d, at)


def select_at(engine: Engine, v: Val, d: int, at: Aff) -> Val:
    if at.is_const and at.const < 0:
        at = at + v.shape[d]
    shape = (*v.shape[:d], *v.shape[d + 1 :])
    mapping = {k: Aff.var(k - 1) for k in range(d + 1, len(v.shape)) if v.shape[k] != ONE}
    if v.shape[d] != ONE:
        mapping[d] = at
    return engine.index(v, mapping, shape)


@rule(aten.slice)
def slice_(op: Op) -> Val:
    v = op.args[0]
    d = op.dim(op.arg(1, "dim", 0), len(v.shape))
    start, _, step = slice_bounds(op, v.shape[d])
    return slice_at(op.engine, v, d, start, step, op.shape[d])


def slice_bounds(op: Op, size: Aff, first: int = 2) -> tuple[Aff, Aff, int]:
    """Start, end and step of an ATen slice, clamped as ATen does."""
    step = op.arg(first + 2, "step", 1)
    start = _clamped(op.engine, op.arg(first, "start"), ZERO, size)
    end = _clamped(op.engine, op.arg(first + 1, "end"), size, size)
    return start, end, step


def _clamped(engine: Engine, x: Any, default: Aff, size: Aff) -> Aff:
    if x is None:
        return default
    if isinstance(x, int) and x >= 2**62:
        return size
    at = engine.aff(x)
    if engine.space.upper(at, {}) < 0:
        at = at + size
    if engine.space.lower(at, {}) < 0:
        if at.is_const or engine.space.upper(at, {}) <= 0:
            return ZERO
        raise GiveUp("a slice whose start may be negative")
    if engine.space.lower(size - at, {}) >= 0:
        return at
    if engine.space.lower(at - size, {}) >= 0:
        return size
    raise GiveUp("a slice whose end is not known to lie inside")


def slice_at(engine: Engine, v: Val, d: int, start: Aff, step: int, length: Aff) -> Val:
    shape = (*v.shape[:d], length, *v.shape[d + 1 :])
    if start == ZERO and step == 1 and length == v.shape[d]:
        return v
    mapping = {} if v.shape[d] == ONE else {d: _own(shape, d) * step + start}
    return engine.index(v, mapping, shape)


@rule(aten.split, aten.split_with_sizes, aten.chunk, aten.tensor_split)
def split(op: Op) -> list[Val]:
    v = op.args[0]
    d = op.dim(op.arg(2, "dim", 0), len(v.shape))
    out, start = [], ZERO
    for part in op.out:
        length = op.engine.shape(part)[d]
        out.append(slice_at(op.engine, v, d, start, 1, length))
        start = start + length
    return out


@rule(aten.unbind)
def unbind(op: Op) -> list[Val]:
    v = op.args[0]
    d = op.dim(op.arg(1, "dim", 0), len(v.shape))
    return [select_at(op.engine, v, d, Aff.lit(n)) for n in range(len(op.out))]


@rule(aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias)
def view(op: Op) -> Val:
    v = op.args[0]
    mapping = view_map(op.engine, v.shape, op.shape)
    return op.engine.index(v, mapping, op.shape)


def view_map(engine: Engine, old: Sequence[Aff], new: Sequence[Aff]) -> dict[int, Aff]:
    """Old index variables over the new ones: dimensions of equal products are paired, mixed radix inside a group."""
    mapping: dict[int, Aff] = {}
    for group_old, group_new in _paired(engine, old, new):
        numbers = all(old[d].is_const for d in group_old[1:]) and all(new[d].is_const for d in group_new[1:])
        split = _split_by_numbers if numbers else _split_by_sizes
        for d, at in zip(group_old, split(engine, old, new, group_old, group_new), strict=True):
            if at != Aff.var(d):
                mapping[d] = at
    return mapping


def _split_by_numbers(
    engine: Engine, old: Sequence[Aff], new: Sequence[Aff], group_old: Sequence[int], group_new: Sequence[int]
) -> list[Aff]:
    ranges = box(new)
    linear, stride = ZERO, 1
    for n, d in enumerate(reversed(group_new)):
        linear = linear + Aff.var(d) * stride
        if n + 1 < len(group_new):
            stride *= engine.length(new[d])
    stride, out = 1, []
    for n, d in enumerate(reversed(group_old)):
        at = engine.space.floordiv(linear, stride, ranges)
        if n + 1 < len(group_old):
            size = engine.length(old[d])
            at = at - engine.space.floordiv(linear, stride * size, ranges) * size
            stride *= size
        out.append(at)
    return out[::-1]


def _split_by_sizes(
    engine: Engine, old: Sequence[Aff], new: Sequence[Aff], group_old: Sequence[int], group_new: Sequence[int]
) -> list[Aff]:
    space, ranges = engine.space, box(new)
    linear = Aff.var(group_new[0])
    for d in group_new[1:]:
        linear = space.join(linear, Aff.var(d), new[d])
    out = []
    for d in reversed(group_old[1:]):
        out.append(space.remainder(linear, old[d], ranges))
        linear = space.quotient(linear, old[d], ranges)
    return [linear, *reversed(out)]


def _paired(engine: Engine, old: Sequence[Aff], new: Sequence[Aff]) -> Iterator[tuple[list[int], list[int]]]:
    """Neighbouring dimensions of both shapes whose sizes have one product, as few at a time as possible."""
    space = engine.space
    left = [d for d in range(len(old)) if old[d] != ONE]
    right = [d for d in range(len(new)) if new[d] != ONE]
    while left and right:
        group_old, group_new = [left.pop(0)], [right.pop(0)]
        size_old, size_new = old[group_old[0]], new[group_new[0]]
        while size_old != size_new:
            if _shorter(space, size_old, size_new):
                if not left:
                    raise GiveUp("a view whose sizes do not pair")
                group_old.append(left.pop(0))
                size_old = space.times(size_old, old[group_old[-1]])
            elif _shorter(space, size_new, size_old):
                if not right:
                    raise GiveUp("a view whose sizes do not pair")
                group_new.append(right.pop(0))
                size_new = space.times(size_new, new[group_new[-1]])
            else:
                raise GiveUp("a view of symbolic sizes that do not pair")
        yield group_old, group_new


def _shorter(space: Space, a: Aff, b: Aff) -> bool:
    """Whether a group of size ``a`` needs another dimension to become one of size ``b``."""
    return space.divided(b, a) is not None or space.lower(b - a - 1, {}) >= 0


@rule(aten.flip)
def flip(op: Op) -> Val:
    v = op.args[0]
    dims = [op.dim(d, len(v.shape)) for d in op.args[1]]
    return op.engine.index(v, {d: v.shape[d] - 1 - Aff.var(d) for d in dims if v.shape[d] != ONE}, v.shape)


@rule(aten.repeat)
def repeat(op: Op) -> Val:
    v, shape = op.args[0], op.shape
    shift = len(shape) - len(v.shape)
    mapping: dict[int, Aff] = {}
    for d, n in enumerate(v.shape):
        x = Aff.var(d + shift)
        if n != ONE:
            mapping[d] = x if shape[d + shift] == n else _modulo(op.engine, x, n, shape)
    return op.engine.index(v, mapping, shape)


def _modulo(engine: Engine, x: Aff, n: Aff, shape: Sequence[Aff]) -> Aff:
    size = engine.length(n)
    return x - engine.space.floordiv(x, size, box(shape)) * size


@rule(aten.repeat_interleave)
def repeat_interleave(op: Op) -> Val:
    v, times = op.args[0], op.args[1]
    if not isinstance(times, int) or op.arg(2, "dim") is None:
        raise GiveUp("repeat_interleave by a tensor")
    d = op.dim(op.arg(2, "dim"), len(v.shape))
    shape = op.shape
    if v.shape[d] == ONE:
        return op.engine.index(v, {}, shape)
    return op.engine.index(v, {d: op.engine.space.floordiv(Aff.var(d), times, box(shape))}, shape)


@rule(aten.unfold)
def unfold(op: Op) -> Val:
    v, d, step = op.args[0], op.dim(op.args[1], len(op.args[0].shape)), op.args[3]
    shape = op.shape
    at = _own(shape, d) * step + _own(shape, len(shape) - 1)
    return op.engine.index(v, {d: at} if v.shape[d] != ONE else {}, shape)


@rule(aten.diagonal)
def diagonal(op: Op) -> Val:
    v = op.args[0]
    rank = len(v.shape)
    offset, a, b = op.arg(1, "offset", 0), op.dim(op.arg(2, "dim1", 0), rank), op.dim(op.arg(3, "dim2", 1), rank)
    shape = op.shape
    kept = [d for d in range(rank) if d not in (a, b)]
    mapping = {d: Aff.var(n) for n, d in enumerate(kept) if v.shape[d] != ONE}
    x = _own(shape, rank - 2)
    for d, at in ((a, x + max(-offset, 0)), (b, x + max(offset, 0))):
        if v.shape[d] != ONE:
            mapping[d] = at
    return op.engine.index(v, mapping, shape)


@rule(aten.cat)
def cat(op: Op) -> Val:
    parts = op.args[0]
    parts = [p for p in parts if isinstance(p, Val) and p.shape != (ZERO,)]
    rank = len(op.shape)
    return concatenate(op, parts, op.dim(op.arg(1, "dim", 0), rank))


@rule(aten.stack)
def stack(op: Op) -> Val:
    parts, shape = op.args[0], op.shape
    d = op.dim(op.arg(1, "dim", 0), len(shape))
    inner = (*shape[:d], ONE, *shape[d + 1 :])
    lifted = [
        op.engine.index(p, {k: Aff.var(k + 1) for k in range(d, len(p.shape)) if p.shape[k] != ONE}, inner)
        for p in parts
    ]
    return concatenate(op, lifted, d)


def concatenate(op: Op, parts: Sequence[Val], d: int) -> Val:
    """Pieces along ``d``; adjacent pieces of one form merge into one."""
    engine, shape = op.engine, op.shape
    if len(parts) == 1:
        return parts[0]
    filled = [n for n, p in enumerate(parts) if not p.single or p.terms]
    if len(filled) == 1:
        low, high = (sum((p.shape[d] for p in side), ZERO) for side in (parts[: filled[0]], parts[filled[0] + 1 :]))
        return _pad_dim(engine, parts[filled[0]], d, low, high, 0.0)
    x, start = Aff.var(d), ZERO
    cases: list[Case] = []
    terms: list[Term] = []
    masked = any(not p.single or any(math.isinf(t.coef) for t in p.terms) for p in parts)
    for p in parts:
        end = start + p.shape[d]
        guards = frozenset({x - start, end - 1 - x})
        mapping = {} if p.shape[d] == ONE else {d: x - start}
        if masked:
            moved = [Case(frozenset(engine.space.sub(g, mapping) for g in c.guards), c.terms) for c in p.cases]
            for c in moved:
                inside = engine.prune(c.guards | guards, shape)
                if inside is not None:
                    cases.append(Case(inside, tuple(t.sub(engine.space, mapping) for t in c.terms)))
        else:
            reading = engine.pick(p) if not engine.contracts(p) else p
            for t in reading.terms:
                moved_t = t.sub(engine.space, mapping)
                terms.append(moved_t.but(guards=moved_t.guards | guards))
            if len(terms) > 64:
                terms = list(engine.sum_of(shape, terms).terms)
        start = end
    if masked:
        return engine.join_cases(Val(shape, tuple(cases)))
    out = engine.sum_of(shape, terms)
    if len(out.terms) > 1 and all(engine.plain_term(t.but(guards=())) and t.accs for t in out.terms):
        raise GiveUp("a concatenation of different tensors")
    return out


@rule(aten.constant_pad_nd)
def pad(op: Op) -> Val:
    v, amounts, fill = op.args[0], op.args[1], op.arg(2, "value", 0)
    rank = len(v.shape)
    for n in range(0, len(amounts), 2):
        d = rank - 1 - n // 2
        low, high = op.engine.aff(amounts[n]), op.engine.aff(amounts[n + 1])
        v = _pad_dim(op.engine, v, d, low, high, float(fill))
    return v


def _pad_dim(engine: Engine, v: Val, d: int, low: Aff, high: Aff, fill: float) -> Val:
    if low == ZERO and high == ZERO:
        return v
    n = v.shape[d]
    shape = (*v.shape[:d], n + low + high, *v.shape[d + 1 :])
    mapping = {} if n == ONE else {d: Aff.var(d) - low}
    inside = frozenset({Aff.var(d) - low, low + n - 1 - Aff.var(d)})
    if fill == 0 and v.single and not any(math.isinf(t.coef) for t in v.terms):
        reading = engine.pick(v)
        extended = [_extend_by_zeros(engine, t, d, n) for t in reading.terms]
        if all(t is not None for t in extended):
            plain = value(v.shape, [t for t in extended if t is not None])
            return engine.index(plain, mapping, shape)
        moved = engine.index(reading, mapping, shape) if mapping else Val(shape, reading.cases)
        return engine.sum_of(shape, (t.but(guards=t.guards | inside) for t in moved.terms))
    cases = []
    for c in v.cases:
        guards = engine.prune({engine.space.sub(g, mapping) for g in c.guards} | inside, shape)
        if guards is not None:
            cases.append(Case(guards, tuple(t.sub(engine.space, mapping) for t in c.terms)))
    outside = (Term(fill),) if fill else ()
    for g in inside:
        region = engine.prune({-g - 1}, shape)
        if region is not None:
            cases.append(Case(region, outside))
    return engine.join_cases(Val(shape, tuple(cases) or (Case(NO_GUARDS, ()),)))


def _extend_by_zeros(engine: Engine, t: Term, d: int, n: Aff) -> Term | None:
    """Zero padding of a plain product: one of its leaves is continued by zeros, and no guard is needed."""
    if not engine.plain_term(t) or n == ONE:
        return None
    for k, (leaf, idx) in enumerate(t.accs):
        axis = [m for m, a in enumerate(idx) if d in engine.space.vars(a)]
        if len(axis) != 1 or idx[axis[0]] != Aff.var(d):
            continue
        beyond = n - engine.leaf_shapes[leaf][axis[0]]
        if isinstance(engine.leaves[leaf].kind, Extended):
            if engine.space.lower(beyond, {}) < 0:
                continue  # it was cut inside: what is continued is not zero there
        elif beyond != ZERO:
            continue
        accs = (*t.accs[:k], (engine.leaves.extended(leaf), idx), *t.accs[k + 1 :])
        return t.but(accs=tuple(sorted(accs)))
    return None
