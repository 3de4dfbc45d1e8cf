"""Row sums of a square that is computed anyway: to replace them by an operator of their own would only add work."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import fx

from ..capture.effects import overlap
from ..facts import Call, Const, Expr, Match, Size, children, values_of
from ..graph.lenders import numbers_read
from ..graph.schedule import Schedule


def worthwhile(schedule: Schedule, matches: Sequence[Match]) -> list[Match]:
    """The matches without the sums of what the rewritten graph still holds, as where a square is a result itself."""
    kept = list(matches)
    while True:
        left = _still_computed(schedule, kept)
        idle = [m for m in kept if _sums_alone(m) and left.issuperset(m.target.all_input_nodes)]
        if not idle:
            return kept
        kept = [m for m in kept if m not in idle]


def _sums_alone(match: Match) -> bool:
    """Whether the target is a sum of one tensor, which no operand is: what the operator reads has ones for values."""
    if match.after is not None or not all(_is_number(f.v) for f in match.facts):
        return False
    given = {v.node for v in values_of(match.replacement)}
    return len(match.target.all_input_nodes) == 1 and given.isdisjoint(match.target.all_input_nodes)


def _is_number(expr: Expr) -> bool:
    if isinstance(expr, Const | Size):
        return True
    return isinstance(expr, Call) and all(map(_is_number, children(expr)))


def _still_computed(schedule: Schedule, matches: Collection[Match]) -> set[fx.Node]:
    """The values that the results and the effects of the rewritten graph are computed from.

    Of what is written into memory made in the graph it is not said: that may go with its last reader.
    """
    instead = {m.target: m for m in matches if m.after is None}
    effects = schedule.effects
    seen: set[fx.Node] = set()
    work = [
        n
        for n in schedule.nodes
        if n.op == "output" or n in effects.impure or overlap(effects.writes.get(n, frozenset()), effects.outside)
    ]
    while work:
        at = work.pop()
        if at in seen:
            continue
        seen.add(at)
        m = instead.get(at)
        work += numbers_read(at) if m is None else [v.node for v in values_of(m.replacement)]
    return seen
