"""Graph nodes that hold a function symbol as it is, so that a recipe refers to them instead of computing it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx

from ..domain.affine import MAX_DIMS, ONE, Aff
from ..domain.kinds import Symbol
from ..engine import Engine
from ..interpret import Interpreter, Known

Place = tuple[fx.Node, tuple[Aff, ...]]
"""A node, and the index of the leaf over the node's dimensions."""


@dataclass
class Holders:
    """By leaf the first node that holds it, a part if none holds all: of all, and of those that recorded gradients.

    For autograd a value computed without gradients is data: a target that records them must not read it in place of
    the function that it was computed by.
    """

    all: dict[int, Place] = field(default_factory=dict)
    with_gradients: dict[int, Place] = field(default_factory=dict)

    def readable(self, with_gradients: bool) -> Mapping[int, Place]:
        return self.with_gradients if with_gradients else self.all


def holders(interpreter: Interpreter) -> Holders:
    capture = interpreter.capture
    assert capture is not None
    found, parts = Holders(), Holders()
    for node, known in interpreter.known.items():
        held = _held(interpreter.engine, known)
        if held is None or known.after not in (None, node):  # what was written into it later is held by the writer
            continue
        leaf, idx = held
        of_leaf = parts if is_part(known.value.shape, idx, interpreter.engine.leaf_shapes[leaf]) else found
        of_leaf.all.setdefault(leaf, (node, idx))
        if capture.records_gradients_at(node):
            of_leaf.with_gradients.setdefault(leaf, (node, idx))
    return Holders(parts.all | found.all, parts.with_gradients | found.with_gradients)


def is_part(shape: tuple[Aff, ...], pattern: tuple[Aff, ...], sizes: tuple[Aff, ...]) -> bool:
    """Whether a value of this shape, which holds a leaf of these sizes, ends before it does along some dimension."""
    at = [(place_of(a), size) for a, size in zip(pattern, sizes, strict=True)]
    return any(d is not None and shape[d] != size for d, size in at)


def _held(engine: Engine, known: Known) -> tuple[int, tuple[Aff, ...]] | None:
    """The symbol that a value is, and its index; None if it is something else.

    Some entry of the index says where along each dimension of the value it is; the others follow from those.
    """
    t = known.value.one
    if t is None or t.coef != 1 or len(t.accs) != 1 or t.exp or t.guards or not t.poly.is_const:
        return None
    leaf, idx = t.accs[0]
    if not isinstance(engine.leaves[leaf].kind, Symbol):
        return None
    alone = {d for a in idx if (d := place_of(a)) is not None}
    held = {v for v in engine.space.vars_of(idx) if v < MAX_DIMS}
    whole = all(size == ONE for size, a in zip(engine.leaf_shapes[leaf], idx, strict=True) if a.is_const)
    return (leaf, idx) if whole and held <= alone else None


def place_of(a: Aff) -> int | None:
    """The dimension that an index is; None if it is more than that."""
    return (
        a.terms[0][0] if len(a.terms) == 1 and a.terms[0][1] == 1 and not a.const and a.terms[0][0] < MAX_DIMS else None
    )
