"""Rows that are numbered by chunk and place in it, as where a norm follows before the chunks are flattened: proved as
rows of one dimension, and split again.
"""

from __future__ import annotations

from dataclasses import replace

from ..domain.affine import MAX_DIMS, Aff
from ..domain.term import Term
from ..engine import Engine
from ..interpret import Known
from .roles import sequence_index


def joined(engine: Engine, known: Known, main: Term) -> tuple[Known, tuple[int, int, int]] | None:
    """The same value with one dimension for two that number its rows, and those: of chunks, of places in one, and how
    many places there are. The joined one is where that of chunks was. None if its rows are not numbered so.

    Args:
        engine: the analysis.
        known: the value.
        main: the sum that is to be proved.
    """
    found = sequence_index(engine, main)
    if found is None:
        return None
    shape = known.value.shape
    for g in main.guards:
        side = g.coef(found[0])
        coefficients = {v: -side * c for v, c in g.terms if v != found[0]}
        if side not in (-1, 1) or not all(0 <= v < MAX_DIMS for v in coefficients):
            continue
        place = next((v for v, c in coefficients.items() if c == 1), None)
        m = 0 if place is None or not shape[place].is_const else int(shape[place].const)
        chunk = next((v for v, c in coefficients.items() if c == m > 1), None)
        if place is not None and chunk is not None:
            return _joined(engine, known, chunk, place, m)
    return None


def _joined(engine: Engine, known: Known, chunk: int, place: int, m: int) -> tuple[Known, tuple[int, int, int]]:
    shape = known.value.shape
    kept = [d for d in range(len(shape)) if d != place]
    row = Aff.var(kept.index(chunk))
    whole = engine.space.floordiv(row, m)
    mapping = {d: Aff.var(n) for n, d in enumerate(kept)} | {chunk: whole, place: row - whole * m}
    value = engine.index(known.value, mapping, tuple(shape[d] * m if d == chunk else shape[d] for d in kept))
    return replace(known, value=value), (chunk, place, m)
