"""A running sum of one tensor's tokens, ``z = s * z + k_t``: its terms with s as a weight, so that they merge.

Sums of plain data are not looked into elsewhere. Here both sides hold one tensor, at different places of a dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..domain.affine import Aff
from ..domain.exponent import Access, Exponent, Mono
from ..domain.leaves import Leaves
from ..domain.space import Space
from ..domain.term import Term
from .begun import opened
from .weights import logarithm, number_as_weight, size_as_weight

LONGER_THAN = 2  # a dimension of two is no sequence: the sum of both of its places is data like any other

AsAccess = Callable[[Term], Access | None]
"""A plain term as one access of one leaf, a function symbol where it takes arithmetic."""


def running_terms(
    space: Space, leaves: Leaves, as_access: AsAccess, before: Sequence[Term], new: Term
) -> tuple[list[Term], list[Term]] | None:
    """The terms of ``before + new``, where those of ``before`` are weights times what ``new`` is, at other places.

    One of them may be a sum that came in, or the number that it started from, which is given back apart.
    """
    now = as_access(Term(accs=new.accs, exp=new.exp))
    if now is None:
        return None
    out, came_in = [], []
    for t in (x for whole in before for x in opened(space, leaves, whole, (now[0],))):
        if (found := _at_another_place(space, leaves, as_access, t, new, now)) is not None:
            out.append(found)
        elif (found := _came_in(space, leaves, t, now)) is not None:
            came_in.append(found)
        else:
            return None
    if len(came_in) > 1 or not (out or all(t.accs for t in came_in)):  # a number and one tensor are data
        return None
    summed = [number_as_weight(t) for t in (*out, new.but(accs=(now,), exp=Exponent()))]
    return summed, [size_as_weight(t) for t in came_in]


def _came_in(space: Space, leaves: Leaves, t: Term, now: Access) -> Term | None:
    """A state that holds what a token's key holds, or a number, times scalars; None if it is a token itself."""
    held = space.vars_of(now[1])
    whole = [a for a in t.accs if space.vars_of(a[1]) == held]
    scalars = [a for a in t.accs if a not in whole]
    if not whole and space.vars_of([i for _, idx in scalars for i in idx]) < held:
        return t.but(accs=(), exp=t.exp + logarithm(leaves, scalars))
    if len(whole) != 1 or len(held) < 2 or any(v < 0 for v in space.vars_of([i for _, idx in t.accs for i in idx])):
        return None
    if not leaves.places([now]) or leaves.places(whole) or whole[0][0] == now[0]:
        return None
    return t.but(accs=(whole[0],), exp=t.exp + logarithm(leaves, scalars))


def _at_another_place(
    space: Space, leaves: Leaves, as_access: AsAccess, t: Term, new: Term, now: Access
) -> Term | None:
    accs = list(t.accs)
    summed = [a for a in accs if a[0] == now[0]]
    exp = t.exp
    if len(summed) == 1:
        (then,) = summed
        accs.remove(then)
    else:
        alike = _alike(t, new)
        if alike is None:
            return None
        held, monos = alike
        made = as_access(Term(accs=held, exp=Exponent.of([(m, f) for m, f in exp.lin if m in monos], ())))
        if made is None or made[0] != now[0]:
            return None
        then, accs = made, [a for a in accs if a not in held]
        exp = Exponent.of([(m, f) for m, f in exp.lin if m not in monos], exp.sums)
    if not _moved(leaves, then, now) or any(v < 0 for _, idx in accs for i in idx for v, _ in i.terms):
        return None
    weights = [*accs, *(a for m, f in exp.lin if f.is_const for a in m)]
    if any(_of_all_tokens(space, leaves, a, now) for a in weights):
        return None
    return t.but(accs=(then,), exp=exp + logarithm(leaves, accs))


def _of_all_tokens(space: Space, leaves: Leaves, weight: Access, now: Access) -> bool:
    """Whether a factor is no weight of one token: a rate times a gate, beside which there is another rate."""
    return not leaves.places([weight]) and not space.vars_of(weight[1]) <= space.vars_of(now[1])


def _alike(t: Term, new: Term) -> tuple[tuple[Access, ...], set[Mono]] | None:
    """The factors of ``t`` that those of ``new`` are elsewhere: accesses, and monomials of the exponent."""
    accs = [a for a in t.accs if any(a[0] == b[0] for b in new.accs)]
    named = {tuple(leaf for leaf, _ in m): f for m, f in new.exp.lin}
    monos = [m for m, f in t.exp.lin if m and named.get(tuple(leaf for leaf, _ in m)) == f]
    if len(accs) != len(new.accs) or len(monos) != len(new.exp.lin) or new.exp.sums:
        return None
    return tuple(accs), set(monos)


def _moved(leaves: Leaves, then: Access, now: Access) -> bool:
    """Whether the two differ in a place alone: a number now, and a number or a summed index then."""
    differ = [(x, y, n) for x, y, n in zip(then[1], now[1], leaves[now[0]].shape, strict=True) if x != y]
    places = {(x, y) for x, y, _ in differ}
    return len(places) == 1 and all(_is_place(x, y, n) for x, y, n in differ)


def _is_place(then: Aff, now: Aff, size: Aff) -> bool:
    long = not size.is_const or size.const > LONGER_THAN
    return long and now.is_const and all(v < 0 for v, _ in then.terms)
