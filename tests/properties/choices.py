"""Random decisions that are recorded, so that a program can be made again, and made simpler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import TypeVar

X = TypeVar("X")


class Choices:
    """Decisions from a seed, or from a record of earlier ones; beyond its end the first option is taken.

    Options are listed simplest first, so that a record of small numbers is a simple program.
    """

    def __init__(self, seed: int, record: Sequence[int] | None = None):
        self._random = Random(seed)
        self._given = record
        self.record: list[int] = []

    def __call__(self, options: Sequence[X]) -> X:
        return options[self.below(len(options))]

    def flip(self, one_in: int = 2) -> bool:
        """True once in ``one_in`` times."""
        return self.below(one_in) == one_in - 1

    def below(self, n: int) -> int:
        if self._given is None:
            self.record.append(self._random.randrange(n))
        else:
            at = len(self.record)
            self.record.append(self._given[at] % n if at < len(self._given) else 0)
        return self.record[-1]


def shrink(record: Sequence[int], fails: Callable[[Sequence[int]], bool]) -> list[int]:
    """A record with more zeros in it for which ``fails`` still holds."""
    best = list(record)
    improved = True
    while improved:
        improved = False
        for at in range(len(best)):
            if not best[at]:
                continue
            for smaller in (0, best[at] // 2):
                tried = [*best[:at], smaller, *best[at + 1 :]]
                if smaller < best[at] and fails(tried):
                    best, improved = tried, True
                    break
    return best
