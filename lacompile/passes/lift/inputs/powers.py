"""Powers that a program writes down: ``[c * g**i for i in range(n)]``, for every pair of positions or along one."""

from __future__ import annotations

import numpy as np

from ..domain.affine import Aff
from ..domain.exponent import Exponent
from ..domain.term import Term
from .buffers import EXPONENT_ERROR_FP64, SHORTEST_LINE


def powers(numbers: np.ndarray) -> Term | None:
    """The weight that numbers in fp64 are, if their logarithms are linear along each dimension to the last digits."""
    dims = [d for d, n in enumerate(numbers.shape) if n > 1]
    if not dims or any(numbers.shape[d] < SHORTEST_LINE for d in dims) or not (numbers > 0).all():
        return None
    logs = np.log(numbers)
    first = float(logs.flat[0])
    steps = {d: (float(logs.take(-1, d).flat[0]) - first) / (numbers.shape[d] - 1) for d in dims}
    at = np.ogrid[tuple(map(slice, numbers.shape))]
    line = sum((steps[d] * at[d] for d in dims), np.full(numbers.shape, first))
    apart, largest = np.abs(line - logs).max(), np.abs(logs).max()
    if not np.isfinite(largest) or apart > 4 * EXPONENT_ERROR_FP64 * (1 + largest) or not any(steps.values()):
        return None
    return Term(exp=Exponent.of([((), Aff.of(steps, first))], ()))
