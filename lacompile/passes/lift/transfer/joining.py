"""Joining: pieces side by side, and zeros around a piece."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import fx

from ..domain.affine import ONE, ZERO, Aff
from ..domain.exponent import Exponent
from ..domain.kinds import Extended, Opaque
from ..domain.term import NO_GUARDS, Case, Term, Val, value
from ..engine import Engine
from . import Op, rule
from .functions import one_function
from .kept import decayed

aten = torch.ops.aten

LARGEST = 700.0  # exp of it is still a number of fp64


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
    pieces: list[list[Term]] = []
    masked = any(not p.single or any(math.isinf(t.coef) for t in p.terms) for p in parts)
    of_one = _parts_of_one(engine, parts)
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
            reading = engine.pick(p) if of_one else engine.pick_piece(p)
            moved_terms = [t.sub(engine.space, mapping) for t in reading.terms]
            pieces.append([t.but(guards=t.guards | guards) for t in moved_terms])
        start = end
    if masked:
        return engine.join_cases(engine.in_one(Val(shape, tuple(cases))))
    out = engine.sum_of(shape, one_function(engine, shape, pieces))
    if len(out.terms) > 1 and (scaled := _numbered(engine, shape, pieces, d)) is not None:
        return scaled
    if len(out.terms) > 1 and d < len(shape) - 1 and (kept := decayed(engine, shape, pieces)) is not None:
        return replace(kept, alt=engine.leaf(op.out, Opaque(None, "cat", tuple(kept.terms[0].signature))).one)
    return _side_by_side(op, out) if len(out.terms) > 1 and _different_data(engine, out) else out


def _numbered(engine: Engine, shape: tuple[Aff, ...], pieces: Sequence[Sequence[Term]], d: int) -> Val | None:
    """Tokens that are one form, but for a number that each has of its own: o_t / (t + 1), where a loop takes a mean.

    Its number is the weight of the oldest summand or of the newest, which the form then has with the weight 1.
    """
    tokens = [p[0] for p in pieces if len(p) == 1 and p[0].bound(engine.space)]
    if len(tokens) < len(pieces) or shape[d] != Aff.lit(len(pieces)):
        return None
    for newest in (True, False):
        weights = [_weight_at_an_end(engine, t, newest) for t in tokens]
        numbers = [0.0 if w is None else t.coef * math.exp(w) for t, w in zip(tokens, weights, strict=True)]
        if not all(map(math.isfinite, numbers)) or 0.0 in numbers:
            continue
        shifted = (t.exp - Exponent.of([((), Aff.lit(w or 0.0))], ()) for t, w in zip(tokens, weights, strict=True))
        alike = [t.but(coef=1.0, exp=e) for t, e in zip(tokens, shifted, strict=True)]
        if len(engine.sum_of(shape, alike[:3]).terms) == 1 and len((out := engine.sum_of(shape, alike)).terms) == 1:
            column = np.array(numbers).reshape([-1 if n == d else 1 for n in range(len(shape))])
            return engine.multiply(engine.table_value(column, shape), out)
    return None


def _weight_at_an_end(engine: Engine, t: Term, last: bool) -> float | None:
    """The number in a term's exponent where what it sums over ends, or begins; None where exp of it is beyond fp64."""
    weight = 0.0
    for mono, f in t.exp.lin:
        if not mono:
            weight += float(f.const)
            for v, c in f.terms:
                ends = engine.bounds(v, t.guards).ends
                if v not in t.bound(engine.space) or ends is None or not ends[last].is_const:
                    return None
                weight += float(c * ends[last].const)
    return weight if abs(weight) < LARGEST else None


def _parts_of_one(engine: Engine, parts: Sequence[Val]) -> bool:
    """Parts of one plain tensor, such as the halves that rotary positions exchange, whatever it was computed from."""
    held = [p.alt.signature if p.alt is not None and p.single and not engine.structured(p) else None for p in parts]
    return held[0] is not None and len(held[0]) == 1 and all(h == held[0] for h in held)


def _different_data(engine: Engine, v: Val) -> bool:
    """Pieces of plain data, numbers among them perhaps, as of a feature map that also holds a constant."""
    pieces = [t.but(guards=()) for t in v.terms]
    holds_data = any(t.accs or any(m for m, _ in t.exp.lin) for t in pieces)
    return holds_data and all(map(engine.plain_term, pieces))


def _side_by_side(op: Op, v: Val) -> Val:
    """Different tensors side by side are one tensor of data; it lies in the intervals of its pieces."""
    engine, pieces = op.engine, [op.engine.term_access(t.but(guards=()), None) for t in v.terms]
    leaves = [engine.leaves[p[0][0]] for p in pieces if isinstance(p, tuple)]
    bounds = [leaf.interval for leaf in leaves] + [(p, p) for p in pieces if not isinstance(p, tuple)]
    return engine.leaf(
        op.out,
        Opaque(None, "cat", tuple({a[0] for t in v.terms for a in t.accs})),
        interval=(min(low for low, _ in bounds), max(high for _, high in bounds)),
        rests_on=frozenset[fx.Node]().union(*(leaf.rests_on for leaf in leaves)),
    )


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
    x = ZERO if shape[d] == ONE else Aff.var(d)  # negative amounts may leave one entry of several
    mapping = {} if n == ONE else {d: x - low}
    inside = frozenset({x - low, low + n - 1 - x})
    if fill == 0 and v.single and not any(math.isinf(t.coef) for t in v.terms):
        reading = engine.pick(v)
        extended = [_extend_by_zeros(engine, t, d, n, high) for t in reading.terms]
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


def _extend_by_zeros(engine: Engine, t: Term, d: int, n: Aff, behind: Aff) -> Term | None:
    """Zero padding of a plain product: one of its leaves is continued by zeros, and no guard is needed.

    What is padded is whole at the ends that padding reaches, or zero there already; ``behind`` is how much is added at
    the end.
    """
    if not engine.plain_term(t) or n == ONE:
        return None
    if len(t.accs) > 1 and engine.outer_product(t):
        return None  # it is a state, of which a guard says where it is
    for k, (leaf, idx) in enumerate(t.accs):
        axis = [m for m, a in enumerate(idx) if d in engine.space.vars(a)]
        if len(axis) != 1 or not (first := idx[axis[0]] - Aff.var(d)).is_const:
            continue
        beyond = first + n - engine.leaf_shapes[leaf][axis[0]]
        extended = isinstance(engine.leaves[leaf].kind, Extended)
        ends_inside = engine.space.upper(behind, {}) > 0 and engine.space.lower(beyond, {}) < 0
        whole = first.const == 0 and engine.space.upper(beyond, {}) <= 0
        if first.const > 0 or ends_inside or not (extended or whole):
            continue  # it was cut inside, or is read beyond its ends: what is continued is not zero there
        accs = (*t.accs[:k], (engine.leaves.extended(leaf), idx), *t.accs[k + 1 :])
        return t.but(accs=tuple(sorted(accs)))
    return None
