"""Operands from a fixed seed. What a test draws beside them, it draws after them."""

from __future__ import annotations

import torch


def qkv(b: int, h: int, n: int, d: int, e: int | None = None) -> list[torch.Tensor]:
    """q, k and v of ``[b, h, n]`` tokens with ``d`` features; v may have ``e`` of its own."""
    torch.manual_seed(0)
    return [torch.randn(b, h, n, features, requires_grad=True) for features in (d, d, e or d)]


def slopes() -> torch.Tensor:
    """A slow, a middling and a fast head."""
    return torch.tensor([0.02, 0.1, 0.4], requires_grad=True)
