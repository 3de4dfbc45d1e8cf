"""Windows: what a loop computes for each token from the last few, by a weight of its own for each feature.

A convolution that is written step by step, as ``(window * w).sum(-1)``, is a sum that could be looked into. But its
weights are parameters, which are no decay, and of the first tokens it has fewer summands: so the results of all steps
are taken as they are, side by side like those of any other function of a token (see ``series.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..domain.affine import ONE, Aff
from ..domain.term import Term, Val
from ..engine import Engine


@dataclass(frozen=True)
class Window:
    """The tensor whose tokens are read, the dimension that they lie along, the last one of them, and the weight."""

    leaf: int
    dim: int
    last: int
    weight: int


def window(engine: Engine, val: Val, given: Iterable[Val]) -> Window | None:
    """What a value is computed from, if it is a window of tokens times a parameter; ``given`` are its arguments."""
    t = val.one
    if t is None or t.exp or not t.poly.is_const or len(t.accs) != 2:
        return None
    if any(v >= 0 for v in engine.space.vars_of(t.guards)):
        return None  # it has the tokens side by side itself
    (leaf, idx), (weight, by) = sorted(t.accs, key=lambda a: engine.leaves[a[0]].parameter)
    features = {v for v in engine.space.vars_of(idx) & engine.space.vars_of(by) if v >= 0}
    if engine.leaves[leaf].parameter or not engine.leaves[weight].parameter or not features:
        return None
    sizes = engine.leaf_shapes[leaf]
    alone = [n for n, a in enumerate(idx) if sizes[n] != ONE and not any(v >= 0 for v in engine.space.vars_of([a]))]
    if len(alone) != 1 or not sizes[alone[0]].is_const:
        return None
    last = _last(engine, t, alone[0], idx)
    if last is None or not 0 <= last < sizes[alone[0]].const or not any(_moves(g.one, leaf, alone[0]) for g in given):
        return None
    return Window(leaf, alone[0], last, weight)


def _last(engine: Engine, t: Term, dim: int, idx: Sequence[Aff]) -> int | None:
    """The last place that is read along a dimension."""
    a = idx[dim]
    if a.is_const:
        return int(a.const)
    if len(a.terms) != 1 or a.terms[0][1] != 1:
        return None
    ends = engine.bounds(a.terms[0][0], t.guards).ends
    if ends is None or not ends[0].is_const or not ends[1].is_const:
        return None
    return int(ends[1].const + a.const)


def _moves(t: Term | None, leaf: int, dim: int) -> bool:
    """Whether an argument holds several tokens side by side, or zeros and one token."""
    held = [idx[dim] for of, idx in (() if t is None else t.accs) if of == leaf]
    return t is not None and any(bool(t.guards) if a.is_const else any(v >= 0 for v, _ in a.terms) for a in held)
