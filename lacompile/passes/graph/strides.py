"""How tensors lie in memory: whether two lie alike, and what of a program depends on it."""

from __future__ import annotations

import operator

import torch
from torch import fx

from ..._compat import always_equal
from ..capture.effects import NOWHERE, overlap
from .schedule import Schedule

MADE_ANEW = (torch.nn.functional.linear, torch.matmul, operator.matmul, torch.bmm)
"""Functions whose results have strides of their own, whatever those of their arguments are."""
BY_STRIDES = ("view", "view_as", "view_as_complex", "as_strided", "as_strided_", "unflatten")
"""Functions whose result, or whether they have one, depends on the strides of their argument."""


def known_by_strides(schedule: Schedule) -> set[fx.Node]:
    """The values of which the program can tell which strides they have.

    A result of the graph shows them, and random numbers that are drawn for it; a ``view`` needs them; a ``reshape``
    goes by them whether it copies, which a later write into its result reveals; what an operator outside PyTorch does
    with them is not known.
    """
    told: set[fx.Node] = set()
    for user in reversed(schedule.nodes):
        foreign = isinstance(user.target, torch._ops.OpOverload | torch._ops.HigherOrderOperator)
        draws = user in schedule.effects.impure  # random numbers are drawn in the order of memory
        shows = user.op == "output" or user in schedule.effects.writes or foreign or draws
        if (
            shows
            or getattr(user.target, "__name__", user.target) in BY_STRIDES
            or (user in told and user.target not in MADE_ANEW and not _contracts(user))
        ):
            told.update(user.all_input_nodes)
    return told


def _contracts(node: fx.Node) -> bool:
    """Whether it is an einsum of two tensors that sums over what both have: else that is a product entry by entry."""
    if node.target is not torch.einsum or len(node.args) != 3 or not isinstance(equation := node.args[0], str):
        return False
    operands, arrow, result = equation.replace(" ", "").partition("->")
    first = operands.split(",")[0]
    if not arrow or "." in equation or not isinstance(node.args[1], fx.Node):
        return False
    sizes = dict(zip(first, node.args[1].meta["example_value"].shape, strict=True))
    summed = (set(first) & set(operands.split(",")[1])) - set(result)
    return any(isinstance(sizes[letter], int) and sizes[letter] > 1 for letter in summed)


MAY_COPY = ("reshape", "reshape_as", "flatten", "ravel", "contiguous")
"""Functions that copy or not, by the strides of their argument."""


def decide_values(schedule: Schedule) -> set[fx.Node]:
    """The values whose strides decide results: by them what the program writes into was copied before, or not."""
    lives = schedule.effects.lives
    deciding: set[fx.Node] = set()
    for user in reversed(schedule.nodes):
        name = getattr(user.target, "__name__", user.target)
        shares = name in MAY_COPY or any(
            overlap(lives.get(user, NOWHERE), lives.get(n, NOWHERE)) for n in user.all_input_nodes
        )
        if user in schedule.effects.writes or name == "as_strided" or (user in deciding and shares):
            deciding.update(user.all_input_nodes)
    return deciding


def same_strides(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Whether two tensors of one shape lie alike in memory, at any length; dimensions of length 1 do not count."""
    return all(
        always_equal(n, 1) or always_equal(a, b) for n, a, b in zip(got.shape, got.stride(), want.stride(), strict=True)
    )
