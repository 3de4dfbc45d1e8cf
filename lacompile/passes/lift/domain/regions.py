"""Regions of an index space: boxes cut by guards, what they imply, and where they are empty.

A graph has few regions and asks of each many times, so answers about a set of guards are kept for the whole analysis.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from .affine import FIRST_DIV, MAX_DIMS, Aff, Number, Range
from .space import Space, box
from .term import Guards

Shape = tuple[Aff, ...]
Loose = tuple[tuple[int, Number], ...]


class Bounds(NamedTuple):
    """The guards that bound one variable from below (var >= low) and above (var <= high)."""

    low: list[Aff]
    high: list[Aff]
    other: bool  # some guard holds the variable in another way

    @property
    def ends(self) -> tuple[Aff, Aff] | None:
        """The least and the largest value, if one guard says either and no other holds the variable."""
        return None if self.other or len(self.low) != 1 or len(self.high) != 1 else (self.low[0], self.high[0])


class Regions:
    """The space of one analysis, the shapes of its leaves, and what guards say about boxes."""

    def __init__(self) -> None:
        self.space = Space()
        self.leaf_shapes: dict[int, Shape] = {}
        self._boxes: dict[Shape, dict[int, Range]] = {}
        self._ranges: dict[tuple[Shape, Guards], dict[int, Range]] = {}
        self._bounds: dict[tuple[int, Guards], Bounds] = {}
        self._pruned: dict[tuple[Shape, Guards], Guards | None] = {}

    # ------------------------------------------------------------------------------------------------------- boxes

    def box(self, shape: Shape) -> Mapping[int, Range]:
        """The ranges of the free dimensions."""
        found = self._boxes.get(shape)
        if found is None:
            found = self._boxes[shape] = box(shape)
        return found

    def ranges(self, shape: Shape, guards: Iterable[Aff] = ()) -> Mapping[int, Range]:
        """The box of the free dimensions, tightened by the guards that speak of one free dimension alone."""
        if not guards:
            return self.box(shape)
        key = (shape, frozenset(guards))
        found = self._ranges.get(key)
        if found is None:
            found = self._ranges[key] = self._tightened(*key)
        return found

    def _tightened(self, shape: Shape, guards: Guards) -> dict[int, Range]:
        out = dict(self.box(shape))
        for g in guards:
            free = [(v, c) for v, c in g.terms if v < MAX_DIMS]
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
        key = (var, frozenset(guards))
        found = self._bounds.get(key)
        if found is None:
            found = self._bounds[key] = self._bounds_of(*key)
        return found

    def _bounds_of(self, var: int, guards: Guards) -> Bounds:
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

    # -------------------------------------------------------------------------------------------------- implication

    def _loose(self, g: Aff) -> Loose | None:
        """The part of a guard that no box bounds; None where a floor division hides it.

        A sum of two guards has a bound only if their loose parts cancel, and so has a difference only if they agree.
        """
        for v, _ in g.terms:
            if v >= FIRST_DIV and any(w < 0 for w in self.space.vars(Aff.var(v))):
                return None
        return tuple((v, c) for v, c in g.terms if v < 0)

    def feasible(self, guards: Iterable[Aff], ranges: Mapping[int, Range]) -> bool:
        """False only where the guards provably exclude each other on the box."""
        seen: dict[Loose, list[Aff]] = {}
        hidden: list[Aff] = []
        for g in guards:
            loose = self._loose(g)
            if not loose and self.space.upper(g, ranges) < 0:
                return False
            opposite = None if loose is None else seen.get(tuple((v, -c) for v, c in loose), ())
            others = [h for hs in seen.values() for h in hs] if opposite is None else opposite
            if any(self.space.upper(g + h, ranges) < 0 for h in (*others, *hidden)):
                return False
            if loose is None:
                hidden.append(g)
            else:
                seen.setdefault(loose, []).append(g)
        return True

    def implied(self, g: Aff, guards: Iterable[Aff], ranges: Mapping[int, Range]) -> bool:
        """True where ``g >= 0`` follows from the box and one of the guards."""
        g = self.space.guard(g)
        loose = self._loose(g)
        if not loose and self.space.lower(g, ranges) >= 0:
            return True
        return any(self.space.lower(g - h, ranges) >= 0 for h in guards if self._comparable(loose, h))

    def _comparable(self, loose: Loose | None, h: Aff) -> bool:
        """Whether a guard with this loose part may be bounded by ``h``."""
        return loose is None or (other := self._loose(h)) is None or other == loose

    def prune(self, guards: Iterable[Aff], shape: Shape) -> Guards | None:
        """R1 for guards over free dimensions: drop what the box or another guard implies; None where impossible."""
        kept = {self.space.guard(g) for g in guards}
        ranges = self.box(shape)
        if not self.feasible(kept, ranges):
            return None
        for g in sorted(kept):
            if self.implied(g, kept - {g}, ranges):
                kept.discard(g)
        return frozenset(kept)

    # --------------------------------------------------------------------------------------------- guards of a term

    def pruned(self, guards: Guards, shape: Shape) -> Guards | None:
        """R1: drop guards that the box or another guard implies; None if the guards exclude each other."""
        key = (shape, guards)
        if key not in self._pruned:
            self._pruned[key] = self._prune(guards, shape)
        return self._pruned[key]

    def _prune(self, given: Guards, shape: Shape) -> Guards | None:
        plain = self.box(shape)
        guards = {h for g in given for h in self._corner(self.space.guard(g), plain)}
        for g in [g for g in guards if g.is_const]:
            if g.const < 0:
                return None
            guards.discard(g)
        guards = self._without_digits(guards, plain)
        ranges = self.ranges(shape, guards)
        if not self.feasible(guards, ranges):
            return None
        for g in sorted(guards):
            others = guards - {g}
            if any(v < 0 for v in self.space.vars(g)):
                loose = self._loose(g)
                near = (h for h in others if self._comparable(loose, h) and self._same_side(g, h))
                if any(self.space.lower(g - h, ranges) >= 0 for h in near):
                    guards.discard(g)
            elif self.implied(g, others, plain) or self._follows_from_a_range(g, others, plain):
                guards.discard(g)
        return frozenset(guards)

    def _corner(self, g: Aff, plain: Mapping[int, Range]) -> Iterable[Aff]:
        """A guard that holds in one corner of the box alone, as one guard for each dimension that it pins."""
        if len(g.terms) < 2 or any(v not in plain for v, _ in g.terms) or self.space.upper(g, plain) != 0:
            return (g,)
        return [Aff.var(v) - plain[v][1] if c > 0 else plain[v][0] - Aff.var(v) for v, c in g.terms]

    def _without_digits(self, guards: set[Aff], plain: Mapping[int, Range]) -> set[Aff]:
        """``m a + s >= 0`` with ``0 <= s < m`` on the box and under the other guards is ``a >= 0``."""
        for g in sorted(guards):
            sizes = {int(abs(c)) for _, c in g.terms} - {1}
            if not sizes or len(g.terms) < 2:
                continue
            ranges = {**plain, **self.numbers(guards - {g}, plain)}
            for m in sorted(sizes):
                if (whole := self.space.digits(g, m, ranges)) is not None:
                    guards = guards - {g} | {self.space.guard(whole)}
                    break
        return guards

    def numbers(self, guards: Iterable[Aff], ranges: Mapping[int, Range]) -> dict[int, Range]:
        """The ranges of bound indices that guards give, each end as far as it gets over ``ranges``."""
        found: dict[int, Range] = {}
        waiting = {v for g in guards for v, _ in g.terms if v < 0}
        for _ in range(2):  # the ends of a range may speak of another index
            known = {**ranges, **found}
            for var in waiting - found.keys():
                b = self.bounds(var, guards)
                low = self._farthest(b.low, known, 0)
                high = self._farthest(b.high, known, 1)
                if low is not None and high is not None:
                    found[var] = (low, high)
        return found

    def _farthest(self, ends: Iterable[Aff], ranges: Mapping[int, Range], side: int) -> Aff | None:
        """The first of some lower (side 0) or upper (1) ends that is bounded by a number, or by one in each run."""
        for end in sorted(ends, key=lambda e: len(e.terms)):
            if any(v >= FIRST_DIV for v, _ in end.terms):
                continue
            far = self.space.sub(end, {v: ranges[v][side if c > 0 else 1 - side] for v, c in end.terms if v in ranges})
            if self.space.is_size(far):
                return far
        return None

    def _follows_from_a_range(self, g: Aff, others: set[Aff], plain: Mapping[int, Range]) -> bool:
        """Where the guard fails, the range low <= b <= high of a bound index b is empty, so the term is 0 anyway."""
        wanted = self.space.vars(g)
        for var in {v for h in others for v, _ in h.terms if v < 0}:
            b = self.bounds(var, others)
            for low in b.low:
                for high in b.high:
                    room = self.space.guard(high - low)
                    if room.terms and self.space.vars(room) <= wanted and self.space.lower(g - room, plain) >= 0:
                        return True
        return False

    def _same_side(self, g: Aff, h: Aff) -> bool:
        return all(v >= 0 for v in self.space.vars(g - h))
