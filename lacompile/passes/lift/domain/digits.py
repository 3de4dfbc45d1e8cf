"""The digits of a dimension that an index depends on.

A view that joins batch and head leaves one dimension ``x`` of them: ``floor(x / h)`` depends on the batch alone, and
``x - h floor(x / h)`` on the head.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from .affine import FIRST_DIV, Aff
from .space import Space

Digit = tuple[int, int]
"""A variable, and the step that a place of this digit is worth."""


def digits_of(space: Space, *groups: Sequence[Aff]) -> list[set[Digit]]:
    """What each group of indices depends on, in the digits that all of them together divide their variables into."""
    steps = _steps(space, (a for affs in groups for a in affs))
    return [{digit for a in affs for digit in _held(space, a, steps)} for affs in groups]


def _steps(space: Space, affs: Iterable[Aff]) -> dict[int, list[int]]:
    """Where the digits of a variable begin; none for one that is not divided, or in ways that do not nest."""
    found: dict[int, set[int]] = {}
    whole: set[int] = set()
    for v in {v for a in affs for v, _ in a.terms if v >= FIRST_DIV}:
        inner, step = space.div_of.get(v, (Aff.var(v), 0))
        x = inner.terms[0][0]
        if inner == Aff.var(x) and x < FIRST_DIV:
            found.setdefault(x, set()).add(step)
        else:
            whole |= space.vars(inner)
    nested = {x: sorted(steps) for x, steps in found.items() if x not in whole}
    return {x: steps for x, steps in nested.items() if not any(n % m for m, n in pairwise(steps))}


def _held(space: Space, a: Aff, steps: Mapping[int, Sequence[int]]) -> Iterable[Digit]:
    for x in space.vars(a):
        if x not in steps:
            yield x, 1
            continue
        worth, before = a.coef(x), 1
        if worth:
            yield x, 1
        for step in steps[x]:
            (quotient,) = space.floordiv(Aff.var(x), step).vars
            worth, before = worth * (step // before) + a.coef(quotient), step
            if worth:
                yield x, step
