"""Operands of fp32 that hold numbers of bf16, as where a model in bf16 casts q, k and v up before its recurrence.

A product of such numbers needs fewer factors of 16 bits to be as exact. Nothing else follows from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType

import torch
from torch import fx

from ..examples import example_of
from ..graph.calls import CASTS

MOVES = (
    "permute", "transpose", "reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "contiguous",
    "select", "narrow", "getitem", "cat", "stack",
)  # fmt: skip


def narrow(operands: Mapping[str, fx.Node], may_look: Callable[[fx.Node], bool]) -> str:
    """The names of operands that hold numbers of bf16 in fp32.

    ``may_look``: whether what a node reads is what it was when the operand was made from it: nothing was written there.
    """

    def is_narrow(node: fx.Node) -> bool:
        read, name = node.all_input_nodes, getattr(node.target, "__name__", node.target)
        if not read or isinstance(node.target, FunctionType) or _dtype(node) != torch.float32:
            return False
        if name in CASTS and _dtype(read[0]) == torch.bfloat16:
            return True
        return (name in CASTS or name in MOVES) and may_look(node) and all(map(is_narrow, read))

    return "".join(name for name, node in operands.items() if is_narrow(node))


def _dtype(node: fx.Node) -> torch.dtype | None:
    """That of a tensor; None of several, which the operator and its like return."""
    example = example_of(node)
    return example.dtype if isinstance(example, torch.Tensor) else None
