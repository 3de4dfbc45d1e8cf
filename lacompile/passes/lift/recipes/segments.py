"""Attentions side by side: sequences that are packed into one tensor, each of which begins anew, or heads.

A program that goes over sequences by numbers joins what it computes of each: no range of the whole begins at one
position, but on the rows of each sequence the value is an attention by itself. So it is on each head's part where a
loop over heads, each with a state and a decay of its own, lies inside that over tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ...facts import Call, Expr
from ..domain.affine import Aff
from ..domain.term import Term
from ..engine import Engine
from ..interpret import Known
from ..prove.obligations import prove
from ..prove.proof import Refused
from ..prove.roles import sequence_index
from .builder import Builder, Proved

MOST = 16
"""Attentions, each of which may be a call of the operator."""

Rows = tuple[int, int]
"""The first and the last row."""

Found = tuple[list[Proved], Expr]


def prove_segments(builder: Builder, known: Known) -> Found | None:
    """The attentions that lie side by side in this value, and the recipe that joins them; None if there are none."""
    if not known.value.single or not all(n.is_const for n in known.value.shape):
        return None
    dims = {found[1] for t in known.value.terms if (found := sequence_index(builder.engine, t)) is not None}
    if len(dims) != 1:
        return None
    (rows,) = dims
    for n in (rows, *(d for d in range(len(known.value.shape)) if d != rows)):
        if (found := _side_by_side_along(builder, known, n)) is not None:
            return found
    return None


def _side_by_side_along(builder: Builder, known: Known, n: int) -> Found | None:
    """The same for those that lie side by side along dimension ``n``: that of rows, or of heads or features."""
    by_rows = _by_rows(builder.engine, known.value.terms, n, int(known.value.shape[n].const))
    if by_rows is None or not 2 <= len(by_rows) <= MOST:
        return None
    proved: list[Proved] = []
    parts: list[tuple[Rows, Expr]] = []
    try:
        for rows in sorted(by_rows):
            proof = prove(builder.engine, _of_rows(builder, known, n, rows, by_rows[rows]))
            attention, recipe = builder.build(proof)
            proved.append((proof, attention))
            parts.append((rows, recipe))
    except Refused:
        return None
    joined = _side_by_side(parts, n, [int(size.const) for size in known.value.shape])
    return None if joined is None else (proved, joined)


def _by_rows(engine: Engine, terms: Sequence[Term], n: int, length: int) -> dict[Rows, list[Term]] | None:
    """The terms of each sequence; what is no sum over positions may be a term of several, of each as a whole."""
    found: dict[Rows, list[Term]] = {}
    for t in terms:
        if sequence_index(engine, t) is not None:
            found.setdefault(_rows(engine, t, n, length), []).append(t)
    for t in terms:
        if sequence_index(engine, t) is None:
            low, high = _rows(engine, t, n, length)
            within = [rows for rows in found if low <= rows[0] and rows[1] <= high]
            if sum(last - first + 1 for first, last in within) != high - low + 1:
                return None
            for rows in within:
                found[rows].append(t)
    return found


def _rows(engine: Engine, t: Term, n: int, length: int) -> Rows:
    """Where a term counts, as far as conditions on its row alone say so, or where the range up to it begins."""
    low, high = 0, length - 1
    found = sequence_index(engine, t)
    if found is not None and found[1] == n:
        low = max([low, *(int(x.const) for x in engine.bounds(found[0], t.guards).low if x.is_const)])
    for g in t.guards:
        if g.terms == ((n, 1),):
            low = max(low, -int(g.const))
        elif g.terms == ((n, -1),):
            high = min(high, int(g.const))
    return low, high


def _of_rows(builder: Builder, known: Known, n: int, rows: Rows, terms: Sequence[Term]) -> Known:
    """The value on these rows, counted from the first of them."""
    engine, (low, high) = builder.engine, rows
    shape = (*known.value.shape[:n], Aff.lit(high - low + 1), *known.value.shape[n + 1 :])
    at = Aff.lit(low) if low == high else Aff.var(n) + low
    return replace(known, value=engine.sum_of(shape, (t.sub(engine.space, {n: at}) for t in terms)))


def _side_by_side(parts: Sequence[tuple[Rows, Expr]], n: int, shape: Sequence[int]) -> Expr | None:
    """The parts along dimension ``n``, zeros between them; None if two of them overlap."""
    pieces: list[Expr] = []
    at = 0
    for (low, high), part in (*parts, ((shape[n], shape[n]), None)):
        if low < at:
            return None
        if low > at:
            between = [*shape[:n], low - at, *shape[n + 1 :]]
            pieces.append(Call(torch.Tensor.new_zeros, (parts[0][1], between)))
        if part is not None:
            pieces.append(part)
        at = high + 1
    return Call(torch.cat, (pieces, n))
