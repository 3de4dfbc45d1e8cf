"""Trying tiles one after the other, within a budget of time."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

log = logging.getLogger("lacompile")
WORTH = 1.02
"""How many times as fast as the first candidate, the safe one, another must be to be taken: less is noise."""


@dataclass(frozen=True)
class Found:
    """The place of the fastest, and what each that was tried took; None for one that does not run or is wrong."""

    place: int
    milliseconds: tuple[float | None, ...]


def search(
    count: int,
    measure: Callable[[int], float | None],
    budget: float,
    say: Callable[[int, float], None] = lambda tried, elapsed: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Found:
    """The fastest of ``count`` candidates; the first one if none runs, or none is worth leaving it.

    Args:
        count: how many there are. The first is always tried.
        measure: milliseconds by place, or None.
        budget: seconds after which no other is begun.
        say: told how many have been tried, and after how many seconds.
        clock: seconds.
    """
    begun = clock()
    found: list[float | None] = []
    say(0, 0.0)
    while len(found) < count and (not found or clock() - begun < budget):
        found.append(measure(len(found)))
        say(len(found), clock() - begun)
    ran = [(ms * WORTH if place else ms, place) for place, ms in enumerate(found) if ms is not None]
    return Found(min(ran)[1] if ran else 0, tuple(found))


class Progress:
    """A bar on a terminal; a line in the log elsewhere."""

    WIDTH = 24

    def __init__(self, title: str, count: int, budget: float):
        self.title, self.count, self.budget = title, count, budget
        self.on_terminal = sys.stderr.isatty()
        if not self.on_terminal:
            log.info("choosing tiles for %s: %d candidates, at most %.0f s", title, count, budget)

    def __call__(self, tried: int, elapsed: float) -> None:
        if self.on_terminal:
            done = self.WIDTH * tried // self.count
            bar = "#" * done + "." * (self.WIDTH - done)
            end = "\n" if tried == self.count else ""
            print(f"\r[{bar}] {tried}/{self.count} tiles, {elapsed:.0f} s: {self.title}", end=end, file=sys.stderr)
