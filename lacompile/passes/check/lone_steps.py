"""One token by itself: a step of decoding, or one of a loop of which no more was found."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from ..capture.effects import NOWHERE
from ..examples import is_floating
from ..facts import DecayedAttention, Expr, Match, Progress, Refusal, values_of
from ..graph.lenders import numbers_read
from ..graph.schedule import Schedule


def lone_step(schedule: Schedule, match: Match, parameters: Iterable[fx.Node]) -> Refusal | None:
    """Why the attention of one token is left alone, if it is a step of a loop.

    Its state is computed from what its own keys are computed from, and by more than views of an input: so the graph
    has other steps, and to put an operator in the place of each would cost more than it saves. A step of decoding is
    given its state.
    """
    trained = set(parameters)
    for fact in match.facts:
        if _is_step(schedule, fact, trained):
            return Refusal(
                "match",
                "single-term",
                match.target,
                "one sum over j <= i",
                "the sum of one step of an unrolled loop, whose steps do not merge",
                progress=Progress.RECIPE,
            )
    return None


def _is_step(schedule: Schedule, fact: DecayedAttention, trained: set[fx.Node]) -> bool:
    if fact.length != 1 or fact.initial_state is None:
        return False
    state, keys = (_above(schedule, e) for e in (fact.initial_state, fact.k))
    given = {n for n in state & keys if n.op in ("placeholder", "get_attr")} - trained
    return bool(given) and any(sum(map(is_floating, n.all_input_nodes)) > 1 for n in state - trained)


def _above(schedule: Schedule, expr: Expr) -> set[fx.Node]:
    """What a recipe's numbers are computed from, by way of values and of memory, as a window is that takes tokens."""
    seen: set[fx.Node] = set()
    work = [v.node for v in values_of(expr)]
    while work:
        at = work.pop()
        if at not in seen:
            seen.add(at)
            for given in numbers_read(at):
                held = schedule.effects.lives.get(given, NOWHERE)
                work += [given, *schedule.writers(held, -1, schedule.order[at] - 1)]
    return seen
