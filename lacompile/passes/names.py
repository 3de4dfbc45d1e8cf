"""How a graph input is called in the user's own code."""

from __future__ import annotations

import re

from torch import fx

_MEMBER = re.compile(r"\._(?:modules|buffers|parameters)\['([^']+)'\]|\['([^']+)'\]")


def source_name(node: fx.Node) -> str:
    """The expression Dynamo reached this input by, such as ``L['self']._buffers['slope']``; empty where unknown."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


def from_a_closure(node: fx.Node) -> bool:
    """Whether this input is read off a variable that the compiled function closes over, and is no argument of it."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    while (base := getattr(source, "base", None)) is not None:
        source = base
    return bool(getattr(source, "is_derefed_cell_contents", False)) and not getattr(source, "is_input", False)


def readable_name(node: fx.Node) -> str:
    """A short readable name: ``self.layers.0.slope`` for an input of the graph, else the node's own name."""
    name = source_name(node)
    if "___stack" in name:
        return "a value from before a graph break"
    if not re.match(r"^[LG]\[", name):
        return node.name
    short = _MEMBER.sub(lambda m: "." + (m[1] or m[2]), name[1:])
    return re.sub(r"\[(\d+)\]", r".\1", short).lstrip(".") or node.name
