"""A running sum that starts from a number, ``z = a z + k`` with ``z = 1``: after its first token ``a + k`` is data.

That it is a sum shows where another token comes: there the one that is looked at was a summand. Distributivity takes it
apart again, and what is no token, a number for each sum, is the start, a weight by itself.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from ..domain.exponent import Access
from ..domain.kinds import Number, Symbol
from ..domain.leaves import Leaves
from ..domain.space import Space
from ..domain.term import Term
from .weights import logarithm, size_as_weight

aten = torch.ops.aten


def opened(
    space: Space,
    leaves: Leaves,
    t: Term,
    tokens: Collection[int],
    numbers: Collection[tuple[tuple[int, ...], float]] = (),
) -> list[Term]:
    """``w (s + k)`` as ``w k`` and ``w s``, where the leaf of k is one of these and s has fewer dimensions.

    A number s is a weight, but where it stands before the same factors elsewhere: ``numbers``.
    """
    for a in t.accs:
        for start, token in _as_sum(leaves, a):
            if not isinstance(token, tuple) or token[0] not in tokens:
                continue
            rest = list(t.accs)
            rest.remove(a)
            added = t.but(accs=tuple(sorted((*rest, token))))
            if not isinstance(start, tuple):
                apart = t.but(coef=t.coef * start, accs=tuple(rest))
                return [added, apart if _factors(apart) in numbers else size_as_weight(apart)]
            if space.vars_of(start[1]) < space.vars_of(token[1]):
                return [added, t.but(accs=tuple(rest), exp=t.exp + logarithm(leaves, [start]))]
    return [t]


def opened_beside(space: Space, leaves: Leaves, pieces: Sequence[Sequence[Term]]) -> list[list[Term]]:
    """The terms of pieces side by side, a sum that one of them alone holds taken apart where others hold its token."""
    held = [{leaf for t in terms if t.bound(space) for leaf in t.signature} for terms in pieces]
    out = []
    for n, terms in enumerate(pieces):
        others = set[int]().union(*held[:n], *held[n + 1 :])
        numbers = {_factors(t) for m, beside in enumerate(pieces) if m != n for t in beside}
        found = ([t] if not _alone(t, others) else opened(space, leaves, t, others, numbers) for t in terms)
        out.append([x for opening in found for x in opening])
    return out


def _factors(t: Term) -> tuple[tuple[int, ...], float]:
    return t.signature, t.coef


def _alone(t: Term, others: Collection[int]) -> bool:
    return any(leaf not in others for leaf in t.signature)


def _as_sum(leaves: Leaves, access: Access) -> list[tuple[Access | float, Access | float]]:
    """Both orders of the two summands of a function symbol; none if it is no sum."""
    leaf, idx = access
    kind = leaves[leaf].kind
    if not isinstance(kind, Symbol) or kind.op is not aten.add.Tensor or kind.kwargs or len(kind.args) != 2:
        return []
    parts: list[Access | float] = []
    for arg in kind.given(idx):
        if isinstance(arg, tuple) and arg[1] is None:
            parts.append(arg[0])
        elif isinstance(arg, int | float):
            parts.append(float(arg))
        elif isinstance(arg, Number):
            parts.append(arg.value)
        else:
            return []
    return [(parts[0], parts[1]), (parts[1], parts[0])]
