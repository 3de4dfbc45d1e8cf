"""Operators of PyTorch's dispatcher with little Python between a call and its implementation.

``torch.library.custom_op`` compares the storage of every result with that of every argument and makes a context for
each call. Beside a short kernel that counts (docs/kernel-notes.md, section 8), so this registers with what lies below.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._compat import after_autograd, below_autograd, hidden_from_dynamo, want_gradient

LIBRARY = torch.library.Library("lacompile", "FRAGMENT")
# Any strides will do, so that Inductor need not rebuild the gaps of a slice: the order of dimensions is enough.
TAGS = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)

Operator = torch._ops.OpOverload
Backward = Callable[..., tuple[Tensor | None, ...]]


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """``lacompile::name`` from a function that changes none of its arguments; its annotations are the schema."""

    def register(function: Callable[..., Any]) -> Operator:
        LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()), tags=TAGS)
        LIBRARY.impl(name, hidden_from_dynamo(function), "CompositeExplicitAutograd")
        return getattr(torch.ops.lacompile, name).default

    return register


def fake(op: Operator) -> Callable[[Callable[..., Any]], None]:
    """What the results look like, for tensors without values."""

    def register(function: Callable[..., Any]) -> None:
        torch.library.register_fake(op, function, lib=LIBRARY)

    return register


def derivative(op: Operator, backward: Backward, *, setup_context: Callable[..., None]) -> None:
    """How gradients flow through an operator, as in ``torch.library.register_autograd``.

    Args:
        backward: ``(ctx, *gradients)`` to the gradients of all arguments.
        setup_context: ``(ctx, inputs, output)`` keeps in ``ctx`` what ``backward`` needs.
    """

    def compute(keys: Any, *args: Any) -> Any:
        with below_autograd():
            return op.redispatch(after_autograd(keys), *args)

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:  # type: ignore[override]
            *inputs, keys = args
            output = compute(keys, *inputs)
            setup_context(ctx, tuple(inputs), output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return *backward(ctx, *gradients), None

    def call(keys: Any, *args: Any) -> Any:
        return Recorded.apply(*args, keys) if want_gradient(args) else compute(keys, *args)

    LIBRARY.impl(op, call, "Autograd", with_keyset=True)
