"""Lookups at positions that are known: each element of the result is one element of the source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product as cartesian

import torch

from ..domain.affine import ONE, ZERO, Aff
from ..domain.space import own_index
from ..domain.term import NO_GUARDS, Case, Guards, Val
from ..engine import GiveUp
from . import Op, rule

aten = torch.ops.aten
INTEGERS = (torch.int64, torch.int32)

Place = tuple[Guards, Aff]
"""Where, and the position that is read there."""


@rule(aten.index)
def index(op: Op) -> Val:
    """``x[.., i, .., j]``: the positions, broadcast together, stand where they stood, or first if they were apart."""
    source, indices = op.args[0], op.args[1]
    at = [d for d, i in enumerate(indices) if i is not None]
    if any(op.dtypes[1][d] not in INTEGERS for d in at):
        raise GiveUp("a lookup under a condition")
    rank = max(len(indices[d].shape) for d in at)
    first = at[0] if at == list(range(at[0], at[-1] + 1)) else 0
    kept = [d for d in range(len(source.shape)) if d not in at]
    mapping = {d: Aff.var(n if n < first else n + rank) for n, d in enumerate(kept)}
    read = {}
    for d in at:
        own = indices[d].shape
        shift = first + rank - len(own)
        moved = {n: Aff.var(n + shift) for n in range(len(own)) if own[n] != ONE}
        positions = op.engine.index(indices[d], moved, op.shape)
        read[d] = _places(op, positions, source.shape[d], from_the_end=True)
    return _looked_up(op, source, mapping, read)


@rule(aten.index_select)
def index_select(op: Op) -> Val:
    source, positions = op.args[0], op.args[2]
    d = op.dim(op.args[1], len(source.shape))
    along = {0: Aff.var(d)} if positions.shape and positions.shape[0] != ONE else {}
    places = _places(op, op.engine.index(positions, along, op.shape), source.shape[d])
    return _looked_up(op, source, {n: Aff.var(n) for n in range(len(source.shape)) if n != d}, {d: places})


@rule(aten.gather)
def gather(op: Op) -> Val:
    source, positions = op.args[0], op.args[2]
    d = op.dim(op.args[1], len(source.shape))
    places = _places(op, positions, source.shape[d])
    # Positions may be fewer than the source is long: where there is one, it reads the first.
    kept = {n: at for n, at in enumerate(own_index(op.shape)) if n != d}
    return _looked_up(op, source, kept, {d: places})


@rule(aten.embedding)
def embedding(op: Op) -> Val:
    if int(op.arg(2, "padding_idx", -1)) >= 0 or op.arg(3, "scale_grad_by_freq", False) or op.arg(4, "sparse", False):
        raise GiveUp("an embedding whose gradient is not that of its rows")
    source, positions = op.args[0], op.args[1]
    rank = len(positions.shape)
    moved = {n: Aff.var(n) for n in range(rank) if positions.shape[n] != ONE}
    places = _places(op, op.engine.index(positions, moved, op.shape), source.shape[0])
    return _looked_up(op, source, {1: Aff.var(rank)}, {0: places})


def _places(op: Op, positions: Val, size: Aff, from_the_end: bool = False) -> list[Place]:
    """The position that each region reads, all of them inside the dimension.

    Raises:
        GiveUp: positions are data, or one may be outside.
    """
    engine = op.engine
    if not engine.index_only(positions):
        raise GiveUp("a lookup by data")
    places: list[Place] = []
    for c in engine.split(positions):
        at = ZERO
        for t in c.terms:
            if t.accs or t.exp or t.guards or any(v < 0 for v in engine.space.vars(t.poly)):
                raise GiveUp("a lookup by data")
            at = at + t.poly * t.coef
        if not isinstance(at.const, int) or not all(isinstance(k, int) for _, k in at.terms):
            raise GiveUp("a lookup at positions that are not whole")
        ranges = engine.ranges(positions.shape, c.guards)
        if from_the_end and engine.implied(-at - 1, c.guards, ranges):
            at = at + size
        if not engine.implied(at, c.guards, ranges) or not engine.implied(size - 1 - at, c.guards, ranges):
            raise GiveUp("a lookup that may be outside")
        places.append((c.guards, at))
    return places


def _looked_up(op: Op, source: Val, mapping: Mapping[int, Aff], read: Mapping[int, Sequence[Place]]) -> Val:
    engine, shape = op.engine, op.shape
    cases: list[Case] = []
    for places in cartesian(*read.values()):
        here = engine.prune(frozenset().union(*(guards for guards, _ in places)), shape)
        if here is None:
            continue
        at = dict(mapping) | {d: position for d, (_, position) in zip(read, places, strict=True)}
        out = engine.index(source, {d: x for d, x in at.items() if source.shape[d] != ONE}, shape)
        if here == NO_GUARDS:
            return out
        for c in out.cases:
            guards = engine.prune(here | c.guards, shape)
            if guards is not None:
                cases.append(Case(guards, c.terms))
    return engine.join_cases(Val(shape, tuple(cases), precision=source.precision))
