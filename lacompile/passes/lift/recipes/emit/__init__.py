"""From leaf accesses back to tensors: the recipe whose element at the role indices is the product of the accesses.

Roles are the index variables of a match (batch, head, position, feature). In layers that each know only those below:

emitter      products of accesses, with their digits laid out as the dimensions of an operand
reader       what one access reads, whatever kind of leaf it is of
series       values of a loop side by side, or computed at once
views        a tensor at affine indices, as a chain of views
digits       roles that a view of the program had split, as in k[h // 4]
numbers      numbers of the program and positions, which no value holds
lengths      sizes, as numbers or as recipes
pieces       recipes with one dimension for each digit
calls        views that cancel where they can
"""

from __future__ import annotations

from .calls import permuted
from .emitter import Emitter
from .lengths import size_of
from .pieces import CannotEmit, Piece

__all__ = ["CannotEmit", "Emitter", "Piece", "permuted", "size_of"]
