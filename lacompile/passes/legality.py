"""May this value be cut out of this graph here? Questions about the program around a match, not about its mathematics."""

from __future__ import annotations

import torch
from torch import fx

from .capture import GRAD_MODE, writes_into
from .facts import Match, Refusal, values_of


def illegal(gm: fx.GraphModule, match: Match) -> Refusal | None:
    """Why the match's target cannot be replaced, or None.

    The replacement is computed right after ``match.after or match.target`` from the values it names. So each of them
    must exist by then, and still be what it was when the target read it.
    """
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    at = order[match.after or match.target]
    read = {v.node for v in values_of(match.replacement)}
    for node in read:
        if order[node] > at:
            return _refusal(match, "defined-before", f"{node.name} is computed later")
    for node in gm.graph.nodes:
        if node in read or order[node] > at:
            continue
        written = writes_into(node)
        if written is not None and _aliases(written, read):
            return _refusal(match, "unchanged", f"{node.name} writes into a tensor the replacement reads")
    first = min((order[n] for n in read), default=0)
    for node in gm.graph.nodes:
        if first < order[node] < at and node.op == "call_function" and node.target in GRAD_MODE:
            return _refusal(match, "one-grad-mode", f"{node.name} switches gradients inside the region")
    return None


def _aliases(written: fx.Node, read: set[fx.Node]) -> bool:
    """Whether a write into ``written`` may change one of the tensors ``read``: they share storage."""
    example = written.meta.get("example_value")
    if not isinstance(example, torch.Tensor):
        return True
    storage = example.untyped_storage()._cdata
    for node in read:
        other = node.meta.get("example_value")
        if isinstance(other, torch.Tensor) and other.untyped_storage()._cdata == storage:
            return True
    return False


def _refusal(match: Match, obligation: str, found: str) -> Refusal:
    return Refusal("legality", obligation, match.target, "a region that can be cut out", found, progress=10)
