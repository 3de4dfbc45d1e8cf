"""Loops that Dynamo has unrolled: other graphs that compute the same, in which more may be found.

What a loop does to each of its results is done to all of them at once behind it (``fission.py``), layers that take
turns in it run one after the other (``layers.py``), and what a step makes of its token alone is made ahead of it
(``stateless.py``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from torch import fx

from ..._compat import hint
from ..facts import values_of
from ..graph.schedule import Schedule
from ..lift import Analysis
from .fission import fissioned
from .layers import one_after_the_other
from .stateless import computed_ahead

log = logging.getLogger("lacompile")

Reading = tuple[fx.GraphModule, Analysis]
"""A graph, and what was found in it."""


def behind_loops(gm: fx.GraphModule, look: Callable[[fx.GraphModule], Analysis], found: Analysis) -> Reading:
    """The graph in which a loop's results are joined before they are projected, where more is found in that.

    Where layers alternate in the loop, that is looked for in one in which they do not; and where something is left over
    still, in one in which what a step makes of its token alone is computed ahead of the loop.
    """

    def made_by(change: Callable[[Schedule], fx.GraphModule | None], at: Analysis) -> Reading | None:
        try:
            other = change(at.schedule)
            return None if other is None else (other, look(other))
        except Exception:  # what cannot be moved stays where it is
            log.debug("a loop could not be written in another way", exc_info=True)
            return None

    best = gm, found
    if (apart := made_by(one_after_the_other, found)) is not None:
        best = _better(best, _better(apart, made_by(fissioned, apart[1])))
    best = _better(best, made_by(fissioned, found)) if best[0] is gm else best
    if _leaves_something(best[1]) and (before := made_by(computed_ahead, apart[1] if apart else found)) is not None:
        best = _better(best, made_by(fissioned, before[1]))
    return best


def _leaves_something(found: Analysis) -> bool:
    """Whether there is a sum of which nothing was made, or of one step alone."""
    steps = any(f.length == 1 for m in found.matches for f in m.facts)
    return not found.matches or bool(found.refusals) or steps


def _better(one: Reading, other: Reading | None) -> Reading:
    """The other one, if more is found in it; the time that both took is told."""
    if other is None:
        return one
    (_, before), (_, again) = one, other
    better = bool(again.matches) and _worth(again) >= _worth(before)
    seconds = {k: before.seconds.get(k, 0) + s for k, s in again.seconds.items()}
    gm, found = other if better else one
    return gm, replace(found, seconds=seconds)


def _worth(found: Analysis) -> tuple[int, int, int]:
    """The elements of the largest value that is replaced; of two alike more attentions in a row, then fewer pieces."""
    largest = max((hint(m.target.meta["example_value"].numel()) for m in found.matches), default=0)
    return largest, _in_a_row(found), -len(found.matches) - len(found.refusals)


def _in_a_row(found: Analysis) -> int:
    """How many attentions are computed one from the other, as those of layers are; a step alone is none."""
    made = {m.target: m for m in found.matches if any(f.length != 1 for f in m.facts)}
    before: dict[fx.Node, int] = {}
    for node in found.schedule.nodes:
        match = made.get(node)
        given = node.all_input_nodes if match is None else [v.node for v in values_of(match.replacement)]
        before[node] = max((before.get(n, 0) for n in given), default=0) + (match is not None)
    return max(before.values(), default=0)
