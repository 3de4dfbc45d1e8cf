"""Which arguments of a call lend their shape and format alone: its result holds none of their numbers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx
from torch.fx.node import map_arg

ALIKE = {
    "ones_like", "zeros_like", "full_like", "empty_like", "rand_like", "randn_like", "new_ones", "new_zeros",
    "new_full", "new_empty", "new_tensor", "size",
}  # fmt: skip
"""Of what these are called on they read the shape and the format."""
OF_ANOTHER = {"to", "type_as", "expand_as", "view_as", "reshape_as"}
"""And these of what they are given beside that."""


def numbers_read(node: fx.Node) -> Iterator[fx.Node]:
    """The values whose numbers a node is computed from: none that lends its shape and format alone.

    What makes a tensor like another one is traced without it, and what is read by nothing else goes.
    """
    name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))
    pytorch = node.op == "call_method" or getattr(torch, name, None) is node.target
    at = None if not pytorch else 0 if name in ALIKE else 1 if name in OF_ANOTHER else None
    lends = node.args[at] if at is not None and len(node.args) > at else None
    reads: list[fx.Node] = []
    map_arg((node.args, node.kwargs), reads.append)
    for given in node.all_input_nodes:
        if given is not lends or reads.count(given) > 1:
            yield given
