"""Decays per token: a rate along its tokens, and differences of the prefix sums of one."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence

from .affine import ONE, TAU, ZERO, Aff, Number
from .exponent import Exponent, Mono, sub_mono
from .space import Space
from .term import Term

Lin = tuple[Mono, Aff]
"""A rate times an affine form."""

Sum = tuple[tuple[Mono, Aff], Number]
"""``c P(x)`` as ``((rate along its tokens, x), c)``."""


def along(mono: Mono, dims: Container[tuple[int, int]]) -> Mono:
    """A rate read at some token as that of every token; ``dims`` says where it is read: factor, and dimension of it."""
    return tuple(
        sorted(
            (leaf, tuple(Aff.var(TAU) if (n, d) in dims else i for d, i in enumerate(idx)))
            for n, (leaf, idx) in enumerate(mono)
        )
    )


def between(rate: Mono, start: Aff, end: Aff, c: Number) -> tuple[Sum, Sum]:
    """``c P(end) - c P(start)``."""
    return ((rate, end), c), ((rate, start), -c)


def by_rate(sums: Iterable[Sum]) -> dict[Mono, list[tuple[Aff, Number]]]:
    """The positions of prefix sums, with their coefficients, of each rate."""
    groups: dict[Mono, list[tuple[Aff, Number]]] = {}
    for (mono, pos), c in sums:
        groups.setdefault(mono, []).append((pos, c))
    return groups


def counted_from(space: Space, t: Term, first: Aff, indices: Iterable[int] = ()) -> Term:
    """The same term, these indices and differences of prefix sums counted from the token ``first``."""
    if first == ZERO:
        return t
    sums: list[Sum] = []
    moved = t.sub(space, {j: Aff.var(j) + first for j in indices})
    for rate, ends in by_rate(moved.exp.sums).items():
        if sum(c for _, c in ends):
            sums += [((rate, pos), c) for pos, c in ends]
        else:
            later = sub_mono(space, rate, {TAU: Aff.var(TAU) + first})
            sums += [((later, pos - first), c) for pos, c in ends]
    return moved.but(exp=Exponent.of(moved.exp.lin, sums))


def single_place(ends: Sequence[tuple[Aff, Number]]) -> tuple[Aff, Number] | None:
    """``(p, c)`` where the prefix sums of one rate are ``c P(p + 1) - c P(p)``."""
    at = dict(ends)
    if len(at) == 1 and all(pos.is_const for pos in at):
        at[ZERO] = -sum(at.values())  # P(0) was dropped
    if len(at) != 2:
        return None
    (p, below), (q, above) = at.items()
    if q - p == -ONE:
        (p, below), (q, above) = (q, above), (p, below)
    return (p, above) if q - p == ONE and above == -below else None
