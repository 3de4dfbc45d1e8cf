"""Weights that differ by feature and by nothing else: numbers that the features are multiplied by, and no decay.

``q * 0.5 ** arange(D)`` is an exponential that moves along features, as a decay is one that moves along positions.
Which index is a feature is known when positions are.
"""

from __future__ import annotations

from collections.abc import Container

import numpy as np

from ..domain.affine import Aff
from ..domain.exponent import Access, Exponent
from ..domain.term import Term
from ..engine import Engine
from ..engine.limits import MAX_TABLE

LARGEST = 80.0  # exponent whose exponential and its inverse are finite in float32 and bfloat16


def factors_apart(engine: Engine, t: Term, shape: tuple[Aff, ...], positions: Container[int]) -> Term:
    """The term with such weights of known numbers as factors."""
    linear = dict(t.exp.lin).get(())
    if linear is None:
        return t
    tables: list[Access] = []
    for v, c in linear.terms:
        size = None if v in positions else _size(engine, t, shape, v)
        if size is not None and abs(c) * size < LARGEST:
            leaf = engine.numbered(np.exp(float(c) * np.arange(size)))
            tables.append((leaf, (Aff.var(v),)))
            linear = linear.without(v)
    lin = ((mono, f if mono else linear) for mono, f in t.exp.lin)
    return t.but(accs=(*t.accs, *tables), exp=Exponent.of(lin, t.exp.sums)) if tables else t


def _size(engine: Engine, t: Term, shape: tuple[Aff, ...], v: int) -> int | None:
    """How many values an index has, from 0 on, if that is a number."""
    if 0 <= v < len(shape):
        end = shape[v] - 1
    else:
        ends = engine.bounds(v, t.guards).ends
        end = ends[1] if v < 0 and ends is not None and ends[0].is_const and ends[0].const >= 0 else None
    return int(end.const) + 1 if end is not None and end.is_const and end.const < MAX_TABLE else None
