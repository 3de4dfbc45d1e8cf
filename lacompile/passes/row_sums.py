"""Row sums of a square that is computed anyway: to replace them by an operator of their own would only add work."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import fx

from .effects import overlap
from .facts import Call, Const, Expr, Match, Size, children, values_of
from .schedule import Schedule

ALIKE = {
    "ones_like", "zeros_like", "full_like", "empty_like", "rand_like", "randn_like", "new_ones", "new_zeros",
    "new_full", "new_empty", "new_tensor", "size",
}  # fmt: skip
"""Of what these are called on they read the shape and the format."""
OF_ANOTHER = {"to", "type_as", "expand_as", "view_as", "reshape_as"}
"""And these of what they are given beside that."""


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
        work += _read_by(at) if m is None else [v.node for v in values_of(m.replacement)]
    return seen


def _read_by(node: fx.Node) -> Iterator[fx.Node]:
    """The values whose numbers a node is computed from: none that lends its shape and format alone.

    What makes a tensor like another one is traced without it, and what is read by nothing else goes.
    """
    name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))
    pytorch = node.op == "call_method" or getattr(torch, name, None) is node.target
    at = None if not pytorch else 0 if name in ALIKE else 1 if name in OF_ANOTHER else None
    lends = node.args[at] if at is not None and len(node.args) > at else None
    for given in node.all_input_nodes:
        if given is not lends or list(node.args).count(given) > 1:
            yield given
