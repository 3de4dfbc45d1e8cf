"""A dimension whose end comes before its beginning: one tensor, until what came around is left out or written over.

So a window takes its next token: ``window = window.roll(-1, -1); window[..., -1] = x_t``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from ..domain.affine import ONE, ZERO, Aff
from ..domain.kinds import Opaque
from ..domain.term import Term, Val
from ..engine import Engine, GiveUp
from . import Op, rule
from .views import slice_at

aten = torch.ops.aten


@rule(aten.roll)
def roll(op: Op) -> Val:
    """As it is where it is one form, as beside zeros; else a leaf, which ``Engine.before_roll`` takes apart."""
    engine, v, shape, dims = op.engine, op.args[0], op.shape, op.arg(2, "dims", ())
    if len(dims) != 1 or not v.single:
        raise GiveUp("a roll of several dimensions, or of cases")
    d = op.dim(dims[0], len(shape))
    if not shape[d].is_const or shape[d] == ONE:
        raise GiveUp("a roll of a dimension whose length is a symbol")
    first = int(op.args[1][0]) % int(shape[d].const)
    v = engine.pick(v)
    if any(math.isinf(t.coef) for t in v.terms):
        raise GiveUp("a roll of infinite numbers")
    rolled = engine.sum_of(shape, _around(engine, v, d, first))
    if len(rolled.terms) < 2:
        return rolled
    if engine.index_only(v) or not all(engine.plain_term(t.but(guards=())) for t in rolled.terms):
        raise GiveUp("a roll of positions, or of what is no plain tensor")
    made = engine.leaf(op.out, Opaque(None, "roll", tuple({a[0] for t in rolled.terms for a in t.accs})))
    engine.rolled[made.terms[0].accs[0]] = rolled
    return made


def _around(engine: Engine, v: Val, d: int, first: int) -> Iterable[Term]:
    """The end of ``v`` before ``first``, and what is left of it from there on."""
    x, n = Aff.var(d), v.shape[d]
    for start, low, high in ((n - first, ZERO, Aff.lit(first)), (ZERO, Aff.lit(first), n)):
        inside = frozenset({x - low, high - 1 - x})
        for t in slice_at(engine, v, d, start, 1, high - low).terms if low != high else ():
            moved = t.sub(engine.space, {} if high - low == ONE else {d: x - low})
            yield moved.but(guards=moved.guards | inside)
