"""Writes into a part of a tensor, as the tensor they leave behind."""

from __future__ import annotations

import math

import torch

from ..domain.affine import ONE, ZERO, Aff
from ..domain.term import Case, Val
from ..engine import Engine, GiveUp
from . import Op, filled, rule
from .functions import one_function
from .selections import choose
from .views import slice_bounds

aten = torch.ops.aten


@rule(aten.slice_scatter)
def slice_scatter(op: Op) -> Val:
    base, src = op.args[0], op.args[1]
    d = op.dim(op.arg(2, "dim", 0), len(base.shape))
    start, _, step = slice_bounds(op, base.shape[d], 3)
    if step != 1:
        raise GiveUp("a strided write")
    return written(op.engine, base, src, d, start, src.shape[d])


@rule(aten.select_scatter)
def select_scatter(op: Op) -> Val:
    base, src = op.args[0], op.args[1]
    d = op.dim(op.args[2], len(base.shape))
    return written_at(op.engine, base, src, d, op.position(3, base.shape[d]))


@rule(aten.index_put)
def index_put(op: Op) -> Val:
    """``x[.., mask] = number``: one condition over neighbouring dimensions, and one number for all of them."""
    base, indices, new = op.args[0], op.args[1], op.args[2]
    masks = [n for n, i in enumerate(indices) if i is not None]
    if op.arg(3, "accumulate", False) or len(masks) != 1 or any(n != ONE for n in new.shape):
        raise GiveUp("a write at positions that are data")
    (at,) = masks
    mask = indices[at]
    if op.dtypes[1][at] is not torch.bool:
        raise GiveUp("a write at positions that are data")
    dims = range(at, at + len(mask.shape))
    if not op.engine.index_only(mask) or mask.shape != tuple(base.shape[d] for d in dims):
        raise GiveUp("a write at positions that are data")
    inside = op.engine.index(mask, {n: Aff.var(d) for n, d in enumerate(dims) if base.shape[d] != ONE}, base.shape)
    return choose(op, inside, op.engine.broadcast(new, base.shape), base, torch.bool)


def written_at(engine: Engine, base: Val, src: Val, d: int, at: Aff) -> Val:
    """``base`` with position ``at`` of dimension ``d`` replaced by ``src``, which lacks that dimension."""
    shape = (*src.shape[:d], ONE, *src.shape[d:])
    mapping = {k: Aff.var(k + 1) for k in range(d, len(src.shape)) if src.shape[k] != ONE}
    return written(engine, base, engine.index(src, mapping, shape), d, at, ONE)


def written(engine: Engine, base: Val, src: Val, d: int, start: Aff, length: Aff) -> Val:
    """``base`` with ``[start, start + length)`` of dimension ``d`` replaced by ``src``."""
    shape = base.shape
    if start == ZERO and length == shape[d]:
        return src
    if (table := filled.replaced(engine, base, src, d, start, length)) is not None:
        return table
    bases = [b for b in (engine.before_roll(base), base) if b is not None]  # apart if no more pieces are left of it
    made = [_written(engine, b, src, d, start, length) for b in bases]
    return filled.as_table(engine, min(made, key=lambda v: sum(len(c.terms) for c in v.cases)))


def _written(engine: Engine, base: Val, src: Val, d: int, start: Aff, length: Aff) -> Val:
    shape, x = base.shape, Aff.var(d)
    inside = frozenset({x - start, start + length - 1 - x})
    mapping = {} if length == ONE else {d: x - start}
    if not base.single or not src.single or any(math.isinf(t.coef) for v in (base, src) for t in v.terms):
        return _written_cases(engine, base, src, inside, mapping)
    new, old = [], []
    for t in engine.pick_piece(src).terms:
        moved = t.sub(engine.space, mapping)
        new.append(moved.but(guards=moved.guards | inside))
    for t in base.terms:
        for outside in (start - 1 - x, x - start - length):
            old.append(t.but(guards=t.guards | {outside}))
    return engine.sum_of(shape, one_function(engine, shape, [new, old]))


def _written_cases(engine: Engine, base: Val, src: Val, inside: frozenset[Aff], mapping: dict[int, Aff]) -> Val:
    cases: list[Case] = []
    for c in src.cases:
        guards = engine.prune({engine.space.sub(g, mapping) for g in c.guards} | inside, base.shape)
        if guards is not None:
            cases.append(Case(guards, tuple(t.sub(engine.space, mapping) for t in c.terms)))
    for c in base.cases:
        for g in inside:
            guards = engine.prune(c.guards | {-g - 1}, base.shape)
            if guards is not None:
                cases.append(Case(guards, c.terms))
    return engine.in_one(engine.join_cases(Val(base.shape, tuple(cases))))
