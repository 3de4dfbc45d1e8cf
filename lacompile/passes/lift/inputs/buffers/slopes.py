"""Slopes as the intervals that rounding leaves of them, one for each head."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

EXPONENT_ERROR = 2.0**-22  # of an exponent computed in fp32: its own rounding grows with its size
EXPONENT_ERROR_FP64 = 2.0**-51  # of one computed in fp64


@dataclass(frozen=True)
class Slopes:
    """For each head, the interval of slopes that explains what was seen."""

    low: np.ndarray
    high: np.ndarray

    def meet(self, other: Slopes) -> Slopes | None:
        """What explains both; None if some head has no such slope."""
        if self.low.shape != other.low.shape:
            return None
        both = Slopes(np.maximum(self.low, other.low), np.minimum(self.high, other.high))
        return both if (both.low <= both.high).all() else None

    def holds(self, values: np.ndarray) -> bool:
        return values.shape == self.low.shape and bool(((values >= self.low) & (values <= self.high)).all())

    @property
    def middle(self) -> np.ndarray:
        return (self.low + np.where(np.isinf(self.high), self.low, self.high)) / 2


def slope_of(tensor: torch.Tensor) -> Iterable[tuple[str, np.ndarray, Slopes]]:
    """The readings of a small vector as slopes: as it is, negated, or as decay factors, with the interval of each."""
    if not tensor.is_floating_point() or not 0 < tensor.numel() <= 4096:
        return
    x = tensor.detach().to("cpu", torch.float64).numpy().reshape([n for n in tensor.shape if n > 1])
    error = rounding(tensor.dtype) + EXPONENT_ERROR
    if (x > 0).all():
        yield "slope", x, Slopes(x * (1 - error), x * (1 + error))
    if (x < 0).all():
        yield "log decay", -x, Slopes(-x * (1 - error), -x * (1 + error))
    if ((x > 0) & (x < 1)).all():
        s = -np.log(x)
        yield "decay", s, Slopes(np.maximum(s - error, 0), s + error)


def rounding(dtype: torch.dtype) -> float:
    """How far a number of this format may be from what it was rounded from, relative to itself."""
    return float(torch.finfo(dtype).eps) / 2 if dtype.is_floating_point else 0.0
