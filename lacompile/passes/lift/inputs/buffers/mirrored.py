"""Buffers of the distances of all pairs of positions, whichever is the later: a function of |i - j|, made causal later.

Such a buffer has no entry of nothing: on either side of its diagonal it is what a decay is on one. It equals what lies
opposite the diagonal, entry by entry, and the lower half is fitted as a causal mask is; so every entry is looked at.
What the program then leaves of the upper half is decided where it masks it.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch

from ...domain.affine import Aff
from .families import SHORTEST_LINE
from .fits import MAX_ENTRIES, Fit, fit


def mirrored(tensor: torch.Tensor) -> Fit | None:
    """The decay from the diagonal on that explains every entry of both halves, or None."""
    if not _pairs(tensor) or not tensor.is_floating_point():
        return None
    low, high = (float(x) for x in torch.aminmax(tensor))
    nothing = -math.inf if high == 0 and low < 0 else 0.0 if low >= 0 and high == 1 else None
    if nothing is None or not torch.equal(tensor, tensor.mT):
        return None
    n = tensor.shape[-1]
    above = torch.ones(n, n, dtype=torch.bool, device=tensor.device).triu(1)
    found = fit(tensor.masked_fill(above, nothing), square=True)
    rows, columns = Aff.var(tensor.dim() - 2), Aff.var(tensor.dim() - 1)
    if found is None or found.constant or found.guards != (rows - columns,) or found.numbers is not None:
        return None
    return replace(found, mirrored=True)


def pairs_apart(numbers: np.ndarray) -> int | None:
    """``a`` of numbers that are a |i - j| for all pairs of positions, a whole number and not 0; else None."""
    n = numbers.shape[-1] if numbers.ndim else 0
    if n < SHORTEST_LINE or numbers.shape != (*(1,) * (numbers.ndim - 2), n, n):
        return None
    plane = numbers.reshape(n, n)
    step = plane[1, 0]
    if not step or not float(step).is_integer():
        return None
    at = np.arange(n, dtype=np.float64)
    return int(step) if np.array_equal(plane, step * np.abs(at[:, None] - at)) else None


def _pairs(tensor: torch.Tensor) -> bool:
    """Whether the last two dimensions are positions, and enough of them to tell."""
    if tensor.dim() < 2 or not tensor.numel() <= MAX_ENTRIES or tensor.requires_grad:
        return False
    return tensor.shape[-1] == tensor.shape[-2] >= SHORTEST_LINE
