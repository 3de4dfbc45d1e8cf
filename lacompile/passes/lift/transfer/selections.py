"""Selections: masks put on values."""

from __future__ import annotations

import math

import torch

from ..domain.affine import ONE, ZERO, Aff
from ..domain.term import Val
from ..engine import GiveUp
from . import Op, rule
from .conditions import complement, known_condition, opposite, truth

aten = torch.ops.aten


@rule(aten.where)
def where(op: Op) -> Val:
    if len(op.args) < 3:
        raise GiveUp("where without values")
    return choose(op, op.operand(0), op.operand(1), op.operand(2), op.dtypes[0])


@rule(aten.masked_fill)
def masked_fill(op: Op) -> Val:
    return choose(op, op.operand(1), op.operand(2), op.operand(0), op.dtypes[1])


def choose(op: Op, cond: Val, yes: Val, no: Val, dtype: torch.dtype) -> Val:
    engine = op.engine
    known = known_condition(engine, cond)
    if known is None:
        if dtype is not torch.bool:
            return op.engine.pointwise(aten.where.self, [cond, yes, no], {}, op.out)
        return _choose_by_data(op, cond, yes, no)
    if engine.contracts(yes) or engine.contracts(no):
        if not any(math.isinf(t.coef) for v in (yes, no) for c in v.cases for t in c.terms):
            return engine.add(engine.multiply(yes, known), engine.multiply(no, opposite(engine, known)), op.out)
    return engine.zip_cases([known, yes, no], lambda g: g[1] if g[0] else g[2])


def _choose_by_data(op: Op, cond: Val, yes: Val, no: Val) -> Val:
    if yes.number is not None and yes.number == no.number:
        return yes
    if (kept := _kept_or_changed(op, cond, yes, no)) is not None:
        return kept
    zero = no.number == 0
    if (zero or yes.number == 0) and not any(math.isinf(t.coef) for v in (yes, no) for c in v.cases for t in c.terms):
        kept = yes if zero else no
        as_number = cond if zero else complement(op, cond)
        if op.engine.structured(kept) or kept.alt is not None or not kept.single:
            return op.engine.multiply(kept, as_number)
    if cond.single and len(cond.terms) > 1:  # the opposite of several truths: they themselves are what can be computed
        cond, yes, no = complement(op, cond), no, yes
    return op.engine.pointwise(aten.where.self, [cond, yes, no], {}, op.out)


def _kept_or_changed(op: Op, cond: Val, yes: Val, no: Val) -> Val | None:
    """``where(c, s S + k v, S)`` as ``c (s S + k v) + (1 - c) S``, where the multiples of S are then one."""
    sums = [v for v in (yes, no) if v.single and (v.alt is not None or any(len(t.accs) > 1 for t in v.terms))]
    if len(sums) < 2 or any(math.isinf(t.coef) for v in sums for t in v.terms):
        return None
    there, elsewhere = op.engine.multiply(yes, cond), op.engine.multiply(no, complement(op, cond))
    joined = op.engine.add(there, elsewhere, op.out)
    return joined if joined.single and len(joined.terms) < len(there.terms) + len(elsewhere.terms) else None


@rule(aten.tril)
def tril(op: Op) -> Val:
    return _triangle(op, Aff.var(len(op.shape) - 2) - Aff.var(len(op.shape) - 1) + int(op.arg(1, "diagonal", 0)))


@rule(aten.triu)
def triu(op: Op) -> Val:
    return _triangle(op, Aff.var(len(op.shape) - 1) - Aff.var(len(op.shape) - 2) - int(op.arg(1, "diagonal", 0)))


def _triangle(op: Op, guard: Aff) -> Val:
    return _only_where(op, op.args[0], guard)


@rule(aten.diag_embed)
def diag_embed(op: Op) -> Val:
    rank = len(op.shape)
    if op.arg(1, "offset", 0) != 0 or {op.arg(2, "dim1", -2) % rank, op.arg(3, "dim2", -1) % rank} != {
        rank - 2,
        rank - 1,
    }:
        raise GiveUp("a diagonal that is not that of the last two dimensions")
    row, col = Aff.var(rank - 2), Aff.var(rank - 1)
    along = op.engine.index(op.args[0], {d: Aff.var(d) for d in range(rank - 1)}, op.shape)
    return _only_where(op, along, row - col, col - row)


def _only_where(op: Op, v: Val, *guards: Aff) -> Val:
    shape = op.shape
    at = {d: ZERO for d in range(len(shape)) if shape[d] == ONE}
    guards = tuple(op.engine.space.sub(g, at) for g in guards)
    if op.engine.contracts(v) and v.single:
        return op.engine.sum_of(shape, (t.but(guards=t.guards | {*guards}) for t in v.terms))
    return op.engine.zip_cases([truth(op.engine, shape, guards), v], lambda g: g[1] if g[0] else ())
