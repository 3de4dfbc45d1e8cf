"""R7, weights on demand: in ``s * S + k v`` the factor s is a weight, and moves to the exponent as its logarithm.

That s is positive is not asked here: the match proves it, or demands it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ..domain.affine import ONE, Aff
from ..domain.exponent import Access, Exponent
from ..domain.leaves import Leaves
from ..domain.space import Space
from ..domain.term import Term
from .logs import log_summands


def align_weights(
    space: Space, leaves: Leaves, shape: Sequence[Aff], a: Sequence[Term], b: Sequence[Term]
) -> tuple[list[Term], list[Term]]:
    """The terms of both sides of a sum, factors of one beyond those of the other moved to its exponent."""
    targets = sorted((t for t in (*a, *b) if t.is_product), key=lambda t: len(t.accs))

    def lift(terms: Sequence[Term], others: Sequence[Term]) -> list[Term]:
        weighed = ((t, _weigh(space, leaves, t, _of_its_sign(t, targets))) for t in terms)
        return [_weigh_state(space, leaves, shape, w, _of_its_sign(t, others)) for t, w in weighed]

    return lift(a, b), lift(b, a)


def _of_its_sign(t: Term, others: Sequence[Term]) -> list[Term]:
    """What is taken away from a sum is no token that it is added to; all tokens may be taken away from a state."""
    return [x for x in others if x.coef * t.coef > 0] or (list(others) if t.coef > 0 else [])


def as_update(space: Space, leaves: Leaves, shape: Sequence[Aff], terms: Sequence[Term]) -> list[Term]:
    """The two terms of ``s * S + k v``, or of its product with queries, with s as a weight, a number too."""
    if len(terms) != 2:
        return list(terms)
    left, right = align_weights(space, leaves, shape, terms[:1], terms[1:])
    return [number_as_weight(t) for t in (*left, *right)]


def number_as_weight(t: Term) -> Term:
    return size_as_weight(t) if t.accs else t


def size_as_weight(t: Term) -> Term:
    """A product, or the number that a sum starts from, with the size of its coefficient as a weight."""
    size = abs(t.coef)
    if size in (0, 1) or math.isinf(size):
        return t
    log = Exponent.of([((), Aff.lit(math.log(size)))], ())
    return t.but(coef=math.copysign(1.0, t.coef), exp=t.exp + log)


def _weigh_state(space: Space, leaves: Leaves, shape: Sequence[Aff], t: Term, others: Sequence[Term]) -> Term:
    """A state that came in: its factors without features are weights."""
    for other in others:
        if (scalars := scalar_factors(space, t, other)) and not (other.bound(space) and _is_part(leaves, shape, t)):
            kept = tuple(a for a in t.accs if a not in scalars)
            return t.but(accs=kept, exp=t.exp + logarithm(leaves, scalars))
    return t


def _is_part(leaves: Leaves, shape: Sequence[Aff], t: Term) -> bool:
    """Whether a factor is a part of a longer tensor, as the tokens of a chunk are that are added to what it read."""
    return any(
        len(i.terms) == 1 and 0 <= (d := i.terms[0][0]) < len(shape) and n != shape[d]
        for leaf, idx in t.accs
        for i, n in zip(idx, leaves[leaf].shape, strict=True)
    )


def _weigh(space: Space, leaves: Leaves, t: Term, targets: Sequence[Term]) -> Term:
    for target in targets:
        extra = list(t.signature)
        for leaf in target.signature:
            if leaf in extra:
                extra.remove(leaf)
            else:
                break
        else:
            if not extra or _newest(leaves, t, target, extra):
                return t
            accs = list(t.accs)
            moved: list[Access] = []
            ok = True
            for leaf in extra:
                acc = _least_of_token(leaves, accs, leaf)
                if any(v < 0 for i in acc[1] for v, _ in i.terms) or _masks_its_token(space, leaves, t, acc):
                    ok = False
                    break
                accs.remove(acc)
                moved.append(acc)
            if ok:
                return t.but(accs=tuple(accs), exp=t.exp + logarithm(leaves, moved))
    return t


def _least_of_token(leaves: Leaves, accs: Sequence[Access], leaf: int) -> Access:
    """The access of a leaf that is read where others are least, as the first half of gates is by a later token."""
    places = leaves.places(a for a in accs if a[0] != leaf)
    return min((a for a in accs if a[0] == leaf), key=lambda a: len(leaves.places([a]) & places))


def _masks_its_token(space: Space, leaves: Leaves, t: Term, mask: Access) -> bool:
    """Whether a factor is a truth about the token of this term: a mask of its key, and no decay of what came before."""
    if not leaves.truth(mask[0]):
        return False
    held = [(a, space.vars_of(a[1])) for a in t.accs]
    tokens = [a for a, mine in held if not any(mine < theirs for _, theirs in held)]  # a scalar is of any token
    return any(leaves.places([mask]) & leaves.places([a]) for a in tokens if a != mask)


def _newest(leaves: Leaves, t: Term, other: Term, extra: Sequence[int]) -> bool:
    """Whether ``t`` is one token, and the other term those before it: what ``t`` has beyond that is no decay.

    If that is read at the other's token, ``t`` has decayed by then: the loop goes backwards.
    """
    seen = [_nearest(a, other) for a in t.accs]
    pairs = [pair for (_, idx), at in zip(t.accs, seen, strict=True) for pair in zip(idx, at, strict=False)]
    places = [(x, y) for x, y in pairs if x != y]
    theirs = {y for _, y in places if y.is_const}
    held = [
        {i for i, n in zip(idx, leaves[leaf].shape, strict=True) if n != ONE} for leaf, idx in t.accs if leaf in extra
    ]
    if theirs and all(theirs & at for at in held):
        return False
    return bool(places) and all(_before(y, x, other) for x, y in places)


def _nearest(access: Access, other: Term) -> tuple[Aff, ...]:
    """Where the other term reads the same tensor: of several parts of it, as keys and values may be, the like one."""
    mine = access[1]
    theirs = [idx for leaf, idx in other.accs if leaf == access[0]]
    return min(theirs, key=lambda idx: sum(x != y for x, y in zip(mine, idx, strict=True)), default=())


def _before(y: Aff, x: Aff, term: Term) -> bool:
    """Whether the place ``y`` of this term is, wherever it counts, before the single place ``x``."""
    bound = [v for v, _ in y.terms if v < 0]
    if any(v < 0 for v, _ in x.terms) or len(bound) > 1 or any(y.coef(v) != 1 for v in bound):
        return False
    ends = [y.without(v) + g.without(v) for v in bound for g in term.guards if g.coef(v) == -1] if bound else [y]
    return any((room := x - 1 - end).is_const and room.const >= 0 for end in ends)


def scalar_factors(space: Space, state: Term, update: Term) -> list[Access]:
    """s of s * S, if S alone holds every feature of the outer product k v that is added to it.

    What k and v both hold is no feature: a state for all sequences may be weighed in each by a gate of its own.
    Both may be multiplied by the same queries, and the outer product be summed over positions, which all its
    factors hold. A sum that only some hold is a contraction with queries: what is added to that is a residual.
    """
    if len(state.accs) < 2 or len(update.accs) < 2:
        return []
    own = [a for a in state.accs if a not in update.accs]
    held = [space.vars_of(idx) for _, idx in own]
    seen = state.vars(space)
    new = [space.vars_of(idx) for _, idx in (a for a in update.accs if a not in state.accs)]
    outer = [frozenset(v for v in h if v >= 0 or v in seen) for h in new]
    whole = frozenset().union(*outer)
    if len({h - whole for h in new}) > 1:
        return []
    if len(outer) < 2 or whole in outer:
        return []
    shared = frozenset.intersection(*outer)
    states = [h for h in held if h >= whole - shared]
    if len(states) != 1 or any(not h <= states[0] | shared for h in held):
        return []
    scalars = [a for a, h in zip(own, held, strict=True) if h != states[0]]
    return [] if any(v < 0 for a in scalars for v in space.vars_of(a[1])) else scalars


def logarithm(leaves: Leaves, factors: Iterable[Access]) -> Exponent:
    """The exponent of a product of positive factors."""
    logs = (x for a in factors for x in log_summands(leaves, a))
    return Exponent.of(((() if access is None else (access,), Aff.lit(c)) for c, access in logs), ())
