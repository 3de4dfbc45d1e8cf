"""Buffers are not guarded by Dynamo: what a rewrite assumed about a tensor is checked before each call."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .passes.facts import Assumption

log = logging.getLogger("lacompile")

Compiled = Callable[..., Any]


def guarded(
    compiled: Compiled,
    fallback: Callable[[], Compiled],
    assumptions: Sequence[tuple[int, Assumption]],
    example_inputs: Sequence[Any],
) -> Compiled:
    """``compiled`` while the assumptions hold, else the un-rewritten graph, compiled when first needed.

    Args:
        compiled: the rewritten graph.
        fallback: compiles the original one.
        assumptions: position among the inputs, and what was assumed of the tensor there.
        example_inputs: the tensors of which it is known already.
    """
    if not assumptions:
        return compiled
    checks = [_Check(i, a, example_inputs[i]) for i, a in assumptions]
    original: Compiled | None = None

    def call(*args: Any) -> Any:
        nonlocal original
        for check in checks:
            if not check(args):
                if original is None:
                    log.warning("%s no longer holds; running the original graph", check.assumption.text)
                    original = fallback()
                return original(*args)
        return compiled(*args)

    call._boxed_call = False  # type: ignore[attr-defined]
    return call


class _Check:
    """Identity and version first, which costs nothing; the values again only when one of them has changed."""

    def __init__(self, position: int, assumption: Assumption, tensor: torch.Tensor):
        self.position, self.assumption = position, assumption
        self.seen = _identity(tensor)
        self.held = True

    def __call__(self, args: Sequence[Any]) -> bool:
        tensor = args[self.position]
        now = _identity(tensor)
        if now is None or now != self.seen:
            self.held = self.assumption.holds(tensor.detach())
            self.seen = now
        return self.held


def _identity(tensor: torch.Tensor) -> tuple[int, int] | None:
    """Where the tensor lives and how often it was written; None where PyTorch does not count (inference tensors)."""
    return None if tensor.is_inference() else (tensor.data_ptr(), tensor._version)
