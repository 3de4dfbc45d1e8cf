"""Functions of sums: where f(x_0), f(x_1), ... lie side by side they are one f(x), if the x_i are one x there.

A program that normalises inside its loop holds one tensor for each token or chunk, 1 / x_i, and no tensor of all of
them. What each x_i is, is known: ``Opaque.reading``. Those readings are joined as any other values are, and the result
is a leaf that no node holds; a match emits it as what it is, an attention of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any

import torch

from ..domain.affine import MAX_DIMS, ONE, Aff
from ..domain.exponent import Access, Exponent, Mono
from ..domain.kinds import Argument, Opaque, Symbol
from ..domain.leaves import Leaf
from ..domain.space import own_index
from ..domain.term import Guards, Term, Val, value
from ..engine import Engine, GiveUp
from ..normal.begun import opened_beside

MAX_PLACES = 8  # in one piece, where every pair must be shown to lie apart
HOLE = "hole"


def one_function(engine: Engine, shape: tuple[Aff, ...], pieces: Sequence[Sequence[Term]]) -> list[Term]:
    """The terms of pieces of a tensor of this shape, no two of which lie at one place; functions of one sum are one.

    The result has the same numbers. Where nothing is found the terms are as they were.
    """
    pieces = opened_beside(engine.space, engine.leaves, pieces)
    found: dict[Any, list[tuple[int, Term, Access]]] = {}
    for n, terms in enumerate(pieces):
        for t in terms:
            for a in t.accs if t.bound(engine.space) else ():  # plain data stays the tensor that it is
                if (pattern := _pattern(engine, a[0])) is not None and _of_row(engine, a):
                    found.setdefault(pattern, []).append((n, t, a))
    new: dict[tuple[int, Access], Access] = {}
    for places in found.values():
        if len({a[0] for _, _, a in places}) > 1 and (common := _common(engine, shape, places)) is not None:
            new |= {(n, a): b for (n, _, a) in places if (b := _with_sum(engine, a, common)) is not None}

    def renamed(n: int, t: Term) -> Term:
        accs = tuple([new.get((n, a), a) for a in t.accs])
        return t if accs == t.accs else t.but(accs=tuple(sorted(accs)))

    return [renamed(n, t) if new else t for n, terms in enumerate(pieces) for t in terms]


def _pattern(engine: Engine, leaf: int) -> Any:
    """What a function of a sum is but for the sum; None if the leaf is something else."""
    found, kind = engine.leaves[leaf], engine.leaves[leaf].kind
    if isinstance(kind, Opaque):
        return None if kind.reading is None else (HOLE, found.dtype)
    if not isinstance(kind, Symbol):
        return None
    args = [(_pattern(engine, a.leaf) or a.leaf, a.dtype) if isinstance(a, Argument) else a for a in kind.args]
    holes = [a for a in args if isinstance(a, tuple) and isinstance(a[0], tuple)]
    return (kind.op, tuple(args), kind.kwargs, found.dtype) if len(holes) == 1 else None


def _of_row(engine: Engine, a: Access) -> bool:
    return all(0 <= v < MAX_DIMS for i in a[1] for v in engine.space.vars(i))


def _sum_in(engine: Engine, a: Access) -> Iterator[tuple[Opaque, tuple[Aff, ...]]]:
    """The sum inside a function, and where it is read."""
    leaf, idx = a
    kind = engine.leaves[leaf].kind
    if isinstance(kind, Opaque) and kind.reading is not None:
        yield kind, idx
    if isinstance(kind, Symbol):
        for child in kind.given(idx):
            if isinstance(child, tuple):
                yield from _sum_in(engine, child[0])


def _common(engine: Engine, shape: tuple[Aff, ...], places: Sequence[tuple[int, Term, Access]]) -> Access | None:
    """One leaf that is the sum of every place there."""
    regions = _regions(engine, shape, places)
    if regions is None:
        return None
    try:
        sums = opened_beside(engine.space, engine.leaves, [list(_terms_in(engine, a, r)) for _, a, r in regions])
        joined = engine.sum_of(shape, (t for terms in sums for t in terms))
        inside = [_everywhere(engine, shape, t, [r for _, _, r in regions]) for t in joined.terms]
        if not inside or any(t is None for t in inside):
            return None
        joined = engine.sum_of(shape, [t for t in inside if t is not None])
    except GiveUp:
        return None
    if not engine.structured(joined):
        return None
    computes = [kind.compute for _, a, _ in regions for kind, _ in _sum_in(engine, a) if kind.compute is not None]
    return _leaf(engine, joined, _format(engine, regions[0][1]), reduce(torch.promote_types, computes))


def _terms_in(engine: Engine, a: Access, region: Guards) -> Iterator[Term]:
    """The sum inside a function, where the function is read."""
    for kind, idx in _sum_in(engine, a):
        assert kind.reading is not None
        for t in kind.reading.terms:
            moved = _with_features(engine, t).sub(engine.space, dict(enumerate(idx)))
            yield moved.but(guards=moved.guards | region)


def _with_features(engine: Engine, t: Term) -> Term:
    """exp of data along a feature, or of a token, as a factor: of one token it may be one, and of others a weight."""
    lin, accs = [], list(t.accs)
    tokens = engine.leaves.places(t.accs)
    exp = engine.telescoped(t.exp, ())  # a rate beside its prefix sums is that of a decay
    exp = engine.placed(exp, lambda mono: _holds_bound(engine, mono))
    for mono, f in exp.lin:
        found = None
        if f.is_const and (_holds_bound(engine, mono) or tokens & engine.leaves.places(mono)):
            found = engine.term_access(Term(exp=Exponent.of([(mono, f)], ())), None)
        if isinstance(found, tuple):
            accs.append(found[0])
        else:
            lin.append((mono, f))
    return t.but(accs=tuple(sorted(accs)), exp=Exponent.of(lin, exp.sums))


def _holds_bound(engine: Engine, mono: Mono) -> bool:
    return any(v < 0 for _, idx in mono for v in engine.space.vars_of(idx))


def _regions(
    engine: Engine, shape: tuple[Aff, ...], places: Sequence[tuple[int, Term, Access]]
) -> list[tuple[int, Access, Guards]] | None:
    """Where each function is read, no two at one place; None if that is not certain."""
    out: list[tuple[int, Access, Guards]] = []
    for n, t, a in places:
        region = frozenset(g for g in t.guards if all(v >= 0 for v in engine.space.vars(g)))
        if engine.prune(region, shape) is None or any((n, a) == (m, b) and r <= region for m, b, r in out):
            continue
        out = [(m, b, r) for m, b, r in out if not ((n, a) == (m, b) and region <= r)]
        mine = [r for m, _, r in out if m == n]
        if len(mine) >= MAX_PLACES or any(engine.prune(r | region, shape) is not None for r in mine):
            return None
        out.append((n, a, region))
    return out or None


def _everywhere(engine: Engine, shape: tuple[Aff, ...], t: Term, regions: Sequence[Guards]) -> Term | None:
    """The term without conditions on places that hold wherever the sum is read; None if it has others."""
    guards = frozenset(g for g in t.guards if all(v >= 0 for v in engine.space.vars(g)))
    for region in regions:
        ranges = engine.ranges(shape, region)
        if not all(engine.implied(g, region, ranges) for g in guards):
            return None
    return t.but(guards=t.guards - guards)


def _leaf(engine: Engine, joined: Val, dtype: torch.dtype, compute: torch.dtype) -> Access:
    """The leaf that is this value, with the dimensions that it has."""
    used = {v for t in joined.terms for v in t.vars(engine.space) if 0 <= v < MAX_DIMS}
    shape = tuple(n if d in used else ONE for d, n in enumerate(joined.shape))
    reading = value(shape, joined.terms)
    kind = Opaque(None, "a sum that the program holds piece by piece", reading=reading, compute=compute)
    leaf = engine.leaves.intern((reading, dtype, compute), Leaf(kind, shape, dtype))
    return leaf, own_index(shape)


def _format(engine: Engine, a: Access) -> torch.dtype:
    """The format of the sum inside a function."""
    kind = engine.leaves[a[0]].kind
    if not isinstance(kind, Symbol):
        return engine.leaves[a[0]].dtype
    return next(
        _format(engine, (x.leaf, ())) for x in kind.args if isinstance(x, Argument) and _pattern(engine, x.leaf)
    )


def _with_sum(engine: Engine, a: Access, new: Access) -> Access | None:
    """The function with another sum in it."""
    leaf, idx = a
    kind = engine.leaves[leaf].kind
    if isinstance(kind, Opaque):
        return new
    assert isinstance(kind, Symbol)
    args: list[Any] = []
    for child in kind.given(idx):
        if isinstance(child, tuple) and _pattern(engine, child[0][0]) is not None:
            inner = _with_sum(engine, child[0], new)
            if inner is None:
                return None
            child = (inner, child[1])
        args.append(child)
    return engine.leaves.symbol(kind.op, args, dict(kind.kwargs), engine.leaves[leaf].dtype)
