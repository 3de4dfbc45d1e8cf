"""May this value be cut out of this graph here? Questions about the program around a match, not its mathematics."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from .capture.modes import grad_modes
from .effects import Effects
from .facts import Match, Refusal, values_of


def settled(gm: fx.GraphModule, match: Match, effects: Effects) -> Match | Refusal:
    """The match with the place at which its replacement can be computed, or why its target cannot be replaced.

    The replacement is computed right behind ``match.after or match.target`` from the values it names. So each of them
    must exist by then, and still be what it was when the target read it. Where one is written to in between, as a state
    that is updated in place, the replacement is computed as soon as all its values exist.
    """
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    at = order[match.after or match.target]
    read = {v.node for v in values_of(match.replacement)}
    for node in read:
        if order[node] > at:
            return _refusal(match, "defined-before", f"{node.name} is computed later")
    written = _written(order, read, at, effects)
    if written is not None:
        ready = max(read | {n for n in order if n.op == "placeholder"}, key=order.__getitem__)
        modes_change = any(order[ready] < order[n] <= at for n in effects.impure)
        if modes_change or _written(order, read, order[ready], effects) is not None:
            writer, node = written
            return _refusal(match, "unchanged", f"{writer.name} writes into {node.name}, which the replacement reads")
        match = replace(match, place=ready)
    for node in effects.lives:
        # The replacement is a new tensor: what shared the old one's memory no longer sees writes into it.
        used_later = node.op in ("placeholder", "get_attr") or any(order[user] > at for user in node.users)
        if node is not match.target and order[node] <= at and used_later and effects.alias(node, match.target):
            return _refusal(match, "unaliased", f"{node.name} shares its memory and is used later")
    modes = grad_modes(gm)
    for node in _between(match, read):
        if not modes[node] and modes[match.target] and node.all_input_nodes and _is_float(node):
            return _refusal(match, "one-grad-mode", f"{node.name} is computed without gradients inside the region")
    return match


def _written(
    order: dict[fx.Node, int], read: set[fx.Node], at: int, effects: Effects
) -> tuple[fx.Node, fx.Node] | None:
    """A node that writes into a value that is read, between the making of that value and ``at``; and that value."""
    for writer in effects.writes:
        for node in read:
            if order[node] < order[writer] <= at and effects.writes_into(writer, node):
                return writer, node
    return None


def _between(match: Match, read: set[fx.Node]) -> set[fx.Node]:
    """The nodes that compute the target from the values the replacement reads."""
    seen: set[fx.Node] = set()
    work = [match.target]
    while work:
        node = work.pop()
        if node not in seen and node not in read and node.op not in ("placeholder", "get_attr"):
            seen.add(node)
            work += node.all_input_nodes
    return seen


def _is_float(node: fx.Node) -> bool:
    example = node.meta.get("example_value")
    return isinstance(example, torch.Tensor) and example.is_floating_point()


def _refusal(match: Match, obligation: str, found: str) -> Refusal:
    return Refusal("legality", obligation, match.target, "a region that can be cut out", found, progress=10)
