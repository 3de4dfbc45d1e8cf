"""Several multiples of one sum taken together: ``s S + t S`` is ``(s + t) S``, whose factor may then be a decay.

An average that moves (``S + b (k v - S)``) holds its state twice, and so does a state that a condition keeps
(``m (a S + k v) + (1 - m) S``), which decays by ``where(m, a, 1)``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ..domain.affine import ONE, TAU, Aff
from ..domain.exponent import Access, Exponent, sub_mono
from ..domain.kinds import Argument, Number, Symbol
from ..domain.leaves import Leaves
from ..domain.prefix import Lin, Sum, between, by_rate, single_place
from ..domain.space import Space
from ..domain.term import Term

aten = torch.ops.aten

Together = Callable[[list[Term]], Access | float]
"""The sum of scalar factors as one access, or as the number that it is."""


class Multiples(NamedTuple):
    """Two terms as multiples of what they share."""

    shared: Term
    first: Term
    second: Term


def gathered(
    space: Space, leaves: Leaves, together: Together, a: Sequence[Term], b: Sequence[Term]
) -> tuple[list[Term], list[Term]]:
    """The terms of both sides of a sum, each of ``b`` that is a multiple of what one of ``a`` is added to that one."""
    left, right = list(a), []
    for y in b:
        for n, x in enumerate(left):
            found = _multiples(space, x, y)
            if found is not None:
                left[n] = _sum_of(leaves, together, found)
                break
        else:
            right.append(y)
    return left, right


def _multiples(space: Space, x: Term, y: Term) -> Multiples | None:
    """What two terms share, where the rest of each is a number for every entry of a state, which has two features."""
    if x.guards != y.guards or x.poly != y.poly or math.isinf(x.coef) or math.isinf(y.coef):
        return None
    shared = Counter(x.accs) & Counter(y.accs)
    apart = [tuple((Counter(t.accs) - shared).elements()) for t in (x, y)]
    held = space.vars_of([i for _, idx in shared for i in idx])
    lin = [tuple(e for e in t.exp.lin if e not in u.exp.lin) for t, u in ((x, y), (y, x))]
    steps = _steps_apart(space, x.exp, y.exp)
    if steps is None or not all(f.is_const for own in lin for _, f in own):
        return None
    sums, *walked = steps
    lin = [(*own, *step) for own, step in zip(lin, walked, strict=True)]
    monos = [a for own in lin for m, _ in own for a in m]
    factors = (*apart[0], *apart[1], *monos)
    loose = space.vars_of([i for _, idx in factors for i in idx])
    if not factors or any(v < 0 for v in loose) or not loose <= held or len(held - loose) < 2:
        return None
    common = Exponent(tuple(e for e in x.exp.lin if e in y.exp.lin), sums)
    whole = Term(1.0, x.poly, tuple(sorted(shared.elements())), common, x.guards)
    first, second = (
        Term(t.coef, accs=own, exp=Exponent.of(rates, ())) for t, own, rates in zip((x, y), apart, lin, strict=True)
    )
    return Multiples(whole, first, second)


def _steps_apart(space: Space, x: Exponent, y: Exponent) -> tuple[tuple[Sum, ...], list[Lin], list[Lin]] | None:
    """The prefix sums that two exponents share, and the rates at single tokens by which each is more than that.

    Where one of two states has decayed once more, it has ``P(p + 1)`` where the other has ``P(p)``.
    """
    shared, own = list(x.sums), ([], [])
    for mono, ends in by_rate((x - y).sums).items():
        found = single_place(ends)
        if found is None:
            return None
        p, c = found
        of_x = any(end == (mono, p + 1) for end, _ in x.sums)
        rate = sub_mono(space, mono, {TAU: p})
        own[not of_x].append((rate, Aff.lit(c if of_x else -c)))
        if of_x:
            shared += between(mono, p, p + 1, -c)
    return Exponent.of((), shared).sums, *own


def _times(t: Term, factor: Access | float) -> Term:
    return t.but(coef=factor) if isinstance(factor, float) else t.but(accs=tuple(sorted((*t.accs, factor))))


def _sum_of(leaves: Leaves, together: Together, of: Multiples) -> Term:
    """The sum; where a condition is a factor of the one, and its opposite of the other, the choice between them."""
    x, y = of.first, of.second
    for a in x.accs:
        for b in y.accs:
            here, there = _condition(leaves, a), _condition(leaves, b)
            if here is None or there is None or here[0] != there[0] or here[1] == there[1]:
                continue
            one, other = (_without(t, c) for t, c in ((x, a), (y, b)))
            yes, no = (one, other) if here[1] else (other, one)
            logs = [_logarithm(t) for t in (yes, no)]
            if any(m for t in (yes, no) for m, _ in t.exp.lin) and all(t is not None for t in logs):
                chosen = _choice(leaves, here[0], *(together(t or [Term(0.0)]) for t in logs))
                if isinstance(chosen, tuple):
                    return of.shared.but(exp=of.shared.exp + Exponent.of([((chosen,), ONE)], ()))
            chosen = _choice(leaves, here[0], together([yes]), together([no]))
            if chosen is not None:
                return _times(of.shared, chosen)
    return _times(of.shared, together([x, y]))


def _choice(leaves: Leaves, condition: Access, yes: Access | float, no: Access | float) -> Access | float | None:
    """``where(condition, yes, no)``."""
    if isinstance(yes, float) and yes == no:
        return yes
    dtype = next((leaves[p[0]].dtype for p in (yes, no) if isinstance(p, tuple)), torch.float64)
    given = [Number(p, dtype, True) if isinstance(p, float) else (p, None) for p in (yes, no)]
    return leaves.symbol(aten.where.self, [(condition, None), *given], {}, dtype)


def _logarithm(t: Term) -> list[Term] | None:
    """The summands of the logarithm of an exponential times a number; None of anything else."""
    if t.accs or t.coef <= 0 or t.exp.sums:
        return None
    number = [Term(math.log(t.coef))] if t.coef != 1 else []
    return [*(Term(float(f.const), accs=mono) for mono, f in t.exp.lin), *number]


def mixture(leaves: Leaves, together: Together, x: Term, y: Term) -> Access | None:
    """``m x + (1 - m) c`` for a number c, also written ``c - m (c - x)`` where c is 1, as one function.

    Between two numbers it is as positive as they are: the decay where a mask leaves tokens out.
    """
    for mixed, rest in ((x, y), (y, x)):
        if mixed.exp or rest.exp or len(mixed.accs) != 2:
            continue
        for share, other in (mixed.accs, mixed.accs[::-1]):
            of = _one_less(leaves, other)
            if of is not None and not rest.accs and rest.coef == 1 == -mixed.coef and leaves.share(share[0]):
                return _between(leaves, 1.0, together([Term(accs=(of,))]), share)
            if rest.coef > 0 and len(rest.accs) == 1 and _opposite(leaves, share, rest.accs[0]):
                return _between(leaves, rest.coef, together([Term(mixed.coef, accs=(other,))]), share)
    return None


def _one_less(leaves: Leaves, access: Access) -> Access | None:
    """The x of 1 - x."""
    kind = leaves[access[0]].kind
    less = leaves.less_than_one(kind) if isinstance(kind, Symbol) else None
    return None if less is None or less.dtype is not None else (less.leaf, access[1])


def _opposite(leaves: Leaves, share: Access, rest: Access) -> bool:
    """Whether ``rest`` is ``1 - share``."""
    here, there = _condition(leaves, share), _condition(leaves, rest)
    if here is not None and there is not None:
        return here[0] == there[0] and here[1] is not there[1]
    return _one_less(leaves, rest) == share or _one_less(leaves, share) == rest


def _between(leaves: Leaves, start: float, end: Access | float, share: Access) -> Access | None:
    if not isinstance(end, tuple):
        return None
    dtype = leaves[end[0]].dtype
    given = [Number(start, dtype, True), (end, None), (share, dtype)]
    return leaves.symbol(aten.lerp.Tensor, given, {}, dtype)


def _without(t: Term, a: Access) -> Term:
    accs = list(t.accs)
    accs.remove(a)
    return t.but(accs=tuple(accs))


def _condition(leaves: Leaves, access: Access) -> tuple[Access, bool] | None:
    """The condition whose zeros and ones a factor is, and whether it is 1 where that holds."""
    leaf, idx = access
    kind = leaves[leaf].kind
    if not leaves.truth(leaf):
        return None
    if isinstance(kind, Symbol) and kind.op is aten.logical_not.default:
        inner, same = kind.args[0], False
    elif isinstance(kind, Symbol) and (less := leaves.less_than_one(kind)) is not None:
        inner, same = less, False
    elif isinstance(kind, Symbol) and kind.op is aten._to_copy.default:
        inner, same = kind.args[0], True
    else:
        return (access, True) if leaves[leaf].dtype is torch.bool else None
    if not isinstance(inner, Argument) or (found := _condition(leaves, (inner.leaf, idx))) is None:
        return None
    return found[0], found[1] is same
