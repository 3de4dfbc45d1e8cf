"""How a graph is read where there is more than one way to read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Equal = tuple[Any, Any]
"""A symbol of the traced program, and the symbol or the number that it may be taken for."""


@dataclass(frozen=True)
class Choices:
    """Every one of them is right; some show an attention that others hide. The defaults are tried first."""

    fit: int = 0
    """Which formula of a buffer, of those that rounding leaves possible."""
    turned_whole: bool = False
    """Whether data that is turned, its end to its beginning, is taken as the tensor that it is."""
    weighed_whole: bool = False
    """Whether features times known numbers are."""
    parts_whole: bool = False
    """Whether sums over a part of a dimension, as of a head's features, are."""
    equal: tuple[Equal, ...] = ()
    """Sizes of several inputs that are taken for one; that they are has to be guarded."""
