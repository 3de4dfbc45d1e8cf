"""Rates in their canonical reading: a decay per token as differences of prefix sums, a decay per head as a product.

``g[.., 5]`` is ``P(6) - P(5)`` where 5 is a token, so that the product of the decays of many tokens telescopes. The
same access is the rate of head 5 elsewhere. Every reading is exact; which one is taken decides what merges.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ..domain.affine import FIRST_DIV, FIRST_SYMBOL, INF, MAX_DIMS, TAU, Aff, Range
from ..domain.exponent import Access, Exponent, Mono, sub_mono
from ..domain.prefix import Lin, Sum, along, between, by_rate, single_place
from ..domain.regions import Regions


class Reading(NamedTuple):
    """A rate as the one at a place along a dimension; of two readings the one of the higher rank is likelier."""

    along: Mono
    at: Aff
    rank: Any


class Rates(Regions):
    """Exponents whose rates are read at single tokens."""

    def telescoped(self, exp: Exponent, accs: Sequence[Access]) -> Exponent:
        """``exp`` with every single token of a long dimension as a difference of prefix sums, no head as one.

        Nor is a factor of every position one: ``P(j + 1) - P(j)``, which the tokens of a loop merge into, is ``g[j]``.
        """
        rates = [self._of_base(rate) for rate in exp.lin]
        readings = [self._readings(mono, accs) if mono and f.is_const else [] for mono, f in rates]
        walked = Counter(along for found in readings for along in {r.along for r in found})
        walked.update({along: 2 for (along, _), _ in exp.sums})
        lin: list[Lin] = []
        sums: list[Sum] = list(exp.sums)
        for (mono, f), found in zip(rates, readings, strict=True):
            # alone, a rate says nothing of what it is read along
            found = [r for r in found if accs or walked[r.along] > 1]
            if not found:
                lin.append((mono, f))
                continue
            best = max(found, key=lambda r: (walked[r.along] > 1, r.rank))
            sums += between(best.along, best.at, best.at + 1, f.const)
        single, sums = self._of_single_places(sums, accs)
        return Exponent.of([*lin, *single], sums)

    def seen(self, size: Aff) -> Aff:
        """What a size is in the run that was traced, which may say which of two readings is likelier, and no more.

        Each input of a program may have a symbol of its own for the one length that all of them have.
        """
        return size

    def multiple(self, leaf: int) -> tuple[int, float]:
        """A leaf, and the number that all its entries times are those of this one."""
        return leaf, 1.0

    def _of_base(self, rate: Lin) -> Lin:
        """A rate of known numbers, as a multiple of the one that stands for all that are proportional."""
        mono, f = rate
        if len(mono) != 1:
            return rate
        base, c = self.multiple(mono[0][0])
        return rate if base == mono[0][0] else (((base, mono[0][1]),), f * c)

    def _readings(self, mono: Mono, accs: Sequence[Access]) -> list[Reading]:
        """The dimensions along which a rate that is read at numbers may be one of many tokens."""
        fixed: dict[Aff, list[tuple[Any, int, int]]] = {}
        for n, (leaf, idx) in enumerate(mono):
            for d, (i, size) in enumerate(zip(idx, self.leaf_shapes[leaf], strict=True)):
                if all(FIRST_SYMBOL <= v < FIRST_DIV for v, _ in i.terms) and (not size.is_const or size.const > 1):
                    if not self._is_head(size, i, accs):
                        seen = self.seen(size)
                        rank = (self._is_token(size, i, accs), seen.const if seen.is_const else INF, -d)
                        fixed.setdefault(i, []).append((rank, n, d))
        out = []
        for at, places in fixed.items():
            best = {n: rank for rank, n, _ in sorted(places)}
            # a function of several tensors, as where(mask, 0, g) is, has a dimension of tokens for each of them
            dims = {(n, d) for rank, n, d in places if rank[:2] == best[n][:2]}
            out.append(Reading(along(mono, dims), at, max(places)[0]))
        return out

    def _read(self, size: Aff, accs: Sequence[Access]) -> list[set[Aff]]:
        """Where the factors of a term read dimensions of this size: the places of each that has one.

        A dimension that the tensor shares, such as a batch of the same size, says nothing.
        """
        seen = self.seen(size)

        def at(leaf: int, idx: Sequence[Aff]) -> set[Aff]:
            sizes = self.leaf_shapes[leaf]
            return {i for i, n in zip(idx, sizes, strict=True) if self.seen(n) == seen and not self._is_free(i)}

        return [places for leaf, idx in accs if (places := at(leaf, idx))]

    @staticmethod
    def _is_free(i: Aff) -> bool:
        return len(i.terms) == 1 and i.terms[0][1] == 1 and not i.const and 0 <= i.terms[0][0] < MAX_DIMS

    def _is_head(self, size: Aff, place: Aff, accs: Sequence[Access]) -> bool:
        """Whether a place along a dimension of this size is a head, going by the factors that the rate belongs to.

        All factors, or several, have such a dimension, and all those are at that place; or several factors have none.
        Where the place is a token, the keys are at others.
        """
        read = self._read(size, accs)
        if not read:
            return len(accs) > 1
        return (len(read) > 1 or len(accs) == 1) and all(place in at for at in read)

    def _is_token(self, size: Aff, place: Aff, accs: Sequence[Access]) -> bool:
        """Whether some factor reads such a dimension at another number."""
        return any(i != place and i.is_const for at in self._read(size, accs) for i in at)

    def _of_single_places(self, sums: Sequence[Sum], accs: Sequence[Access]) -> tuple[list[Lin], list[Sum]]:
        """``c P(p + 1) - c P(p)``, p a head or no number, as ``c`` times the rate at p; and the other prefix sums."""
        lin: list[Lin] = []
        left: list[Sum] = []
        for mono, ends in by_rate(sums).items():
            found = single_place(ends) if accs else None
            stays = found is not None and all(FIRST_SYMBOL <= v < FIRST_DIV for v, _ in found[0].terms)
            if found is None or (stays and not self._heads_at(mono, found[0], accs)):
                left += [((mono, pos), c) for pos, c in ends]
                continue
            place, c = found
            lin.append((sub_mono(self.space, mono, {TAU: place}), Aff.lit(c)))
        return lin, left

    def placed(self, exp: Exponent, wanted: Callable[[Mono], bool]) -> Exponent:
        """``exp`` with the prefix sums of these rates as rates at places, where they are that."""
        lin: list[Lin] = list(exp.lin)
        left: list[Sum] = []
        for mono, ends in by_rate(exp.sums).items():
            found = single_place(ends) if wanted(mono) else None
            if found is None:
                left += [((mono, pos), c) for pos, c in ends]
            else:
                lin.append((sub_mono(self.space, mono, {TAU: found[0]}), Aff.lit(found[1])))
        return Exponent.of(lin, left)

    def _heads_at(self, mono: Mono, place: Aff, accs: Sequence[Access]) -> bool:
        """Whether the running position of a rate is a head, at this place."""
        return all(
            self._is_head(size, self.space.sub(i, {TAU: place}), accs)
            for leaf, idx in mono
            for i, size in zip(idx, self.leaf_shapes[leaf], strict=True)
            if i.coef(TAU)
        )

    # --------------------------------------------------------------------------------------------- at most one step

    def short_steps(self, exp: Exponent, accs: Sequence[Access], ranges: Mapping[int, Range]) -> Exponent:
        """``g[p] f`` where f is 0 or 1 and p a position of the factors: ``P(p + 1) - P(p + 1 - f)``, or the like.

        Chunks of two tokens hold one decay between them.
        """
        lin: list[Lin] = []
        sums: list[Sum] = list(exp.sums)
        for mono, f in exp.lin:
            found = self._short_step(mono, f, accs, ranges) if mono and f.terms else None
            if found is None:
                lin.append((mono, f))
            else:
                sums += found
        return Exponent.of(lin, sums) if len(lin) < len(exp.lin) else exp

    def _short_step(
        self, mono: Mono, f: Aff, accs: Sequence[Access], ranges: Mapping[int, Range]
    ) -> tuple[Sum, Sum] | None:
        if not all(isinstance(c, int) for c in (f.const, *(c for _, c in f.terms))):
            return None
        read = {i for _, idx in accs for i in idx}
        for sign in (1, -1):
            step = f * sign
            if self.space.lower(step, ranges) < 0 or self.space.upper(step, ranges) > 1:
                continue
            for p in sorted({i for leaf, idx in mono for i in self._tokens(leaf, idx, accs)}):
                if p - step in read:
                    ends = (p + 1 - step, p + 1)
                elif p + step - 1 in read:
                    ends = (p, p + step)
                else:
                    continue
                at = {(n, d) for n, (_, idx) in enumerate(mono) for d, i in enumerate(idx) if i == p}
                return between(along(mono, at), *ends, sign)
        return None

    def _tokens(self, leaf: int, idx: Sequence[Aff], accs: Sequence[Access]) -> list[Aff]:
        """The places at which a rate may be read along tokens."""
        sizes = self.leaf_shapes[leaf]
        return [i for i, n in zip(idx, sizes, strict=True) if not self._is_head(n, i, accs)]
