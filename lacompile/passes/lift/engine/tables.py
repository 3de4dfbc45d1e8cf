"""Known numbers: functions of them are computed, and the result is a constant, an index or a table again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from ...._compat import outside_modes
from ..domain.affine import MAX_DIMS, ONE, Aff
from ..domain.evaluate import Evaluator
from ..domain.exponent import Access
from ..domain.kinds import Table
from ..domain.term import Term, Val, constant, number_of, value
from .cases import Cases
from .limits import MAX_TABLE, GiveUp


class Tables(Cases):
    """Values made of indices and known numbers alone, as the numbers they are."""

    def folded(self, op: Any, vals: Sequence[Any], kwargs: dict[str, Any], shape: tuple[Aff, ...]) -> Val:
        """A function of known numbers: case by case where they are constants, else a table."""
        tensors = [v for v in vals if isinstance(v, Val)]

        def fold(groups: list[tuple[Term, ...]]) -> Iterable[Term]:
            numbers = iter([number_of(g) for g in groups])
            with outside_modes():
                args = [torch.tensor(next(numbers), dtype=torch.float64) if isinstance(v, Val) else v for v in vals]
                result = float(op(*args, **kwargs))
            if math.isnan(result):
                raise GiveUp("a mask that is not a number")
            return [Term(result)] if result else []

        if tensors and all(number_of(c.terms) is not None for v in tensors for c in v.cases):
            return self.zip_cases(tensors, fold)
        vals = [self.broadcast(v, shape) if isinstance(v, Val) else v for v in vals]

        def computed(numbers: Callable[[Val], np.ndarray]) -> np.ndarray:
            with outside_modes():
                args = [torch.tensor(numbers(v)) if isinstance(v, Val) else v for v in vals]
                return op(*args, **kwargs).to(torch.float64).numpy()

        return self.table_value(computed(self.array), shape, computed(self.made))

    def finite_numbers(self, v: Val) -> bool:
        """Whether a value is made of indices and known numbers alone, none of which is infinite."""
        return self.index_only(v) and not any(math.isinf(t.coef) for c in v.cases for t in c.terms)

    def array(self, v: Val) -> np.ndarray:
        """The numbers of a value made of them alone: a dimension for each of the tensor's, of 1 where none differ."""
        return self._laid_out(self.tabulate(v), v.shape)

    def array_of_table(self, v: Val) -> np.ndarray | None:
        """The same of a value that is a table, or a place of one, as it stands; None of any other."""
        access = self._table(v)
        return None if access is None else self._laid_out(access, v.shape)

    def made(self, v: Val) -> np.ndarray:
        """The same as the program computes with them, where that is known of a table."""
        access = self._table(v)
        return self.array(v) if access is None else self._laid_out(access, v.shape, self.leaves.made(access[0]))

    def _table(self, v: Val) -> Access | None:
        t = v.one
        if t is None or t.coef != 1 or len(t.accs) != 1 or t.exp or t.guards or t.poly != ONE:
            return None
        leaf, idx = t.accs[0]
        moving = [a for a in idx if not a.is_const]
        dims = {a.terms[0][0] for a in moving if len(a.terms) == 1 and a.terms[0][1] == 1}
        inside = dims <= {*range(len(v.shape))}  # not at half a dimension
        if not isinstance(self.leaves[leaf].kind, Table) or len(dims) != len(moving) or not inside:
            return None
        return (leaf, idx) if all(v.shape[d].is_const for d in dims) else None

    def _laid_out(self, access: Access, shape: tuple[Aff, ...], numbers: np.ndarray | None = None) -> np.ndarray:
        leaf, idx = access
        kind = self.leaves[leaf].kind
        assert isinstance(kind, Table)
        numbers = kind.array if numbers is None else numbers
        sizes = {a.terms[0][0]: self.length(shape[a.terms[0][0]]) for a in idx if not a.is_const}
        places = (int(a.const) if a.is_const else (int(a.const), sizes[a.terms[0][0]]) for a in idx)
        array = numbers[tuple(p if isinstance(p, int) else slice(p[0], sum(p)) for p in places)]
        order = sorted(range(len(sizes)), key=list(sizes).__getitem__)
        return array.transpose(order).reshape([sizes.get(d, 1) for d in range(len(shape))])

    def table_value(self, array: np.ndarray, shape: tuple[Aff, ...], made: np.ndarray | None = None) -> Val:
        """Known numbers as a value; only the dimensions that matter are kept, and a line 0, 1, 2 ... is an index.

        So is a plane of whole numbers, such as the distances of all pairs of positions. ``made`` is what the program
        has made of the numbers, where its format has rounded them.
        """
        if not array.size:
            raise GiveUp("an empty table")
        full = array.reshape((1,) * (len(shape) - array.ndim) + array.shape)
        dims = [d for d in range(full.ndim) if full.shape[d] > 1 and not (full == full.take([0], d)).all()]
        kept = tuple(slice(None) if d in dims else 0 for d in range(full.ndim))
        core = full[kept]
        if not dims:
            return constant(shape, float(core))
        if (plane := _plane(core)) is not None:
            return value(shape, [Term(1.0, Aff.of(dict(zip(dims, plane[1:], strict=True)), plane[0]))])
        if core.size > MAX_TABLE or not np.isfinite(core).all():
            raise GiveUp("a large table of numbers")
        made = None if made is None else made.reshape(full.shape)[kept]
        leaf = self.leaves.table(core, tuple(shape[d] for d in dims), made)
        return value(shape, [Term(accs=((leaf, tuple(Aff.var(d) for d in dims)),))])

    def tabulate(self, v: Val) -> Access:
        """A value computed from indices and known numbers alone, as a table of its numbers."""
        used: set[int] = set()
        for c in v.cases:
            for a in (*c.guards, *(a for t in c.terms for a in t.affs())):
                used |= {x for x in self.space.vars(a) if 0 <= x < MAX_DIMS}
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
