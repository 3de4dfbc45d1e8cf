"""Distances of all pairs of positions, infinite where the one is no earlier one: what a mask is before its decay."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ....._compat import outside_modes
from ...domain.affine import Aff
from ...domain.precision import EXACT_UP_TO
from ...domain.term import Case, Precision, Term, Val

MAX_DISTANCES = 2**24


@dataclass(frozen=True)
class Distances:
    """``sign * (row - column)`` where that is at least 0, and infinity elsewhere."""

    row: int
    column: int
    sign: int

    def value(self, shape: tuple[Aff, ...]) -> Val:
        """The numbers as a normal form of this shape."""
        ahead = (Aff.var(self.row) - Aff.var(self.column)) * self.sign
        inside = Case(frozenset({ahead}), (Term(1.0, ahead),))
        outside = Case(frozenset({-ahead - 1}), (Term(math.inf),))
        return Val(shape, (inside, outside), precision=Precision.EXACT)


def distances(tensor: torch.Tensor) -> Distances | None:
    """What a tensor of as many rows as columns says, if every entry is such a number."""
    dims = [d for d, n in enumerate(tensor.shape) if n > 1]
    if len(dims) != 2 or not tensor.is_floating_point() or tensor.numel() > MAX_DISTANCES:
        return None
    n = tensor.shape[dims[0]]
    if tensor.shape[dims[1]] != n or n > EXACT_UP_TO.get(tensor.dtype, 0):
        return None
    with outside_modes():
        square = tensor.detach().reshape(n, n)
        corners = float(square[0, -1]), float(square[-1, 0])  # most tensors are none, which these show
        if set(corners) != {math.inf, n - 1.0}:
            return None
        sign = 1 if corners[0] == math.inf else -1
        at = torch.arange(n, device=square.device, dtype=square.dtype)
        ahead = (at[:, None] - at) * sign
        if not torch.equal(square, ahead.masked_fill(ahead < 0, math.inf)):
            return None
    return Distances(dims[0], dims[1], sign)
