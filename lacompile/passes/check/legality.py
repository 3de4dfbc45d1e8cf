"""May this value be cut out of this graph here? Questions about the program around a match, not its mathematics."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from ..._compat import changes_mode
from ..capture.effects import NOWHERE
from ..capture.modes import AUTOCAST
from ..examples import is_floating
from ..facts import Match, Progress, Refusal, values_of
from ..graph.schedule import Schedule


def settled(schedule: Schedule, match: Match) -> Match | Refusal:
    """The match with the place at which its replacement can be computed, or why its target cannot be replaced.

    The replacement is computed right behind ``match.after or match.target`` from the values it names. So each of them
    must exist by then, and still be what it was when the target read it. Where one is written to in between, as a state
    that is updated in place, the replacement is computed as soon as all its values exist and the target's mode is on.
    """
    order, effects = schedule.order, schedule.effects
    at = order[match.after or match.target]
    read = {v.node for v in values_of(match.replacement)}
    for node in read:
        if order[node] > at:
            return _refusal(match, "defined-before", f"{node.name} is computed later")
    written = _first_written(schedule, read, at)
    if written is not None:
        place = _place_before(schedule, read, written[0], at)
        if isinstance(place, str):
            writer, node = written
            found = f"{writer.name} writes into {node.name}, which the replacement reads{place}"
            return _refusal(match, "unchanged", found)
        match = replace(match, place=place)
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


def _first_written(schedule: Schedule, read: set[fx.Node], at: int) -> tuple[fx.Node, fx.Node] | None:
    """The first node that writes into a value that is read, between the making of that value and ``at``; that value."""
    order, lives = schedule.order, schedule.effects.lives
    found = [(writer, n) for n in read for writer in schedule.writers(lives.get(n, NOWHERE), order[n], at)]
    return min(found, key=lambda pair: (order[pair[0]], order[pair[1]]), default=None)


def _place_before(schedule: Schedule, read: set[fx.Node], writer: fx.Node, at: int) -> fx.Node | str:
    """The first node behind which all that is read exists, unwritten, in the mode of ``at``; or else what is missing.

    A program that switches a mode itself, as where all of its body runs without gradients, has its inputs in another
    mode than all that it computes of them: there the place is behind the switch.
    """
    ready = max(schedule.last_input, *(schedule.order[n] for n in read))
    first = schedule.order[writer]
    if first <= ready:
        return ""
    with_gradients = any(map(schedule.gradients.reach, read))
    for place in (schedule.nodes[ready], *schedule.impure_nodes(ready, first - 1)):
        if schedule.is_one_mode(schedule.order[place], at, with_gradients):
            return place
    behind = next(schedule.impure_nodes(first - 1, at))
    what = "switches the mode" if changes_mode(behind.target) or behind.target in AUTOCAST else "cannot be passed"
    return f", and {behind.name} {what} between the two"


def _refusal(match: Match, obligation: str, found: str) -> Refusal:
    return Refusal(
        "legality", obligation, match.target, "a region that can be cut out", found, progress=Progress.REGION
    )
