"""The logarithm of a factor, taken apart as far as its function symbols go: a decay is one however it was raised.

A factor that is nothing at some tokens, as where a new sequence begins, is one that a condition chose: a truth, whose
logarithm is 0 or minus infinity and needs no gradient.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from ..domain.exponent import Access
from ..domain.kinds import Argument, Number, Symbol, Table
from ..domain.leaves import Leaves

aten = torch.ops.aten

Summand = tuple[float, Access | None]
"""A coefficient, and what it multiplies; None is 1."""


def log_summands(leaves: Leaves, access: Access) -> list[Summand]:
    """Summands whose sum is ``log`` of a leaf's entry, where the entry and every factor of it are positive.

    The symbols ``log(x)`` among them name the x that must be positive: the match proves that of each, or demands it.
    """
    leaf, idx = access
    kind = leaves[leaf].kind
    if isinstance(kind, Table) and leaves[leaf].interval[0] > 0:
        made = leaves.made(leaf)
        logs = leaves.table(np.log(kind.array), leaves[leaf].shape, np.log(made) if (made > 0).all() else None)
        return [(1.0, (logs, idx))]
    if isinstance(kind, Symbol) and (found := _of_symbol(leaves, kind, idx, leaves[leaf].dtype)) is not None:
        if kind.op is aten.where.self or known_positive(leaves, found) or leaves[leaf].interval[0] <= 0:
            return found  # else the whole is known to be positive, and its factors are not
    log = leaves.symbol(aten.log.default, [(access, None)], {}, leaves[leaf].dtype)
    assert log is not None
    return [(1.0, log)]


def known_positive(leaves: Leaves, summands: list[Summand]) -> bool:
    """Whether every logarithm among the summands is one of something that is positive by its interval, or a truth."""
    for _, access in summands:
        kind = leaves[access[0]].kind if access is not None else None
        if isinstance(kind, Symbol) and kind.op is aten.log.default:
            base = kind.args[0].leaf
            if leaves[base].interval[0] <= 0 and not leaves.truth(base):
                return False
    return True


def _of_symbol(leaves: Leaves, kind: Symbol, idx: tuple[Any, ...], dtype: torch.dtype) -> list[Summand] | None:
    """The logarithm of a function symbol; None where it is not taken apart."""
    if kind.kwargs:
        return None
    op, given = kind.op, kind.args[0]
    if op is aten.sigmoid.default and isinstance(given, Argument):  # exact where the sigmoid itself underflows
        made = leaves.symbol(aten.log_sigmoid.default, [((given.leaf, idx), given.dtype)], {}, dtype)
        return None if made is None else [(1.0, made)]
    if (less := leaves.less_than_one(kind)) is not None and (found := _of_complement(leaves, less, idx, dtype)):
        return found
    if op is aten.add.Tensor and (found := _of_tanh(leaves, kind, idx, dtype)) is not None:
        return found
    if any(isinstance(a, Argument) and a.dtype is not None for a in kind.args):
        return None
    args = [a[0] if isinstance(a, tuple) else a for a in kind.given(idx)]
    first = args[0]
    if op is aten.where.self:
        return _of_choice(leaves, *args, dtype=dtype)
    if op is aten.exp.default:
        return [(1.0, first)]
    if op is aten.mul.Tensor and isinstance(first, tuple):
        if isinstance(args[1], tuple):
            return [*log_summands(leaves, first), *log_summands(leaves, args[1])]
        if args[1] > 0:
            return [*log_summands(leaves, first), (math.log(args[1]), None)]
    if op is aten.reciprocal.default:
        return [(-c, x) for c, x in log_summands(leaves, first)]
    if op is aten.pow.Tensor_Scalar and isinstance(args[1], int | float):
        return [(c * args[1], x) for c, x in log_summands(leaves, first)]
    if op is aten.sqrt.default:
        return [(c / 2, x) for c, x in log_summands(leaves, first)]
    return None


def _of_complement(leaves: Leaves, x: Argument, idx: tuple[Any, ...], dtype: torch.dtype) -> list[Summand] | None:
    """``log(1 - sigmoid(y))`` is ``log_sigmoid(-y)``, finite also where the sigmoid has been rounded to 1."""
    kind = leaves[x.leaf].kind
    if not isinstance(kind, Symbol) or kind.op is not aten.sigmoid.default or kind.args[0].dtype or x.dtype:
        return None
    against = leaves.symbol(aten.mul.Tensor, [((kind.args[0].leaf, idx), None), -1.0], {}, leaves[x.leaf].dtype)
    made = None if against is None else leaves.symbol(aten.log_sigmoid.default, [(against, None)], {}, dtype)
    return None if made is None else [(1.0, made)]


def _of_tanh(leaves: Leaves, kind: Symbol, idx: tuple[Any, ...], dtype: torch.dtype) -> list[Summand] | None:
    """``log(c + c tanh(y))`` is ``log(2 c) + log_sigmoid(2 y)``, finite also where the tangent is rounded to -1."""
    given = [a for a in kind.args if isinstance(a, Argument)]
    numbers = [a for a in kind.args if isinstance(a, int | float)]
    if len(given) != 1 or len(numbers) != 1 or numbers[0] <= 0 or given[0].dtype is not None:
        return None
    of, times = leaves[given[0].leaf].kind, 1.0
    if isinstance(of, Symbol) and of.op is aten.mul.Tensor and not of.kwargs:
        factors = [a for a in of.args if isinstance(a, Argument)]
        times = next((a for a in of.args if isinstance(a, int | float)), 0.0)
        of = leaves[factors[0].leaf].kind if len(factors) == 1 and factors[0].dtype is None else of
    if not isinstance(of, Symbol) or of.op is not aten.tanh.default or abs(times) != numbers[0] or of.args[0].dtype:
        return None
    inner = leaves[of.args[0].leaf].dtype
    twice = leaves.symbol(aten.mul.Tensor, [((of.args[0].leaf, idx), None), math.copysign(2.0, times)], {}, inner)
    made = None if twice is None else leaves.symbol(aten.log_sigmoid.default, [(twice, None)], {}, dtype)
    return None if made is None else [(1.0, made), (math.log(2 * numbers[0]), None)]


def _of_choice(leaves: Leaves, cond: Any, yes: Any, no: Any, *, dtype: torch.dtype) -> list[Summand] | None:
    """``log(where(c, 0, y))``: the logarithm of ``not c``, and where that holds the logarithm of y."""
    nothing_if_true = isinstance(yes, Number) and yes.value == 0
    kept = no if nothing_if_true else yes
    if not isinstance(cond, tuple) or leaves[cond[0]].dtype is not torch.bool or not isinstance(kept, tuple):
        return None
    if not nothing_if_true and not (isinstance(no, Number) and no.value == 0):
        return None
    there = cond
    if nothing_if_true:
        found = leaves.symbol(aten.logical_not.default, [(cond, None)], {}, torch.bool)
        assert found is not None
        there = found
    out: list[Summand] = []
    zero = Number(0.0, dtype, True)
    for c, x in log_summands(leaves, kept):
        given = Number(1.0, dtype, True) if x is None else (x, None)
        chosen = leaves.symbol(aten.where.self, [(there, None), given, zero], {}, dtype)
        if chosen is None:
            return None
        out.append((c, chosen))
    log = leaves.symbol(aten.log.default, [(there, None)], {}, dtype)
    assert log is not None
    return [*out, (1.0, log)]
