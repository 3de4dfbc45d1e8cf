"""Sizes of several inputs that are one number in the call at hand.

Dynamo may give each input of a function a symbol of its own for the length that all of them have, or a number to one of
them and symbols to the others, where the program loops over that one. Nothing says that they are the same, until a
guard does.

So it is with a length of which Dynamo knows how many chunks there are, as of a loop over ``n // 8``: what is behind the
last chunk need not be empty.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import fx

from ...._compat import hint, must_stay_symbolic
from ..domain.choices import Equal
from .statics import belongs_to_module

Places = dict[Any, set[tuple[fx.Node, int]]]
"""A symbol, and the inputs and dimensions that have it as their size."""


def alike(
    placeholders: Sequence[fx.Node], example_inputs: Sequence[Any], confined: Collection[Any] = ()
) -> tuple[Equal, ...]:
    """The sizes of arguments that could be one: those in the same dimension first, and never two of one tensor.

    What could be one with a ``confined`` symbol, and that itself, could be the number that it is in this call.
    """
    env: Any = None
    by_number: dict[int, Places] = {}
    fixed: dict[int, set[int]] = {}  # a number, and the dimensions that have it
    for node, real in zip(placeholders, example_inputs, strict=False):
        for d, size in enumerate(argument_sizes(node, real)):
            if isinstance(size, int) or size.node.expr.is_Integer:
                fixed.setdefault(int(size), set()).add(d)
            elif size.node.expr.is_Symbol and (number := hint(size)) > 1:
                env = size.node.shape_env
                by_number.setdefault(number, {}).setdefault(size.node.expr, set()).add((node, d))
    return tuple(
        e for n, places in sorted(by_number.items()) for e in _equal(n, places, fixed.get(n, set()), confined, env)
    )


def argument_sizes(node: fx.Node, real: Any) -> Sequence[Any]:
    """The sizes of an argument; a parameter's or a buffer's are its own, and none of these."""
    example = node.meta.get("example_value")
    if not isinstance(example, torch.Tensor) or isinstance(real, torch.nn.Parameter):
        return ()
    return () if isinstance(real, torch.Tensor) and belongs_to_module(node, real) else tuple(example.shape)


def _equal(number: int, places: Places, fixed: set[int], confined: Collection[Any], env: Any) -> Iterator[Equal]:
    """What the symbols that are this number may be taken for, given the dimensions of which it is known."""
    groups = [([symbol], places[symbol]) for symbol in sorted(places, key=str)]
    for same_dimension in (True, False):
        groups = _joined(groups, same_dimension)
    for symbols, at in groups:
        is_number = not fixed.isdisjoint(d for _, d in at) or any(s in confined for s in symbols)
        if is_number and not any(must_stay_symbolic(env, s) for s in symbols):
            yield from ((s, number) for s in symbols)
        else:
            yield from ((s, symbols[0]) for s in symbols[1:])


Group = tuple[list[Any], set[tuple[fx.Node, int]]]


def _joined(groups: list[Group], same_dimension: bool) -> list[Group]:
    """Groups of symbols, those joined that are of different tensors, and of one dimension if that is asked."""
    for a, b in combinations(groups, 2):
        apart = {node for node, _ in a[1]}.isdisjoint(node for node, _ in b[1])
        alike = not {d for _, d in a[1]}.isdisjoint(d for _, d in b[1])
        if apart and (alike or not same_dimension):
            rest = [g for g in groups if g is not a and g is not b]
            return _joined([(a[0] + b[0], a[1] | b[1]), *rest], same_dimension)
    return groups
