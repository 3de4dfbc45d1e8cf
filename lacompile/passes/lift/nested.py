"""Attentions of what other attentions have made: looked for with the latter as the tensors that they are.

``A' @ (A @ v)`` is a sum over two positions, of which no rule makes one sum. But the value that an attention is found
at is a value of the graph like any other, and any reading of such a value as a leaf of its own is right. So where a
value that was refused holds a sum over positions inside a sum over positions, the graph is read once more with the
targets that were found as leaves, and what is found in that joins what was found before, if it is of a length that was
found: no part of a loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import fx

from ..facts import Match, Refusal
from ..graph.schedule import Schedule
from .domain.term import Term, Val
from .interpret import Interpreter

DEEPEST = 8
"""Attentions inside of each other that are looked for."""

Look = Callable[[frozenset[fx.Node]], tuple[Interpreter, list[Match], list[Refusal]]]
"""Reads the graph again, with these values as leaves."""


def with_nested(
    schedule: Schedule, interpreter: Interpreter, found: tuple[list[Match], list[Refusal]], look: Look
) -> tuple[list[Match], list[Refusal]]:
    """What was found, and what is found behind that."""
    matches, refusals = found
    for _ in range(DEEPEST):
        targets = frozenset(m.target for m in matches)
        # what was written into is another value before the write than behind it
        cuts = frozenset(m.target for m in matches if m.after is None) - interpreter.cuts
        behind = [n for n in _nested(interpreter) if n not in targets and schedule.computed_from(n, cuts)]
        if not cuts or not behind:
            break
        interpreter, more, left = look(interpreter.cuts | cuts)
        lengths = {str(f.length) for m in matches for f in m.facts}
        new = [
            m
            for m in more
            if m.target not in targets
            and schedule.computed_from(m.target, cuts)
            and all(str(f.length) in lengths for f in m.facts)
        ]
        told = {r.node for r in refusals}
        matches = matches + new
        refusals = refusals + [r for r in left if r.node in behind and r.node not in told]
        if not new:
            break
    return matches, refusals


def _nested(interpreter: Interpreter) -> Iterable[fx.Node]:
    """Values that something opaque consumes and that are a sum over positions of sums over positions."""
    for node in interpreter.demanded:
        known = interpreter.known.get(node)
        if known is not None and _sums_twice(interpreter, known.value):
            yield node


def _sums_twice(interpreter: Interpreter, v: Val) -> bool:
    return any(len(_moving(interpreter, t)) > 1 for c in v.cases for t in c.terms)


def _moving(interpreter: Interpreter, t: Term) -> set[int]:
    """The indices that are summed over a range that another index ends."""
    guards = [interpreter.engine.space.vars(g) for g in t.guards]
    return {x for g in guards for x in g if x < 0 and len(g) > 1 and any(y >= 0 or y != x for y in g)}
