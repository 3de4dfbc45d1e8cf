"""One token: ``o = q (exp(g) S + k^T v)``, the decode step, where no sum over earlier positions is left to see."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from ..domain.affine import ONE, Aff
from ..domain.exponent import Access, sub_access
from ..domain.kinds import Opaque
from ..domain.term import Term
from ..engine import Engine
from ..interpret import Known
from ..normal.weights import as_update
from .proof import D_ROLE, E_ROLE, N_ROLE, Proof


def prove_step(engine: Engine, known: Known, terms: Sequence[Term]) -> Proof | None:
    """The decode step that this value is; None if it is not one.

    Two terms over one feature index d: q k v, and q S with the weight of one token beside it.
    """
    if len(terms) != 2:
        return None
    terms = as_update(engine.space, engine.leaves, known.value.shape, terms)
    for new, old in (terms, tuple(reversed(terms))):
        found = _step(engine, known, new, old)
        if found is not None:
            return found
    return None


def _step(engine: Engine, known: Known, new: Term, old: Term) -> Proof | None:
    # What both are multiplied by is the scale: of the new token alone it would be a weight.
    scale, weight = new.exp.number, old.exp - new.exp
    if scale is None or weight.sums or new.coef != old.coef or abs(new.coef) != 1:
        return None
    if not new.poly.is_const or not old.poly.is_const or len(new.bound(engine.space)) != 1:
        return None
    moved = _aligned(engine, new, old)
    if moved is None:
        return None
    ((d,), (size,)), queries, states, (keys, values, outer) = moved
    shape = known.value.shape
    weights = [(mono, float(f.const)) for mono, f in weight.lin if f.is_const]
    if len(weights) != len(weight.lin):
        return None
    free = [n for n in range(len(shape)) if shape[n] != ONE]
    held = {v for a in (*queries, *keys) for i in a[1] for v in engine.space.vars(i)}
    held |= {v for mono, _ in weights for _, idx in mono for i in idx for v in engine.space.vars(i)}
    value_only = [n for n in free if n not in held]
    if len(value_only) > 1 or (value_only and not all(_holds(engine, a, value_only[0]) for a in states)):
        return None
    if not value_only:
        return None
    e = value_only[0]
    batch_like = [n for n in range(len(shape)) if n != e]
    roles = {r: shape[n] for r, n in enumerate(batch_like)} | {N_ROLE: ONE, D_ROLE: size, E_ROLE: shape[e]}
    place = {**dict(enumerate(batch_like)), E_ROLE: e}
    rename = {n: Aff.var(r) for r, n in enumerate(batch_like) if shape[n] != ONE}
    rename |= {e: Aff.var(E_ROLE), d: Aff.var(D_ROLE)}

    def renamed(accs: Sequence[Access]) -> list[Access]:
        return [sub_access(engine.space, a, rename) for a in accs]

    times = new.coef * math.exp(scale)
    proof = Proof(known, roles, list(range(len(batch_like))), place, scale=times, shapes=engine.leaf_shapes)
    proof.q, proof.k, proof.v = renamed(queries), renamed(keys), renamed(values)
    proof.state, proof.outer = renamed(states), renamed(outer)
    proof.fixed = [(tuple(sorted(renamed(mono))), c) for mono, c in weights]
    return proof


Split = tuple[
    tuple[tuple[int], tuple[Aff]], list[Access], list[Access], tuple[list[Access], list[Access], list[Access]]
]


def _aligned(engine: Engine, new: Term, old: Term) -> Split | None:
    """What both terms share are queries and row factors; the rest is the state in one, keys and values in the other."""
    space = engine.space
    bound_new, bound_old = new.bound(space), old.bound(space)
    if len(bound_old) != 1:
        return None
    (d,), (d_old,) = bound_new, bound_old
    ends, ends_old = engine.bounds(d, new.guards).ends, engine.bounds(d_old, old.guards).ends
    if ends is None or ends_old is None or len(new.guards) != 2 or len(old.guards) != 2:
        return None
    size = ends[1] - ends[0] + 1
    if not space.is_size(size) or ends_old[1] - ends_old[0] + 1 != size:
        return None
    # Both count from the start of their window.
    new_accs = [sub_access(space, a, {d: Aff.var(d) + ends[0]}) for a in new.accs]
    old_accs = [sub_access(space, a, {d_old: Aff.var(d) + ends_old[0]}) for a in old.accs]
    mine, theirs = Counter(old_accs), Counter(new_accs)
    shared, states, rest = (list(c.elements()) for c in (mine & theirs, mine - theirs, theirs - mine))
    queries = [a for a in shared if _holds(engine, a, d)]
    outer = [a for a in shared if not _holds(engine, a, d)]
    keys = [a for a in rest if _holds(engine, a, d)]
    values = [a for a in rest if not _holds(engine, a, d)]
    if not queries or not keys or not values or len(states) != 1 or not _holds(engine, states[0], d):
        return None
    state = engine.leaves[states[0][0]]
    if state.parameter:  # a matrix of the model and a product of rank one that adapts it
        return None
    if isinstance(state.kind, Opaque) and state.kind.unmerged:
        return None  # one token in the middle of another recurrence, such as a delta rule, which stays as it is
    return ((d,), (size,)), queries, states, (keys, values, outer)


def _holds(engine: Engine, a: Access, v: int) -> bool:
    return any(v in engine.space.vars(i) for i in a[1])
