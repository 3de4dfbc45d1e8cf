"""Operations on values that every transfer rule is built from, in layers that each know only those above.

limits          how much is looked into, and how a rule gives up
program         sizes as affine forms, tensors as leaves
structure       what kind of value this is
cases           index maps, merged sums, regions
tables          known numbers
symbols         pointwise functions of plain data
multiplication  products of values
addition        sums of values
"""

from __future__ import annotations

from .addition import Addition
from .limits import FEW_CASES, MAX_TERMS, GiveUp, Unmerged, bounded
from .structure import SMALLEST


class Engine(Addition):
    """The algebra of one analysis: one instance per graph."""


__all__ = ["FEW_CASES", "MAX_TERMS", "SMALLEST", "Engine", "GiveUp", "Unmerged", "bounded"]
