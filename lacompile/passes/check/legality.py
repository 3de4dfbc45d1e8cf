"""May this value be cut out of this graph here? Questions about the program around a match, not its mathematics."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from ..capture.effects import NOWHERE
from ..examples import is_floating
from ..facts import Match, Refusal, values_of
from ..graph.schedule import Schedule


def settled(schedule: Schedule, match: Match) -> Match | Refusal:
    """The match with the place at which its replacement can be computed, or why its target cannot be replaced.

    The replacement is computed right behind ``match.after or match.target`` from the values it names. So each of them
    must exist by then, and still be what it was when the target read it. Where one is written to in between, as a state
    that is updated in place, the replacement is computed as soon as all its values exist.
    """
    order, effects = schedule.order, schedule.effects
    at = order[match.after or match.target]
    read = {v.node for v in values_of(match.replacement)}
    for node in read:
        if order[node] > at:
            return _refusal(match, "defined-before", f"{node.name} is computed later")
    written = _written(schedule, read, at)
    if written is not None:
        ready = max(schedule.last_input, *(order[n] for n in read))
        if schedule.impure_between(ready, at) or _written(schedule, read, ready) is not None:
            writer, node = written
            return _refusal(match, "unchanged", f"{writer.name} writes into {node.name}, which the replacement reads")
        match = replace(match, place=schedule.nodes[ready])
    sharing = list(schedule.sharing(match.target))
    lives = effects.lives.get(match.target, NOWHERE)
    shown = sum(any(user.op == "output" for user in node.users) for node in sharing)
    # The replacement is a new tensor: what shared the old one's memory no longer sees writes into it.
    told_apart = shown > 1 or schedule.is_written(lives, at, len(schedule.nodes) - 1)
    for node in sharing:
        outside = node.op in ("placeholder", "get_attr")
        used_later = outside or (told_apart and any(order[user] > at for user in node.users))
        if node is not match.target and order[node] <= at and used_later and effects.alias(node, match.target):
            return _refusal(match, "unaliased", f"{node.name} shares its memory and is used later")
    modes = schedule.records_gradients
    for node in schedule.ancestors(match.target, read):
        if modes[node] or not modes[match.target] or not node.all_input_nodes or not is_floating(node):
            continue
        if schedule.gradients.reach(node):
            return _refusal(match, "one-grad-mode", f"{node.name} is computed without gradients inside the region")
    return match


def _written(schedule: Schedule, read: set[fx.Node], at: int) -> tuple[fx.Node, fx.Node] | None:
    """A node that writes into a value that is read, between the making of that value and ``at``; and that value."""
    for node in read:
        lives = schedule.effects.lives.get(node, NOWHERE)
        for writer in schedule.writers(lives, schedule.order[node], at):
            return writer, node
    return None


def _refusal(match: Match, obligation: str, found: str) -> Refusal:
    return Refusal("legality", obligation, match.target, "a region that can be cut out", found, progress=10)
