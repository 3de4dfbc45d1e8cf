"""The value of the graph that holds a result, beside its normal form or in the place of it.

A recipe refers to values of the graph. So a leaf that is born inside a node becomes the node's own value, and what is
looked into keeps the node that it is the result of as another reading.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import fx

from ..domain.affine import ONE, Aff
from ..domain.exponent import Access
from ..domain.intervals import ANY
from ..domain.kinds import Opaque
from ..domain.space import own_index
from ..domain.term import Term, Val, value
from ..engine import Engine


def own_leaf(engine: Engine, node: fx.Node, val: Val, tensor: torch.Tensor) -> Val:
    """The node's result as a leaf."""
    return engine.leaf(tensor, Opaque(node, node.name, leaves_of([val]), numbers=engine.written(val)))


def rooted(engine: Engine, node: fx.Node, val: Val, tensor: torch.Tensor) -> Val:
    """A leaf born inside this node becomes the node's own value, so that a rewrite can refer to it."""
    for t, (leaf, idx) in _accesses(val):
        found = engine.leaves[leaf]
        kind = found.kind
        if not isinstance(kind, Opaque) or kind.node is not None or kind.series is not None:
            continue
        shape = engine.shape(tensor)
        if idx == own_index(engine.leaf_shapes[leaf]) and shape == engine.leaf_shapes[leaf]:
            kind.node = node
            return val
        fresh = engine.leaf(tensor, replace(kind, node=node), interval=found.interval, rests_on=found.rests_on)
        return replace(val, alt=fresh.one) if t is val.alt else fresh
    return val


def unsplit(engine: Engine, node: fx.Node, val: Val, given: Sequence[Val]) -> Val:
    """The node's leaf with chunks and their tokens in one dimension, as what it is computed from has them.

    Of ``linear(x.reshape(b, n, c, d))`` the parts that a loop reads are then parts of one sequence, as those of
    ``linear(x).reshape(b, n, c, d)`` are. Which dimensions are taken for these is a name, and nothing rests on it.
    """
    for t, (leaf, idx) in _accesses(val):
        shape = engine.leaf_shapes[leaf]
        kind = engine.leaves[leaf].kind
        if not isinstance(kind, Opaque) or kind.node is not node or kind.joined or idx != own_index(shape):
            continue
        split = next((s for v in given for s in _split(engine, v, shape)), None)
        if split is None:
            continue
        chunk, token = split
        at = list(idx)
        at[token] += at[chunk] * shape[token].const
        del at[chunk]
        term = t.but(accs=((engine.leaves.joined(leaf, *split), tuple(at)),))
        return replace(val, alt=term) if t is val.alt else value(val.shape, [term], precision=val.precision)
    return val


def _accesses(val: Val) -> Iterator[tuple[Term, Access]]:
    """Of the value as it is taken, and as it is looked into, those that are one access and nothing else."""
    for t in (val.alt, val.one):
        if t is not None and t.coef == 1 and len(t.accs) == 1 and not t.exp and not t.guards and t.poly.is_const:
            yield t, t.accs[0]


def _split(engine: Engine, v: Val, shape: Sequence[Aff]) -> Iterator[tuple[int, int]]:
    """The dimensions of chunks and of their tokens that ``v``, which is read along one, and ``shape`` have.

    Sequences in front of tokens, or heads in front of features, are split off alike.
    """
    t = v.one if v.alt is None else v.alt
    for leaf, idx in () if t is None else t.accs:
        for a, size in zip(idx[1:-1], engine.leaf_shapes[leaf][1:-1], strict=True):
            pair = sorted(a.terms, key=lambda term: -term[1])
            if len(pair) != 2 or a.const or pair[1][1] != 1 or any(not 0 <= x < len(shape) - 1 for x, _ in pair):
                continue
            (chunk, length), (token, _) = pair
            if shape[token] == Aff.lit(length) and len(v.shape) == len(shape) and size != ONE:
                if all(v.shape[x] == shape[x] for x in (chunk, token)):
                    yield chunk, token


def whole_if_inside(engine: Engine, node: fx.Node, val: Val, tensor: torch.Tensor, born: Iterable[int]) -> Val:
    """Plain data made of what no node holds, as a norm inside of ``F.normalize``, is the value of this node.

    ``born``: the leaves that are new with it.
    """
    leaves = engine.leaves
    inside = {n for n in born if isinstance(k := leaves[n].kind, Opaque) and not (k.node or k.reading or k.series)}
    if not inside:
        return val
    if val.alt is not None:
        made_inside = inside & leaves.data(leaf for leaf, _ in val.alt.accs)
        return replace(val, alt=own_leaf(engine, node, val, tensor).one) if made_inside else val
    if not engine.plain(val) or engine.contracts(val) or not inside & leaves.data(leaves_of([val])):
        return val
    return own_leaf(engine, node, val, tensor)


def readable(engine: Engine, node: fx.Node, val: Val, tensor: torch.Tensor, compute: torch.dtype) -> Val:
    """The value with the one of the graph beside it, as a leaf of which it is known what it is."""
    own = Opaque(node, node.name, numbers=engine.written(val))
    named = [engine.leaves[leaf].kind for leaf, _ in (() if val.alt is None else val.alt.accs)]
    for kind in (own, *named):
        if isinstance(kind, Opaque) and kind.node is node and val.single:
            kind.reading, kind.compute = val, compute
    sign = engine.sign(val.terms) if val.single else ANY
    return replace(val, own=engine.leaf(tensor, own, **engine.lies_in(sign, leaves_of([val]))).one)


def leaves_of(vals: Iterable[Val]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(leaf for v in vals for c in v.cases for t in c.terms for leaf in t.signature))
