"""Which values of a graph autograd may know of, whatever mode they are computed in.

What is computed from numbers and buffers alone has no gradient to lose: inside ``torch.no_grad()`` it is the value that
it is outside. So for a value that is computed there from anything that requires a gradient, and for no other, the mode
is part of what it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..examples import example_of
from .effects import NOWHERE, Effects, Storages, overlap


class Gradients:
    """Told of the nodes of one graph in their order, each as soon as its effects are known.

    A value counts if it is, or is computed from, an input that requires a gradient or of which nobody knows whether it
    does; so does all that lives in memory into which something was written from such a value. A tensor that requires a
    gradient as Dynamo saw it counts, whatever it was computed from.
    """

    def __init__(self, effects: Effects):
        self._effects = effects
        self._reached: set[fx.Node] = set()
        self._memory: Storages = NOWHERE

    def input(self, node: fx.Node, real: Any) -> None:
        """An input or a constant of the graph, with the tensor at hand."""
        example = example_of(node)
        known = isinstance(real, torch.Tensor) or not isinstance(example, torch.Tensor)
        if not known or _requires(real) or _requires(example):
            self._reached.add(node)

    def note(self, node: fx.Node) -> None:
        given = node.all_input_nodes
        lives = self._effects.lives
        if (
            _requires(example_of(node))
            or any(n in self._reached for n in given)
            or any(overlap(lives.get(n, NOWHERE), self._memory) for n in given)
        ):
            self._reached.add(node)
            self._memory |= self._effects.writes.get(node, NOWHERE)

    def reach(self, node: fx.Node) -> bool:
        """Whether autograd may know of a value, or of what was written into its memory by now."""
        return node in self._reached or overlap(self._effects.lives.get(node, NOWHERE), self._memory)


def _requires(example: Any) -> bool:
    if isinstance(example, list | tuple):
        return any(map(_requires, example))
    return isinstance(example, torch.Tensor) and example.requires_grad
