"""Operations on values that every transfer rule is built from, in layers that each know only those below.

program      sizes as affine forms, tensors as leaves
structure    what kind of value this is
cases        index maps, merged sums, regions
tables       known numbers
symbols      pointwise functions of plain data
arithmetic   products and sums
"""

from __future__ import annotations

from .arithmetic import Arithmetic
from .limits import FEW_CASES, MAX_TERMS, GiveUp, Unmerged, bounded
from .structure import SMALLEST


class Engine(Arithmetic):
    """The algebra of one analysis: one instance per graph."""


__all__ = ["FEW_CASES", "MAX_TERMS", "SMALLEST", "Engine", "GiveUp", "Unmerged", "bounded"]
