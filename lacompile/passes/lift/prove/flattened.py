"""Heads and value features in one dimension, as in ``o.reshape(B, N, H * Dv)``: proved apart, and joined again.

Without that each feature is a head of its own, with one feature: right, and as many times slower.
"""

from __future__ import annotations

from dataclasses import replace

from ..domain.affine import Aff
from ..domain.term import Term
from ..engine import Engine
from ..interpret import Known
from ..transfer.reshaping import view_map


def apart(engine: Engine, known: Known, main: Term, row: int) -> tuple[Known, int] | None:
    """The same value with a dimension more, and which was split: one whose index the sum divides by a number.

    Args:
        engine: the analysis.
        known: the value.
        main: the sum that is to be proved.
        row: the dimension of positions, which stays.
    """
    shape = known.value.shape
    for v in sorted({v for a in main.affs() for v, _ in a.terms}):
        inner, m = engine.space.div_of.get(v, (None, 0))
        for d, size in enumerate(shape):
            if inner == Aff.var(d) and d != row and size.is_const and not size.const % m:
                split = (*shape[:d], Aff.lit(int(size.const) // m), Aff.lit(m), *shape[d + 1 :])
                value = engine.index(known.value, view_map(engine, shape, split), split)
                return replace(known, value=value), d
    return None
