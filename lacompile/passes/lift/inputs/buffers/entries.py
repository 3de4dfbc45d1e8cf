"""The slopes that explain every entry, given the distance at which it lies and what its format left of it."""

from __future__ import annotations

import math

import numpy as np
import torch

from .slopes import rounding


def intervals(
    flat: torch.Tensor, inside: torch.Tensor, coefs: tuple[int, ...], log_space: bool, error: float
) -> tuple[np.ndarray, np.ndarray] | None:
    """Per head the slopes that explain every entry; None if some head has none.

    Args:
        flat: the entries, heads first.
        inside: which of a head's entries are weights; the others are zero.
        coefs: the distance of an entry: a constant, and a coefficient for each position.
        log_space: whether the entries are logarithms.
        error: how far an exponent may be off, relative to itself and to 1.
    """
    grid = np.meshgrid(*(np.arange(n, dtype=np.float64) for n in flat.shape[1:]), indexing="ij")
    distance = sum((c * g for c, g in zip(coefs[1:], grid, strict=True)), np.full(grid[0].shape, float(coefs[0])))
    out = []
    for head in flat:
        ends = _of_head(head.to(torch.float64).numpy(), distance, inside.numpy(), log_space, flat.dtype, error)
        if ends is None:
            return None
        out.append(ends)
    low, high = (np.array(x) for x in zip(*out, strict=True))
    return low, high


def _of_head(
    values: np.ndarray, distance: np.ndarray, inside: np.ndarray, log_space: bool, dtype: torch.dtype, error: float
) -> tuple[float, float] | None:
    nothing = -math.inf if log_space else 0.0
    if (values[~inside] != nothing).any():
        return None
    kept, at = values[inside], distance[inside]
    whole = not dtype.is_floating_point
    if whole and not kept.all():
        return None
    relative = rounding(dtype)
    if log_space:
        if np.isinf(kept).any():
            return None
        exponent, slack = -kept, np.abs(kept) * (relative + error)
        lost = np.zeros(kept.shape, dtype=bool)
    else:
        smallest, step = (0.0, 0.0) if whole else _smallest(dtype)
        lost = kept < smallest  # only that it is tiny is known
        exponent = -np.log(np.where(lost, 1.0, kept))
        slack = np.log1p(np.maximum(relative, step / 2 / np.where(lost, 1.0, kept))) + error * (1 + exponent)
    low, high = 0.0, math.inf
    if lost.any():
        if (at[lost] <= 0).any():
            return None
        low = float((-math.log(smallest) / at[lost]).max()) * (1 - 1e-3) if smallest else math.inf
    exponent, slack, at = exponent[~lost], slack[~lost], at[~lost]
    if (np.abs(exponent[at == 0]) > slack[at == 0]).any():
        return None
    ahead = at != 0
    if ahead.any():
        first, second = ((exponent + s * slack)[ahead] / at[ahead] for s in (-1, 1))
        low = max(low, float(np.minimum(first, second).max()))
        high = min(high, float(np.maximum(first, second).min()))
    return (low, high) if low <= high else None


def _smallest(dtype: torch.dtype) -> tuple[float, float]:
    """Below which number an entry may be anything, and the steps that subnormal numbers go in.

    An operation may flush subnormal numbers to zero: none of them makes a difference to a sum, but for those of fp16,
    which are as large as 6e-5. Those a wider format is rounded to.
    """
    normal, eps = float(torch.finfo(dtype).smallest_normal), float(torch.finfo(dtype).eps)
    return 4 * (normal * eps if dtype is torch.float16 else normal), normal * eps
