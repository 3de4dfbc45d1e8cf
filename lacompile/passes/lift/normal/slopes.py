"""Weights that are a formula of the head: ``exp(-(h + 1) / 4)`` with each token of a loop, a decay for each head.

Exponents are linear in positions, so what is linear in the number of a head looks like a weight that moves along
tokens, and its multiples ``-(h + 1) t / 4`` lie on no line. As one number for each head it is a rate like any other.
Both readings are exact; which one is taken is asked anew of each product, whose factors say what is a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..domain.affine import MAX_DIMS, ONE, ZERO, Aff
from ..domain.exponent import Access, Exponent
from ..domain.prefix import Lin
from .rates import Rates

MOST = 4096  # heads, or products of dimensions of heads


class Slopes(Rates):
    """Exponents that are linear in positions, and in no head."""

    def __init__(self) -> None:
        super().__init__()
        self._formulas: dict[int, Aff] = {}  # leaf of numbers -> its entry at the free dimensions 0, 1, ...

    def numbered(self, values: np.ndarray) -> int:
        """The leaf of these numbers."""
        raise NotImplementedError

    def by_heads(self, exp: Exponent, accs: Sequence[Access], shape: Sequence[Aff]) -> Exponent:
        """``exp`` with what is linear in heads alone as a rate for each of them, and nothing else as such a rate."""
        linear = ZERO
        lin: list[Lin] = []
        for mono, f in exp.lin:
            formula = self._formulas.get(mono[0][0]) if len(mono) == 1 and f.is_const else None
            if not mono:
                linear += f
            elif formula is not None:
                linear += self.space.sub(formula, dict(enumerate(mono[0][1]))) * f.const
            else:
                lin.append((mono, f))
        return Exponent.of([*lin, self._rate(linear, accs, shape)], exp.sums)

    def _rate(self, linear: Aff, accs: Sequence[Access], shape: Sequence[Aff]) -> Lin:
        """A linear form as numbers, if all that it is linear in are heads."""
        heads = [v for v, _ in linear.terms]
        if not heads or not all(self._is_head_of(v, accs) and shape[v].is_const for v in heads):
            return (), linear
        sizes = [int(shape[v].const) for v in heads]
        if math.prod(sizes) > MOST:
            return (), linear
        formula = Aff.of({n: c for n, (_, c) in enumerate(linear.terms)}, linear.const)
        at = np.ogrid[tuple(map(slice, sizes))]
        values = sum((x * c for x, (_, c) in zip(at, linear.terms, strict=True)), np.zeros(sizes)) + linear.const
        leaf = self.numbered(values)
        self._formulas.setdefault(leaf, formula)
        return ((leaf, tuple(map(Aff.var, heads))),), ONE

    def _is_head_of(self, v: int, accs: Sequence[Access]) -> bool:
        """Whether a variable is a head: every factor is at it, or at its group, and some are at a token, or summed."""
        if not 0 <= v < MAX_DIMS or len(accs) < 2:
            return False
        for _, idx in accs:
            held = [i for i in idx if v in self.space.vars(i)]
            if not held or any(self.space.vars(i) != {v} or i.const or i.terms[0][1] != 1 for i in held):
                return False
        places = ((i, n) for leaf, idx in accs for i, n in zip(idx, self.leaf_shapes[leaf], strict=True))
        return any((i.is_const and n != ONE) or any(x < 0 for x, _ in i.terms) for i, n in places)
