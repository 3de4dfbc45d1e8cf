"""R4: bound indices counted from one place and named in one order, so that equal sums are equal terms.

Two equal sums get equal names often enough; where they do not, a merge is missed.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

from ..domain.affine import FIRST_DIV, Aff
from ..domain.exponent import Access
from ..domain.space import Space
from ..domain.term import Term

DENSE = 12  # free dimensions whose coefficients are compared one by one


def counted_from_origins(space: Space, term: Term) -> Term:
    """R4: the first access that holds a bound index alone (with coefficient 1 or -1) becomes that index."""
    if not term.bound(space):
        return term
    done: set[int] = set()
    for access in _ordered(term.accs):
        for aff in access[1]:
            term = _origin(space, term, aff, done)
    for mono, f in term.exp.lin:
        for aff in (*[i for _, idx in mono for i in idx], f):
            term = _origin(space, term, aff, done)
    for (mono, pos), _ in term.exp.sums:
        for aff in (*[i for _, idx in mono for i in idx], pos):
            term = _origin(space, term, aff, done)
    return term


def _origin(space: Space, term: Term, aff: Aff, done: set[int]) -> Term:
    bound = [(v, c) for v, c in aff.terms if v < 0]
    if len(bound) != 1 or abs(bound[0][1]) != 1:
        return term
    v, c = bound[0]
    if v in done or any(w >= FIRST_DIV and v in space.vars(Aff.var(w)) for w, _ in aff.terms):
        return term
    done.add(v)
    rest = aff.without(v)
    if c == 1 and not rest.terms and not rest.const:
        return term
    return term.sub(space, {v: (Aff.var(v) - rest) * int(c)})


def canonical_names(space: Space, term: Term) -> Term:
    """Bound indices named -1, -2, ... by first occurrence, accesses sorted: equality becomes a comparison."""
    bound = term.bound(space)
    if bound:
        term = _renamed(space, term, bound)
    accs = tuple(sorted(term.accs))
    return term if accs == term.accs else term.but(accs=accs)


def _renamed(space: Space, term: Term, bound: frozenset[int]) -> Term:
    order: list[int] = []

    def visit(aff: Aff) -> None:
        for v, _ in sorted(aff.terms, key=lambda t: (abs(t[1]), -t[0])):
            inner = space.vars(Aff.var(v)) if v >= FIRST_DIV else (v,)
            order.extend(w for w in inner if w < 0 and w not in order)

    for _, idx in _ordered(term.accs):
        for aff in idx:
            visit(aff)
    for aff in (*term.exp.affs(), term.poly):
        visit(aff)
    if len(order) < len(bound):
        for g in sorted(term.guards, key=lambda g: (len(g.terms), tuple(abs(c) for _, c in g.terms), abs(g.const))):
            visit(g)
    names = {v: Aff.var(-(n + 1)) for n, v in enumerate(order)}
    return term if all(names[v] == Aff.var(v) for v in order) else term.sub(space, names)


def _sort_key(access: Access) -> tuple:
    """An order of accesses that does not change when a bound index is counted from elsewhere.

    Between accesses of one leaf at the same bound index the offsets decide, compared coefficient by coefficient.
    """

    def key(aff: Aff) -> tuple:
        bound = tuple(sorted(abs(c) for v, c in aff.terms if v < 0))
        free = tuple((v, c) for v, c in aff.terms if v >= 0)
        return (bound, () if bound else free, 0 if bound else aff.const)

    def offset(aff: Aff) -> tuple:
        if all(v >= 0 for v, _ in aff.terms):
            return ()
        rest = tuple((v, c) for v, c in aff.terms if v >= DENSE)
        return (*(aff.coef(d) for d in range(DENSE)), rest, aff.const)

    return (access[0], tuple(key(a) for a in access[1]), tuple(offset(a) for a in access[1]))


def _ordered(accs: Sequence[Access]) -> Sequence[Access]:
    """Sorted by :func:`_sort_key`, of which the leaf comes first."""
    leaves = [leaf for leaf, _ in accs]
    return sorted(accs, key=itemgetter(0) if len(set(leaves)) == len(leaves) else _sort_key)
