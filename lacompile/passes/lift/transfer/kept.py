"""Tokens of one tensor side by side, of which each has decayed on its own: what a step keeps of those before it."""

from __future__ import annotations

from collections.abc import Sequence

from ..domain.affine import MAX_DIMS, Aff
from ..domain.term import Term, Val
from ..engine import Engine, GiveUp
from ..normal.weights import logarithm, size_as_weight


def decayed(engine: Engine, shape: tuple[Aff, ...], pieces: Sequence[Sequence[Term]]) -> Val | None:
    """The pieces as one tensor times a weight that moves along it; None if they are something else.

    In ``cat([a * K, k_t])`` the number, or the factor, is the weight of what was there. That a factor is positive is an
    obligation of the match, as where it is one of a state.
    """
    tokens = [_token(engine, t) for terms in pieces for t in terms]
    if not tokens or any(len(terms) != 1 for terms in pieces):
        return None
    if len({(t.signature, t.coef) for t in tokens if t is not None}) != 1 or None in tokens:
        return None
    weighed = [t for t in tokens if t is not None]
    try:
        found = engine.sum_of(shape, weighed)
    except GiveUp:
        return None
    if found.one is None:
        return None
    by_accident = len(weighed) == 2 and not any(map(_moves, weighed))
    return None if by_accident and not _in_part(engine, shape, found.one) else found


def _token(engine: Engine, t: Term) -> Term | None:
    """One access that holds every dimension of a piece, what it is multiplied by in the exponent."""
    places = engine.leaves.tensors(t.accs)
    if t.bound(engine.space) or not t.poly.is_const or len(places) != len(t.accs):
        return None
    held = {a: _dims(engine, a[1]) for a in places}
    whole = frozenset[int]().union(*held.values())
    tokens = [a for a in places if held[a] == whole]
    if len(tokens) != 1:
        return None
    scalars = [a for a in places if a is not tokens[0]]
    return size_as_weight(t.but(accs=(tokens[0],), exp=t.exp + logarithm(engine.leaves, scalars)))


def _dims(engine: Engine, idx: Sequence[Aff]) -> frozenset[int]:
    return frozenset(v for v in engine.space.vars_of(idx) if 0 <= v < MAX_DIMS)


def _in_part(engine: Engine, shape: tuple[Aff, ...], t: Term) -> bool:
    """Whether it is a part of a longer tensor: heads side by side are all there are."""
    ((leaf, idx),) = t.accs
    ends = zip(idx, engine.leaf_shapes[leaf], strict=True)
    return any(shape[v] != n for i, n in ends for v in _dims(engine, [i]))


def _moves(t: Term) -> bool:
    """Whether it has decayed before."""
    return bool(t.exp.sums) or any(not f.is_const for _, f in t.exp.lin)
