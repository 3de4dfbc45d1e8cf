"""Views that move, take and repeat indices; copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..domain.affine import ONE, ZERO, Aff
from ..domain.space import box, own_index
from ..domain.term import Val
from ..engine import Engine, GiveUp
from . import Op, rule

aten = torch.ops.aten


@rule(aten.alias, aten.clone, aten.contiguous, aten.lift_fresh, aten.lift_fresh_copy, aten.positive)
def same(op: Op) -> Val:
    return op.args[0]


@rule(aten.detach)
def detach(op: Op) -> Val:
    """No gradient flows through, so none flows to any factor: each is another leaf, for autograd, than it was."""
    return op.engine.detached(op.args[0])


@rule(aten.permute, aten.transpose, aten.t)
def permute(op: Op) -> Val:
    return reorder(op.engine, op.args[0], permutation(op))


def permutation(op: Op) -> list[int]:
    """The dimensions of what is transposed, as they follow each other in the result."""
    rank = len(op.args[0].shape)
    if op.func.overloadpacket is aten.permute:
        return [op.dim(d, rank) for d in op.args[1]]
    order = list(range(rank))
    if op.func.overloadpacket is aten.t:
        return order[::-1]
    a, b = op.dim(op.args[1], rank), op.dim(op.args[2], rank)
    order[a], order[b] = order[b], order[a]
    return order


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
    v, d = op.args[0], op.dim(op.args[1], len(op.args[0].shape))
    return select_at(op.engine, v, d, op.position(2, v.shape[d]))


def select_at(engine: Engine, v: Val, d: int, at: Aff) -> Val:
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
    mapping = {} if v.shape[d] == ONE else {d: own_index(shape)[d] * step + start}
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


@rule(aten.flip)
def flip(op: Op) -> Val:
    if len(op.shape) > 1 and not op.engine.index_only(op.args[0]):  # a vector is no sequence
        op.engine.turned = True
        if op.engine.choices.turned_whole:
            raise GiveUp("a turned tensor, which is taken as it is")
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
    own = own_index(op.shape)
    return op.engine.index(v, {d: own[d] * step + own[-1]} if v.shape[d] != ONE else {}, op.shape)


@rule(aten.diagonal)
def diagonal(op: Op) -> Val:
    v = op.args[0]
    rank = len(v.shape)
    offset, a, b = op.arg(1, "offset", 0), op.dim(op.arg(2, "dim1", 0), rank), op.dim(op.arg(3, "dim2", 1), rank)
    shape = op.shape
    kept = [d for d in range(rank) if d not in (a, b)]
    mapping = {d: Aff.var(n) for n, d in enumerate(kept) if v.shape[d] != ONE}
    x = own_index(shape)[-1]
    for d, at in ((a, x + max(-offset, 0)), (b, x + max(offset, 0))):
        if v.shape[d] != ONE:
            mapping[d] = at
    return op.engine.index(v, mapping, shape)
