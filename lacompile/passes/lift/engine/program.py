"""The traced program as the algebra sees it: its sizes as affine forms, its tensors as leaves."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from ...._compat import hint
from ..domain.affine import INF, ONE, Aff
from ..domain.choices import Choices
from ..domain.exponent import Access
from ..domain.intervals import ANY, POSITIVE, Interval, product
from ..domain.kinds import Opaque, Scalar
from ..domain.leaves import Leaf, Leaves
from ..domain.sizes import Sizes
from ..domain.space import own_index
from ..domain.term import Precision, Term, Val, value
from ..normal.algebra import Algebra
from .limits import GiveUp

DEFAULTS = Choices()
LARGEST_LOGARITHM = 700.0  # exp of it is a number in fp64


class Program(Algebra):
    """The algebra of one analysis together with its leaves and the symbolic sizes of the traced program."""

    def __init__(self, choices: Choices = DEFAULTS) -> None:
        super().__init__()
        self.choices = choices
        self.leaves = Leaves(self.leaf_shapes)
        self.sizes = Sizes(self.space, dict(choices.equal))
        self.endless = Aff.var(self.space.symbol(1, INF))  # as many positions as are asked for
        self.symints: dict[Aff, torch.SymInt] = {}
        self._seen: dict[Aff, Aff] = {}
        self._of_parameters: list[bool] = []
        self.size_nodes: dict[Aff, Any] = {}  # sizes that are inputs of the graph
        self.number_nodes: dict[Any, Any] = {}  # PyTorch's expression -> the first Dynamo node that is that number
        self.taken_whole: list[int] = []  # leaves that stand for a product that nobody looked into
        self.view_maps: dict[tuple[tuple[Aff, ...], tuple[Aff, ...]], dict[int, Aff]] = {}  # from old and new sizes
        self.narrowed: set[frozenset[int]] = set()  # of products cast to a narrower format
        self.turned = False  # whether the program turned tensors of data from their end to their beginning
        self.weighed = False  # whether the features of a token or chunk were multiplied by known numbers
        self.parts: set[tuple[int, ...]] = set()  # leaves of sums over parts of a dimension, as a head's features are
        self.parts_weighed = False  # whether such a sum was met in an exponent
        self.exponentials: dict[tuple[int, float], set[Any]] = {}  # exp(c * leaf) -> who computes all of it
        self.rolled: dict[Access, Val] = {}  # a tensor whose end was put before its beginning -> both as they were
        self.of_short_data = False  # whether all fractions that the program is given are in sixteen bits
        self.running: Any = None  # the Dynamo node that is being lifted
        self.relied: dict[Any, set[Any]] = {}  # Dynamo node -> inputs whose values decided how it was lifted

    def aff(self, size: Any) -> Aff:
        """A size or an integer argument as an affine form over symbolic sizes."""
        if isinstance(size, bool):
            raise GiveUp("a boolean where an index was expected")
        if isinstance(size, int):
            return Aff.lit(size)
        if isinstance(size, torch.SymInt):
            found = self.sizes(size.node.expr, size.node.shape_env)
            if found not in self.symints:
                self.symints[found] = size
                self._seen[found] = Aff.lit(number) if (number := hint(size)) else found
            return found
        raise GiveUp(f"index of type {type(size).__name__}")

    def before_roll(self, v: Val) -> Val | None:
        """What a rolled tensor was made of; None if it is none."""
        t = v.one if self.rolled else None
        if t is None or t.coef != 1 or t.poly != ONE or t.exp or t.guards or len(t.accs) != 1:
            return None
        found = self.rolled.get(t.accs[0])
        return None if found is None or found.shape != v.shape else found

    def scalar(self, number: torch.SymInt | torch.SymFloat, inverse: bool = False) -> Access:
        """A number of the traced program, or one over it, as a factor of data.

        Raises:
            GiveUp: it is none of the graph's values, or may be 0 where one over it is asked for.
        """
        expr = number.node.expr
        if expr not in self.number_nodes:
            raise GiveUp("a number that no value of the graph is")
        low, high = within = _bounds(number)
        if inverse:
            if not low > 0:
                raise GiveUp("division by a number that is not known to be positive")
            within = max(1 / high, sys.float_info.min), 1 / low  # a size is finite
        return self.leaves.scalar(Scalar(expr, inverse), within)

    def shape(self, tensor: torch.Tensor) -> tuple[Aff, ...]:
        return tuple(self.aff(n) for n in tensor.shape)

    def length(self, n: Aff) -> int:
        """A size that must be a number."""
        if not n.is_const:
            raise GiveUp("a symbolic size where a number is needed")
        return int(n.const)

    def leaf(self, tensor: torch.Tensor, kind: Opaque, **facts: Any) -> Val:
        """A fresh leaf holding this tensor."""
        shape = self.shape(tensor)
        leaf = self.leaves.add(Leaf(kind, shape, tensor.dtype, **facts))
        return value(shape, [Term(accs=((leaf, own_index(shape)),))], precision=Precision.EXACT)

    def interval(self, leaf: int) -> Interval:
        """What all entries of a leaf lie in; that the node being lifted was read by it is noted."""
        found = self.leaves[leaf]
        if found.rests_on:
            self.relied.setdefault(self.running, set()).update(found.rests_on)
        return found.interval

    def within(self, terms: Iterable[Term]) -> Interval:
        """What a sum of products of data lies in, each of which counts once."""
        low = high = 0.0
        for t in terms:
            if not t.poly.is_const:
                return ANY
            number = t.coef * t.poly.const
            logarithm = INF if t.exp.number is None else t.exp.number
            weight = math.exp(logarithm) if abs(logarithm) <= LARGEST_LOGARITHM else None
            ends = product((number, number), (POSITIVE, INF) if weight is None else (weight, weight))
            for leaf, _ in t.accs:
                ends = product(ends, self.leaves[leaf].interval)
            low, high = low + ends[0], high + ends[1]
        return low, high

    def sign(self, terms: Iterable[Term]) -> Interval:
        """What a sum lies in of which it is not known how many places it has: its sign, where all summands have one."""
        low = 0.0
        for t in terms:
            least, _ = self.within([t])
            if least < 0:
                return ANY
            counts = all(len(g.terms) == 1 and g.terms[0][0] < 0 for g in t.guards)  # else it may be empty
            low = max(low, POSITIVE if counts and least > 0 else 0.0)
        return low, INF

    def counted(self, t: Term) -> Term:
        """A term with what it counts, a factor that is an index form, as data."""
        counted = self.leaves.at_position(t.poly, self.endless)
        return t.but(poly=ONE, accs=tuple(sorted((*t.accs, counted))))

    def of_parameters(self, leaf: int) -> bool:
        """Whether a leaf is a parameter, or computed from such alone; what it is computed from is older than it."""
        for at in range(len(self._of_parameters), len(self.leaves)):
            found = self.leaves[at]
            of = found.kind.of if isinstance(found.kind, Opaque) else self.leaves.made_of(at)
            self._of_parameters.append(found.parameter or (bool(of) and all(self._of_parameters[x] for x in of)))
        return self._of_parameters[leaf]

    def lies_in(self, interval: Interval, leaves: Iterable[int]) -> dict[str, Any]:
        """What a leaf is told of its size, with the inputs whose values the intervals of these were read off."""
        known = () if interval == ANY else leaves
        return {"interval": interval, "rests_on": frozenset[Any]().union(*(self.leaves[x].rests_on for x in known))}

    def seen(self, size: Aff) -> Aff:
        return self._seen.get(size, size)

    def multiple(self, leaf: int) -> tuple[int, float]:
        return self.leaves.multiple(leaf)

    def numbered(self, values: np.ndarray) -> int:
        return self.leaves.table(values, tuple(map(Aff.lit, values.shape)))


def _bounds(number: torch.SymInt | torch.SymFloat) -> Interval:
    """What PyTorch knows of a number in every run of the traced program."""
    found = number.node.shape_env.bound_sympy(number.node.expr)
    low, high = (float(end) if end.is_Rational or end.is_Float else None for end in (found.lower, found.upper))
    return ANY[0] if low is None else low, ANY[1] if high is None else high
