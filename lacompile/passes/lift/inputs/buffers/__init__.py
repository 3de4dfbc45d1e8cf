"""Precomputed decays: what the numbers of a buffer say, as a guarded exponential of its indices.

A mask or a decay factor that a module computed once is data to the graph. Its values are fitted, every entry, in fp64:

    value[h, r, c] = exp(-slope[h] * A(r, c))  on  low <= r - c <= high,  0 elsewhere        A integer-affine

or the logarithm of that. Rounding leaves not one slope per head that explains all entries but an interval: as wide as
the rounding of the entry (a checkpoint is often cast to bf16) and of the exponent it was computed from. Buffers of one
module were made from one slope, so their intervals must meet; the graph's own slope is used where it lies inside.

families     buffers of one slope
fits         one buffer, entry by entry
entries      the slopes that explain what a format left of an entry
mirrored     a buffer of all pairs, whichever position is the later
distances    a buffer of distances, before they are weights
slopes       intervals of slopes
written      the slope among the numbers that the program writes down
"""

from __future__ import annotations

from .distances import Distances, distances
from .families import SHORTEST_LINE, Family, block_decays, families, lines
from .fits import Fit, aligned, fit, head_index, selected
from .mirrored import mirrored, pairs_apart
from .slopes import EXPONENT_ERROR, EXPONENT_ERROR_FP64, rounding
from .written import written_slopes

__all__ = [
    "EXPONENT_ERROR",
    "EXPONENT_ERROR_FP64",
    "SHORTEST_LINE",
    "Distances",
    "Family",
    "Fit",
    "aligned",
    "block_decays",
    "distances",
    "families",
    "fit",
    "head_index",
    "lines",
    "mirrored",
    "pairs_apart",
    "rounding",
    "selected",
    "written_slopes",
]
