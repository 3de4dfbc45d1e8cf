"""Attentions over later positions, ``0 <= i <= j < N``: those of the sequence read from its end, and turned again.

One half of a model that reads in both directions is that, whether it turns its inputs (``flip``) or goes backwards over
the tokens.
"""

from __future__ import annotations

from dataclasses import replace

from ..domain.affine import TAU, ZERO, Aff
from ..domain.exponent import Exponent, sub_mono
from ..domain.prefix import Sum, by_rate
from ..domain.space import Space
from ..domain.term import Term, value
from ..engine import Engine
from ..interpret import Known
from .roles import sequence_index


def from_the_end(engine: Engine, known: Known, main: Term) -> tuple[Known, bool] | None:
    """The same sum over earlier positions, of factors that are read from their end; None if it is none.

    Args:
        main: the term of the value that sums over positions.

    Returns:
        The value, and whether its rows are in turned order.
    """
    found = sequence_index(engine, main)
    if found is None:
        return None
    n = found[1]
    length = known.value.shape[n]
    sums = [t for t in known.value.terms if sequence_index(engine, t) is not None]
    for rows_too in (True, False):
        # one among sums over earlier positions would only turn those into sums over later ones
        if all(_is_over_later(engine, t, length, rows_too=rows_too) for t in sums):
            turned = [_turned(engine, t, n, length, rows_too=rows_too) for t in known.value.terms]
            return replace(known, value=value(known.value.shape, turned)), rows_too
    return None


def _is_over_later(engine: Engine, t: Term, length: Aff, *, rows_too: bool) -> bool:
    """Whether a term sums over positions from its row on, or behind it; rows are counted from their end or not."""
    found = sequence_index(engine, t)
    assert found is not None
    bound, row, last = Aff.var(found[0]), Aff.var(found[1]), length - 1
    first = row if rows_too else last - row
    ends = {g for g in t.guards if found[0] in engine.space.vars(g)}
    return ends in ({last - bound, bound - first}, {last - bound, bound - first - 1})


def _turned(engine: Engine, t: Term, n: int, length: Aff, *, rows_too: bool) -> Term:
    """A term whose positions, and rows if they are to, are counted from the end."""
    mapping = {n: length - 1 - Aff.var(n)} if rows_too else {}
    found = sequence_index(engine, t)
    if found is not None:
        mapping[found[0]] = length - 1 - Aff.var(found[0])
    moved = t.sub(engine.space, mapping)
    return moved.but(exp=Exponent.of(moved.exp.lin, _sums_from_the_end(engine.space, moved.exp.sums, length)))


def _sums_from_the_end(space: Space, sums: tuple[Sum, ...], length: Aff) -> list[Sum]:
    """``P(x)`` as ``P'(N) - P'(N - x)``, where P' sums from the end: of a difference the first goes."""
    out: list[Sum] = []
    for rate, ends in by_rate(sums).items():
        turned = sub_mono(space, rate, {TAU: length - 1 - Aff.var(TAU)})
        dropped = [(ZERO, -total)] if (total := sum(c for _, c in ends)) else []  # P(0)
        out += [((turned, length - pos), -c) for pos, c in (*ends, *dropped)]
    return out
