"""The first rows of a sum of attentions, in which these are one term still.

Two states of the same keys and values that decay otherwise, read together, are one product at the first token: what is
read of them there is once ``k_0 v_0``, times the sum of both weights. From the second or third token on there are two
sums, and what each says of the rows before is looked at here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from ..domain.affine import ONE, TAU, Aff
from ..domain.exponent import Access, Exponent, Mono, sub_mono
from ..domain.kinds import Number, Symbol
from ..domain.leaves import NINE_DIGITS
from ..domain.prefix import by_rate, single_place
from ..domain.term import Term
from ..engine import Engine
from ..normal.logs import log_summands
from ..normal.weights import logarithm
from ..prove.roles import sequence_index

aten = torch.ops.aten

FIRST_ROWS = 4  # at most, that are looked at one by one
MAX_SUMMANDS = 32  # of one row
LARGEST = 700.0  # exp of it is still a number of fp64


def from_the_first_row(engine: Engine, shape: tuple[Aff, ...], terms: Sequence[Term]) -> Sequence[Term]:
    """The same sum, with what begins behind the first rows from the first on, where these hold just that."""
    for d in range(len(shape)):
        late = [t for t in terms if _begins(t, d) and math.isinf(_ends(t, d))]
        m = max((_begins(t, d) for t in late), default=0)
        if not 0 < m <= FIRST_ROWS:
            continue
        early = [t for t in terms if _ends(t, d) < m]
        from_first = [t.but(guards=t.guards - {Aff.var(d) - _begins(t, d)}) for t in late]
        if all(OneRow(engine, shape, d, row).is_same((*early, *late), from_first) for row in range(m)):
            return [*(t for t in terms if t not in late and t not in early), *from_first]
    return terms


def _begins(t: Term, d: int) -> int:
    """The first place along a dimension at which a term counts, if a condition of its own says so; else 0."""
    return next((-int(g.const) for g in t.guards if g.terms == ((d, 1),)), 0)


def _ends(t: Term, d: int) -> float:
    """The last place along a dimension at which a term counts."""
    return min((float(g.const) for g in t.guards if g.terms == ((d, -1),)), default=math.inf)


class OneRow:
    """Sums as they are in one row, token by token and factor by factor."""

    def __init__(self, engine: Engine, shape: tuple[Aff, ...], d: int, row: int):
        self.engine, self.space, self.leaves = engine, engine.space, engine.leaves
        self.shape = (*shape[:d], ONE, *shape[d + 1 :])
        self._here = {d: Aff.lit(row)}

    def is_same(self, now: Sequence[Term], then: Sequence[Term]) -> bool:
        """Whether both sums are one, wherever what is a weight in ``then`` is positive."""
        known = {leaf for t in then for leaf in t.leaves}
        rates = {a[0] for t in then for mono in t.exp.monos for a in mono}
        rates |= {a[0] for t in now for mono in t.exp.monos for a in mono if self._base(a) is None}
        sides = []
        for terms in (now, then):
            points = (p for t in terms for p in self._points(t))
            sides.append([t for p in points for t in self._summands(p, known)])
        if max(map(len, sides)) > MAX_SUMMANDS:
            return False
        signed = (*sides[0], *(t.but(coef=-t.coef) for t in sides[1]))
        normal = (self.engine.normalise(self._weighed(t, rates), self.shape) for t in signed)
        return _vanishes([t for t in normal if t is not None])

    def _points(self, t: Term) -> Iterator[Term]:
        found = sequence_index(self.engine, t)
        there = t.sub(self.space, self._here)
        ends = None if found is None else self.engine.bounds(found[0], there.guards).ends
        if found is None or ends is None or not (ends[0].is_const and ends[1].is_const):
            yield there
            return
        for place in range(int(ends[0].const), int(ends[1].const) + 1):
            yield there.sub(self.space, {found[0]: Aff.lit(place)})

    def _summands(self, t: Term, known: set[int]) -> Iterator[Term]:
        """A product of sums as a sum of products, as far as its factors are none of the ``known`` ones."""
        for n, a in enumerate(t.accs):
            parts = None if a[0] in known else self._parts(a)
            if parts is not None:
                rest = t.accs[:n] + t.accs[n + 1 :]
                for coef, accs in parts:
                    yield from self._summands(t.but(coef=t.coef * coef, accs=tuple(sorted((*rest, *accs)))), known)
                return
        yield t

    def _parts(self, a: Access) -> list[tuple[float, list[Access]]] | None:
        """The summands of a sum, or the factors of a product, each with its number; None of anything else."""
        kind = self.leaves[a[0]].kind
        if not isinstance(kind, Symbol) or kind.kwargs:
            return None
        if kind.op is aten.exp.default:
            rate, cast = next(kind.given(a[1]))
            base = self._base(rate) if cast is None else None
            return None if base is None else [(1.0, [base])]
        if kind.op not in (aten.add.Tensor, aten.mul.Tensor):
            return None
        formats = [self.leaves[a[0]].dtype]
        parts: list[tuple[float, list[Access]]] = []
        for given in kind.given(a[1]):
            if isinstance(given, tuple):
                access, cast = given
                formats += [self.leaves[access[0]].dtype, *([] if cast is None else [cast])]
                parts.append((1.0, [access]))
            else:
                parts.append((float(given.value if isinstance(given, Number) else given), []))
        if not all(f.is_floating_point and f.itemsize > 1 for f in formats):
            return None
        if kind.op is aten.add.Tensor:
            return parts
        return [(math.prod(c for c, _ in parts), [x for _, accs in parts for x in accs])]

    def _weighed(self, t: Term, rates: set[int]) -> Term:
        """A factor whose logarithm is one of the ``rates`` as a weight, and what is another logarithm as the factor."""
        accs, lin, sums = list(t.accs), [], []
        for mono, f in t.exp.lin:
            if f == ONE and (base := self._factor(mono, rates)) is not None:
                accs.append(base)
            else:
                lin.append((mono, f))
        for mono, ends in by_rate(t.exp.sums).items():
            at, c = single_place(ends) or (None, 0)
            base = None if at is None or c != 1 else self._factor(sub_mono(self.space, mono, {TAU: at}), rates)
            if base is None:
                sums += [((mono, pos), c) for pos, c in ends]
            else:
                accs.append(base)
        moved = []
        for a in accs:
            logs = [] if any(v < 0 for v in self.space.vars_of(a[1])) else log_summands(self.leaves, a)
            if logs and all(x is None or x[0] in rates for _, x in logs):
                moved.append(a)
        kept = tuple(sorted(a for a in accs if a not in moved))
        return t.but(accs=kept, exp=Exponent.of(lin, sums) + logarithm(self.leaves, moved))

    def _factor(self, mono: Mono, rates: set[int]) -> Access | None:
        return self._base(mono[0]) if len(mono) == 1 and mono[0][0] not in rates else None

    def _base(self, rate: Access) -> Access | None:
        """The x whose logarithm a rate is."""
        kind = self.leaves[rate[0]].kind
        if not isinstance(kind, Symbol) or kind.op is not aten.log.default:
            return None
        access, cast = next(kind.given(rate[1]))
        return access if cast is None else None


def _vanishes(terms: Sequence[Term]) -> bool:
    """Whether terms of one body, which may differ by a number in their weights, add up to nothing."""
    groups: list[tuple[Term, list[float]]] = []
    for t in terms:
        for first, numbers in groups:
            apart = (t.exp - first.exp).number
            alike = (t.poly, t.accs, t.guards) == (first.poly, first.accs, first.guards)
            if alike and apart is not None and abs(apart) < LARGEST:
                numbers.append(t.coef * math.exp(apart))
                break
        else:
            groups.append((t, [t.coef]))
    return all(abs(math.fsum(n)) <= NINE_DIGITS * math.fsum(map(abs, n)) for _, n in groups)
