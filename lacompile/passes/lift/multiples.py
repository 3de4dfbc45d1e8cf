"""Several multiples of one sum taken together: ``s S + t S`` is ``(s + t) S``, whose factor may then be a decay.

An average that moves (``S + b (k v - S)``) holds its state twice, and so does a state that a condition keeps
(``m (a S + k v) + (1 - m) S``), which decays by ``where(m, a, 1)``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from .leaves import Argument, Leaves, Number, Symbol
from .space import Space
from .term import Access, Exponent, Term

aten = torch.ops.aten

Together = Callable[[list[Term]], Access | float]
"""The sum of scalar factors as one access, or as the number that it is."""


class Multiples(NamedTuple):
    """Two terms as multiples of what they share."""

    shared: Term
    first: Term
    second: Term


def gathered(
    space: Space, leaves: Leaves, together: Together, a: Sequence[Term], b: Sequence[Term]
) -> tuple[list[Term], list[Term]]:
    """The terms of both sides of a sum, each of ``b`` that is a multiple of what one of ``a`` is added to that one."""
    left, right = list(a), []
    for y in b:
        for n, x in enumerate(left):
            found = _multiples(space, x, y)
            if found is not None:
                left[n] = _times(found.shared, _sum_of(leaves, together, found.first, found.second))
                break
        else:
            right.append(y)
    return left, right


def _multiples(space: Space, x: Term, y: Term) -> Multiples | None:
    """What two terms share, where the rest of each is a number for every entry of a state, which has two features."""
    if x.guards != y.guards or x.poly != y.poly or math.isinf(x.coef) or math.isinf(y.coef):
        return None
    shared = Counter(x.accs) & Counter(y.accs)
    apart = [tuple((Counter(t.accs) - shared).elements()) for t in (x, y)]
    held = space.vars_of([i for _, idx in shared for i in idx])
    lin = [tuple(e for e in t.exp.lin if e not in u.exp.lin) for t, u in ((x, y), (y, x))]
    if x.exp.sums != y.exp.sums or not all(f.is_const for own in lin for _, f in own):
        return None
    monos = [a for own in lin for m, _ in own for a in m]
    factors = (*apart[0], *apart[1], *monos)
    loose = space.vars_of([i for _, idx in factors for i in idx])
    if not factors or any(v < 0 for v in loose) or not loose <= held or len(held - loose) < 2:
        return None
    common = Exponent(tuple(e for e in x.exp.lin if e in y.exp.lin), x.exp.sums)
    whole = Term(1.0, x.poly, tuple(sorted(shared.elements())), common, x.guards)
    first, second = (
        Term(t.coef, accs=own, exp=Exponent(rates)) for t, own, rates in zip((x, y), apart, lin, strict=True)
    )
    return Multiples(whole, first, second)


def _times(t: Term, factor: Access | float) -> Term:
    return t.but(coef=factor) if isinstance(factor, float) else t.but(accs=tuple(sorted((*t.accs, factor))))


def _sum_of(leaves: Leaves, together: Together, x: Term, y: Term) -> Access | float:
    """``x + y``; where a condition is a factor of the one, and its opposite of the other, the choice between them."""
    for a in x.accs:
        for b in y.accs:
            here, there = _condition(leaves, a), _condition(leaves, b)
            if here is None or there is None or here[0] != there[0] or here[1] == there[1]:
                continue
            yes, no = (_without(t, c) for t, c in ((x, a), (y, b)))
            parts = [together([t]) for t in ((yes, no) if here[1] else (no, yes))]
            if all(isinstance(p, float) for p in parts) and parts[0] == parts[1]:
                return parts[0]
            dtype = next((leaves[p[0]].dtype for p in parts if isinstance(p, tuple)), torch.float64)
            given = [Number(p, dtype, True) if isinstance(p, float) else (p, None) for p in parts]
            chosen = leaves.symbol(aten.where.self, [(here[0], None), *given], {}, dtype)
            if chosen is not None:
                return chosen
    return together([x, y])


def _without(t: Term, a: Access) -> Term:
    accs = list(t.accs)
    accs.remove(a)
    return t.but(accs=tuple(accs))


def _condition(leaves: Leaves, access: Access) -> tuple[Access, bool] | None:
    """The condition whose zeros and ones a factor is, and whether it is 1 where that holds."""
    leaf, idx = access
    kind = leaves[leaf].kind
    if not leaves.truth(leaf):
        return None
    if isinstance(kind, Symbol) and kind.op is aten.logical_not.default:
        inner, same = kind.args[0], False
    elif isinstance(kind, Symbol) and (less := leaves.less_than_one(kind)) is not None:
        inner, same = less, False
    elif isinstance(kind, Symbol) and kind.op is aten._to_copy.default:
        inner, same = kind.args[0], True
    else:
        return (access, True) if leaves[leaf].dtype is torch.bool else None
    if not isinstance(inner, Argument) or (found := _condition(leaves, (inner.leaf, idx))) is None:
        return None
    return found[0], found[1] is same
