"""Operators of PyTorch's dispatcher with little Python between a call and its implementation.

``torch.library.custom_op`` compares the storage of every result with that of every argument and makes a context for
each call. Beside a short kernel that counts (docs/kernel-notes/host.md), so this registers with what lies below.
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

RECORDED = "recorded"
"""The overload of an operator whose gradient is recorded by its caller: a call of it passes autograd by.

It is what compiled graphs hold, which are made below autograd. Through the other one each of their calls would enter
Python twice, once to find that there is nothing to record.
"""

Operator = torch._ops.OpOverload
Backward = Callable[..., tuple[Tensor | None, ...]]


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """``lacompile::name`` from a function that changes none of its arguments; its annotations are the schema."""

    def register(function: Callable[..., Any]) -> Operator:
        schema, implementation = torch.library.infer_schema(function, mutates_args=()), hidden_from_dynamo(function)
        for overload in (name, f"{name}.{RECORDED}"):
            LIBRARY.define(overload + schema, tags=TAGS)
            LIBRARY.impl(overload, implementation, "CompositeExplicitAutograd")
        LIBRARY.impl(f"{name}.{RECORDED}", torch.library.fallthrough_kernel, "Autograd")
        return getattr(torch.ops.lacompile, name).default

    return register


def recorded(op: Operator) -> Operator:
    """The same operator where its caller has recorded what gradients need."""
    return getattr(op.overloadpacket, RECORDED)


def fake(op: Operator) -> Callable[[Callable[..., Any]], None]:
    """What the results look like, for tensors without values."""

    def register(function: Callable[..., Any]) -> None:
        for overload in (op, recorded(op)):
            torch.library.register_fake(overload, function, lib=LIBRARY)

    return register


def _of_its_own(result: Tensor) -> Tensor:
    """A result that is no view: autograd lets nobody write into one of several views that a function returns."""
    return result.data if type(result) is Tensor and result._is_view() else result


def derivative(op: Operator, backward: Backward, *, setup_context: Callable[..., None]) -> None:
    """How gradients flow through an operator, as in ``torch.library.register_autograd``.

    Args:
        backward: ``(ctx, *gradients)`` to the gradients of all arguments.
        setup_context: ``(ctx, inputs, output)`` keeps in ``ctx`` what ``backward`` needs.
    """

    below = recorded(op)

    def compute(keys: Any, *args: Any) -> Any:
        with below_autograd():
            return below.redispatch(after_autograd(keys), *args)

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:  # type: ignore[override]
            *inputs, keys = args
            output = compute(keys, *inputs)
            setup_context(ctx, tuple(inputs), output)
            return tuple(map(_of_its_own, output))

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return *backward(ctx, *gradients), None

    def call(keys: Any, *args: Any) -> Any:
        return Recorded.apply(*args, keys) if want_gradient(args) else compute(keys, *args)

    LIBRARY.impl(op, call, "Autograd", with_keyset=True)
