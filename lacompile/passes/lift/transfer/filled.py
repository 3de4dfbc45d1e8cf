"""Numbers that a program writes into a tensor entry by entry, as two nested loops over positions do.

Pieces of one shape merge. Entries are only as many numbers as were written: they become the table that they are, and
the table says what it is when it is complete.
"""

from __future__ import annotations

import math

import numpy as np

from ..domain.affine import Aff
from ..domain.term import Val
from ..engine import Engine
from ..engine.limits import MAX_TABLE

FEW = 2
"""As many different numbers may be the regions of a mask."""


def replaced(engine: Engine, base: Val, src: Val, d: int, start: Aff, length: Aff) -> Val | None:
    """A table with ``[start, start + length)`` of dimension ``d`` replaced by known numbers; None if it is none."""
    held = engine.array_of_table(base)
    if held is None or not engine.finite_numbers(src):
        return None
    if not (start.is_const and length.is_const and all(n.is_const for n in base.shape)):
        return None
    sizes = [int(n.const) for n in base.shape]
    if math.prod(sizes) > MAX_TABLE:
        return None
    whole = np.broadcast_to(held, sizes).copy()
    at = [slice(None)] * len(sizes)
    at[d] = slice(int(start.const), int((start + length).const))
    whole[tuple(at)] = engine.array(src)
    return engine.table_value(whole, base.shape)


def as_table(engine: Engine, v: Val) -> Val:
    """Numbers at pairs of positions, more than a few different ones, as one table; any other value as it is."""
    terms = [t for c in v.cases for t in c.terms]
    if len({(t.coef, t.accs) for t in terms}) <= FEW or any(t.exp or not t.poly.is_const for t in terms):
        return v
    if len(engine.space.vars_of(g for c in v.cases for g in (*c.guards, *(g for t in c.terms for g in t.guards)))) < 2:
        return v
    sizes = [n.const if n.is_const else math.inf for n in v.shape]
    if math.prod(sizes) > MAX_TABLE or not engine.finite_numbers(v):
        return v
    return engine.table_value(engine.array(v), v.shape)
