"""Known numbers: functions of them are computed, and the result is a constant, an index or a table again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from ...._compat import outside_modes
from ..affine import Aff
from ..evaluate import Evaluator
from ..leaves import Table
from ..term import Access, Term, Val, constant, value
from .cases import Cases
from .limits import MAX_TABLE, GiveUp


class Tables(Cases):
    """Values made of indices and known numbers alone, as the numbers they are."""

    def folded(self, op: Any, vals: Sequence[Any], kwargs: dict[str, Any], shape: tuple[Aff, ...]) -> Val:
        """A function of known numbers: case by case where they are constants, else a table."""
        tensors = [v for v in vals if isinstance(v, Val)]

        def number(terms: tuple[Term, ...]) -> float | None:
            if not terms:
                return 0.0
            t = terms[0]
            return t.coef if len(terms) == 1 and not t.accs and not t.exp and t.poly.is_const and not t.guards else None

        def fold(groups: list[tuple[Term, ...]]) -> Iterable[Term]:
            numbers = iter([number(g) for g in groups])
            with outside_modes():
                args = [torch.tensor(next(numbers), dtype=torch.float64) if isinstance(v, Val) else v for v in vals]
                result = float(op(*args, **kwargs))
            if math.isnan(result):
                raise GiveUp("a mask that is not a number")
            return [Term(result)] if result else []

        if tensors and all(number(c.terms) is not None for v in tensors for c in v.cases):
            return self.zip_cases(tensors, fold)
        tables = [self._as_array(v, len(shape)) if isinstance(v, Val) else v for v in vals]
        with outside_modes():
            args = [torch.from_numpy(v) if isinstance(v, np.ndarray) else v for v in tables]
            result = op(*args, **kwargs).to(torch.float64).numpy()
        return self.table_value(result, shape)

    def _as_array(self, v: Val, rank: int) -> np.ndarray:
        """The numbers of a table value, with one dimension for each of the tensor's."""
        (leaf, idx) = self.tabulate(v)
        kind = self.leaves[leaf].kind
        assert isinstance(kind, Table)
        view = [1] * rank
        for axis, a in enumerate(idx):
            view[a.terms[0][0]] = kind.array.shape[axis]
        return kind.array.copy().reshape(view)

    def table_value(self, array: np.ndarray, shape: tuple[Aff, ...]) -> Val:
        """Known numbers as a value; only the dimensions that matter are kept, and a line 0, 1, 2 ... is an index.

        So is a plane of whole numbers, such as the distances of all pairs of positions.
        """
        if not array.size:
            raise GiveUp("an empty table")
        full = array.reshape((1,) * (len(shape) - array.ndim) + array.shape)
        dims = [d for d in range(full.ndim) if full.shape[d] > 1 and not (full == full.take([0], d)).all()]
        core = full[tuple(slice(None) if d in dims else 0 for d in range(full.ndim))]
        if not dims:
            return constant(shape, float(core))
        if (plane := _plane(core)) is not None:
            return value(shape, [Term(1.0, Aff.of(dict(zip(dims, plane[1:], strict=True)), plane[0]))])
        if core.size > MAX_TABLE or not np.isfinite(core).all():
            raise GiveUp("a large table of numbers")
        leaf = self.leaves.table(core, tuple(shape[d] for d in dims))
        return value(shape, [Term(accs=((leaf, tuple(Aff.var(d) for d in dims)),))])

    def tabulate(self, v: Val) -> Access:
        """A value computed from indices and known numbers alone, as a table of its numbers."""
        used: set[int] = set()
        for c in v.cases:
            for a in (*c.guards, *(a for t in c.terms for a in t.affs())):
                used |= {x for x in self.space.vars(a) if 0 <= x < 100}
        dims = sorted(used)
        lengths = [self.length(v.shape[d]) for d in dims]
        if math.prod(lengths) > MAX_TABLE:
            raise GiveUp("a large table of numbers")
        if any(math.isinf(t.coef) for c in v.cases for t in c.terms):
            raise GiveUp("an infinite value inside a pointwise function")

        def read(leaf: int, idx: tuple[int, ...]) -> float:
            kind = self.leaves[leaf].kind
            assert isinstance(kind, Table)
            return float(kind.array[idx])

        evaluator = Evaluator(self.space, read)
        out = np.empty(lengths)
        for at in np.ndindex(*lengths):
            full = [0] * len(v.shape)
            for d, x in zip(dims, at, strict=True):
                full[d] = x
            out[at] = evaluator.value(v, tuple(full))
        leaf = self.leaves.table(out, tuple(v.shape[d] for d in dims))
        return (leaf, tuple(Aff.var(d) for d in dims))


def _plane(array: np.ndarray) -> tuple[int, ...] | None:
    """The whole numbers c, a, b ... with which every entry is c + a x + b y ...; None if there are none."""
    if not np.isfinite(array).all():
        return None
    origin = array[(0,) * array.ndim]
    steps = [array.take(1, d)[(0,) * (array.ndim - 1)] - origin for d in range(array.ndim)]
    if not all(float(x).is_integer() for x in (origin, *steps)):
        return None
    at = np.ogrid[tuple(map(slice, array.shape))]
    if not (array == sum((a * x for a, x in zip(steps, at, strict=True)), origin)).all():
        return None
    return tuple(int(x) for x in (origin, *steps))
