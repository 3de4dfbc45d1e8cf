"""Regions of an index space: boxes cut by guards, what they imply, and where they are empty."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from .affine import FIRST_DIV, Aff, Range, Space, box
from .term import Guards


class Bounds(NamedTuple):
    """The guards that bound one variable from below (var >= low) and above (var <= high)."""

    low: list[Aff]
    high: list[Aff]
    other: bool  # some guard holds the variable in another way


class Regions:
    """The space of one analysis, the shapes of its leaves, and what guards say about boxes."""

    def __init__(self) -> None:
        self.space = Space()
        self.leaf_shapes: dict[int, tuple[Aff, ...]] = {}

    # ------------------------------------------------------------------------------------------------------- boxes

    def ranges(self, shape: Iterable[Aff], guards: Iterable[Aff] = ()) -> dict[int, Range]:
        """The box of the free dimensions, tightened by the guards that speak of one free dimension alone."""
        out = box(shape)
        for g in guards:
            free = [(v, c) for v, c in g.terms if v < 100]
            if len(free) != 1 or free[0][0] < 0 or any(v >= FIRST_DIV for v, _ in g.terms):
                continue
            v, c = free[0]
            if v not in out:
                continue
            low, high = out[v]
            rest = g.without(v)
            if c == 1 and self.space.lower(-rest - low, {}) >= 0:
                out[v] = (-rest, high)
            elif c == -1 and self.space.lower(high - rest, {}) >= 0:
                out[v] = (low, rest)
        return out

    def bounds(self, var: int, guards: Iterable[Aff]) -> Bounds:
        low: list[Aff] = []
        high: list[Aff] = []
        other = False
        for g in guards:
            c = g.coef(var)
            if c == 1:
                low.append(-g.without(var))
            elif c == -1:
                high.append(g.without(var))
            elif c or any(v >= FIRST_DIV and var in self.space.vars(Aff.var(v)) for v, _ in g.terms):
                other = True
        return Bounds(low, high, other)

    def feasible(self, guards: Iterable[Aff], ranges: Mapping[int, Range]) -> bool:
        """False only where the guards provably exclude each other on the box."""
        gs = list(guards)
        for n, g in enumerate(gs):
            if self.space.upper(g, ranges) < 0:
                return False
            if any(self.space.upper(g + h, ranges) < 0 for h in gs[:n]):
                return False
        return True

    def implied(self, g: Aff, guards: Iterable[Aff], ranges: Mapping[int, Range]) -> bool:
        """True where ``g >= 0`` follows from the box and one of the guards."""
        g = self.space.guard(g)
        return self.space.lower(g, ranges) >= 0 or any(self.space.lower(g - h, ranges) >= 0 for h in guards)

    def prune(self, guards: Iterable[Aff], shape: tuple[Aff, ...]) -> Guards | None:
        """R1 for guards over free dimensions: drop what the box or another guard implies; None where impossible."""
        kept = {self.space.guard(g) for g in guards}
        ranges = box(shape)
        if not self.feasible(kept, ranges):
            return None
        for g in sorted(kept):
            if self.implied(g, kept - {g}, ranges):
                kept.discard(g)
        return frozenset(kept)
