"""What the numbers of a tensor may be in its dtype: the normal form computes over the reals, the program does not.

Rounding of data is outside the promise of the normal form. This is not: a position that its format cannot hold, an
integer that wraps or was truncated, a sum of truths that is an "or". There the rule gives up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..domain.kinds import Table
from ..domain.precision import EXACT_UP_TO, WIDE, ends
from ..domain.term import Case, Term, Val
from ..engine import Engine, GiveUp


def representable(engine: Engine, v: Val, dtype: torch.dtype) -> Val:
    """``v`` itself, or the one tensor that it is where its sums and products may not be those of real numbers.

    Raises:
        GiveUp: a tensor of this dtype may not hold what ``v`` says.
    """
    if dtype.is_complex:
        raise GiveUp("complex numbers")
    if dtype is torch.bool:
        return _truths(engine, v)
    if not dtype.is_floating_point:
        return _integers(engine, v, dtype)
    _check_positions(engine, v, dtype, EXACT_UP_TO.get(dtype, 0))
    return v


def _check_positions(engine: Engine, v: Val, dtype: torch.dtype, limit: int) -> None:
    for c in v.cases:
        for t in c.terms:
            counts = all(float(t.coef * k).is_integer() for _, k in t.poly.terms)  # what is not, is rounded anyway
            if not t.poly.is_const and not t.accs and not t.exp and counts:
                reach = max(abs(x) for x in ends(engine, v, c, t))
                if reach > limit and not (math.isinf(reach) and dtype in WIDE):
                    raise GiveUp(f"positions computed in {dtype}, which cannot hold them exactly")


def _truths(engine: Engine, v: Val) -> Val:
    for c in v.cases:
        data = [t for t in c.terms if t.accs and not _is_table(engine, t)]
        if data and v.alt is not None:
            return _plain_of(engine, v, torch.bool)
        if not (_of_data(engine, c.terms) if data else len(c.terms) < 2 and _known_truth(engine, v, c)):
            raise GiveUp("arithmetic of truths")
    return v


def _of_data(engine: Engine, terms: Sequence[Term]) -> bool:
    """Whether a sum is a product of truths, or 1 less one."""
    whole = [t for t in terms if t.accs]
    rest = [t for t in terms if not t.accs]
    if not rest:
        return len(whole) == 1 and _all_hold(engine, whole[0])
    one = len(rest) == 1 and rest[0] == Term(1.0)
    return one and len(whole) == 1 and whole[0].coef == -1 and _all_hold(engine, whole[0].but(coef=1.0))


def _known_truth(engine: Engine, v: Val, c: Case) -> bool:
    return all({t.coef * x for x in ends(engine, v, c, t)} <= {0.0, 1.0} for t in c.terms)


def _all_hold(engine: Engine, t: Term) -> bool:
    """Whether a term is the product of truths."""
    plain = t.coef == 1 and t.poly.is_const and not t.exp and not t.guards
    return plain and all(engine.leaves[leaf].dtype == torch.bool for leaf, _ in t.accs)


def _integers(engine: Engine, v: Val, dtype: torch.dtype) -> Val:
    info = torch.iinfo(dtype)
    for c in v.cases:
        low = high = 0.0
        for t in c.terms:
            if t.exp or (t.accs and not _is_table(engine, t)):
                return _plain_of(engine, v, dtype)
            if not _whole(engine, t):
                raise GiveUp(f"a fraction in {dtype}")
            both = [t.coef * x for x in ends(engine, v, c, t)]
            low, high = low + min(both), high + max(both)
        unknown = math.isinf(low) or math.isinf(high)
        if unknown and dtype in (*WIDE, torch.int64):
            continue
        if unknown or low < info.min or high > info.max:
            raise GiveUp(f"integers that {dtype} may not hold")
    return v


def _plain_of(engine: Engine, v: Val, dtype: torch.dtype) -> Val:
    """Data in a format without fractions is taken as it is: one tensor of that dtype, and no sum or product."""
    whole = v if v.alt is None else engine.whole(v)
    t = whole.one
    if t is None or t.coef != 1 or not t.poly.is_const or t.exp or len(t.accs) != 1 or t.bound(engine.space):
        raise GiveUp(f"arithmetic of data in {dtype}")
    if engine.leaves[t.accs[0][0]].dtype != dtype:
        raise GiveUp(f"data of another format as {dtype}")
    return whole


def _is_table(engine: Engine, t: Term) -> bool:
    return all(isinstance(engine.leaves[leaf].kind, Table) for leaf, _ in t.accs)


def _whole(engine: Engine, t: Term) -> bool:
    numbers = [t.coef, t.poly.const, *(c for _, c in t.poly.terms)]
    if not all(float(x).is_integer() for x in numbers):
        return False
    kinds = [engine.leaves[leaf].kind for leaf, _ in t.accs]
    return all(isinstance(k, Table) and bool((k.array == k.array.round()).all()) for k in kinds)
