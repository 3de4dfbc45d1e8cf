"""A running sum of one tensor's tokens, ``z = s * z + k_t``: its terms with s as a weight, so that they merge.

Sums of plain data are not looked into elsewhere. Here both sides hold one tensor, at different places of a dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .affine import Aff
from .leaves import Leaves
from .term import Access, Exponent, Mono, Term
from .weights import logarithm, number_as_weight

LONGER_THAN = 2  # a dimension of two is no sequence: the sum of both of its places is data like any other

AsAccess = Callable[[Term], Access | None]
"""A plain term as one access of one leaf, a function symbol where it takes arithmetic."""


def running_terms(leaves: Leaves, as_access: AsAccess, before: Sequence[Term], new: Term) -> list[Term] | None:
    """The terms of ``before + new``, where those of ``before`` are weights times what ``new`` is, at other places."""
    now = as_access(Term(accs=new.accs, exp=new.exp))
    if now is None:
        return None
    out = []
    for t in before:
        found = _at_another_place(leaves, as_access, t, new, now)
        if found is None:
            return None
        out.append(found)
    return [number_as_weight(t) for t in (*out, new.but(accs=(now,), exp=Exponent()))]


def _at_another_place(leaves: Leaves, as_access: AsAccess, t: Term, new: Term, now: Access) -> Term | None:
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
    return t.but(accs=(then,), exp=exp + logarithm(leaves, accs))


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
