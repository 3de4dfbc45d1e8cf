"""Views that split and join dimensions: mixed radix, of numbers and of symbolic sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..domain.affine import ONE, ZERO, Aff
from ..domain.kinds import Opaque
from ..domain.space import Space, box
from ..domain.term import Val, value
from ..engine import Engine, GiveUp
from . import Op, rule

aten = torch.ops.aten


@rule(aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias)
def view(op: Op) -> Val:
    if op.func is aten.view.dtype:
        raise GiveUp("the bits of a tensor in another format")
    v = op.args[0]
    mapping = view_map(op.engine, v.shape, op.shape)
    return _features_joined(op.engine, op.engine.index(v, mapping, op.shape))


def _features_joined(engine: Engine, v: Val) -> Val:
    """A value of the graph whose last two dimensions are one now, as a leaf that has them as one.

    Of ``stack([a, b], -1).flatten(-2)``, as of pairs of features that were turned, each feature is an index then, and
    no quotient and remainder, which no factor without the two dimensions has.
    """
    t = v.one
    if t is None or v.alt is not None or len(t.accs) != 1:
        return v
    leaf, idx = t.accs[0]
    kind = engine.leaves[leaf].kind
    if not isinstance(kind, Opaque) or kind.joined or kind.reading or not (kind.node or kind.series) or len(idx) < 3:
        return v
    outer, inner = engine.leaf_shapes[leaf][-2:]
    if not inner.is_const or inner == ONE or outer == ONE or not idx[-2].divides:
        return v
    x, size = idx[-2] * inner.const + idx[-1], outer * inner.const
    if len(x.terms) != 1 or x != Aff.var(x.terms[0][0]) or not 0 <= x.terms[0][0] < len(v.shape):
        return v
    if v.shape[x.terms[0][0]] != size:
        return v
    last = len(idx) - 1
    if kind.series is not None and kind.series.dim >= last - 1:
        return v
    access = engine.leaves.joined(leaf, last - 1, last), (*idx[:-2], x)
    return value(v.shape, [t.but(accs=(access,))], precision=v.precision)


def view_map(engine: Engine, old: tuple[Aff, ...], new: tuple[Aff, ...]) -> dict[int, Aff]:
    """Old index variables over the new ones: dimensions of equal products are paired, mixed radix inside a group."""
    if (old, new) not in engine.view_maps:
        engine.view_maps[old, new] = _view_map(engine, old, new)
    return engine.view_maps[old, new]


def _view_map(engine: Engine, old: Sequence[Aff], new: Sequence[Aff]) -> dict[int, Aff]:
    mapping: dict[int, Aff] = {}
    for group_old, group_new in _paired(engine, old, new):
        numbers = all(old[d].is_const for d in group_old[1:]) and all(new[d].is_const for d in group_new[1:])
        split = _split_by_numbers if numbers else _split_by_sizes
        for d, at in zip(group_old, split(engine, old, new, group_old, group_new), strict=True):
            if at != Aff.var(d):
                mapping[d] = at
    return mapping


def _split_by_numbers(
    engine: Engine, old: Sequence[Aff], new: Sequence[Aff], group_old: Sequence[int], group_new: Sequence[int]
) -> list[Aff]:
    ranges = box(new)
    linear, stride = ZERO, 1
    for n, d in enumerate(reversed(group_new)):
        linear = linear + Aff.var(d) * stride
        if n + 1 < len(group_new):
            stride *= engine.length(new[d])
    stride, out = 1, []
    for n, d in enumerate(reversed(group_old)):
        at = engine.space.floordiv(linear, stride, ranges)
        if n + 1 < len(group_old):
            size = engine.length(old[d])
            at = at - engine.space.floordiv(linear, stride * size, ranges) * size
            stride *= size
        out.append(at)
    return out[::-1]


def _split_by_sizes(
    engine: Engine, old: Sequence[Aff], new: Sequence[Aff], group_old: Sequence[int], group_new: Sequence[int]
) -> list[Aff]:
    space, ranges = engine.space, box(new)
    linear = Aff.var(group_new[0])
    for d in group_new[1:]:
        linear = space.join(linear, Aff.var(d), new[d])
    out = []
    for d in reversed(group_old[1:]):
        out.append(space.remainder(linear, old[d], ranges))
        linear = space.quotient(linear, old[d], ranges)
    return [linear, *reversed(out)]


def _paired(engine: Engine, old: Sequence[Aff], new: Sequence[Aff]) -> Iterator[tuple[list[int], list[int]]]:
    """Neighbouring dimensions of both shapes whose sizes have one product, as few at a time as possible."""
    space = engine.space
    left = [d for d in range(len(old)) if old[d] != ONE]
    right = [d for d in range(len(new)) if new[d] != ONE]
    while left and right:
        group_old, group_new = [left.pop(0)], [right.pop(0)]
        size_old, size_new = old[group_old[0]], new[group_new[0]]
        while size_old != size_new:
            if _shorter(space, size_old, size_new):
                if not left:
                    raise GiveUp("a view whose sizes do not pair")
                group_old.append(left.pop(0))
                size_old = space.times(size_old, old[group_old[-1]])
            elif _shorter(space, size_new, size_old):
                if not right:
                    raise GiveUp("a view whose sizes do not pair")
                group_new.append(right.pop(0))
                size_new = space.times(size_new, new[group_new[-1]])
            else:
                raise GiveUp("a view of symbolic sizes that do not pair")
        yield group_old, group_new


def _shorter(space: Space, a: Aff, b: Aff) -> bool:
    """Whether a group of size ``a`` needs another dimension to become one of size ``b``."""
    return space.divided(b, a) is not None or space.lower(b - a - 1, {}) >= 0
