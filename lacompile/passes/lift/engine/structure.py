"""What kind of value a normal form is: plain data, indices and numbers alone, or something worth looking into."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import combinations

from ..domain.affine import ONE, Aff
from ..domain.digits import digits_of
from ..domain.exponent import NO_EXPONENT, Access
from ..domain.kinds import Argument, Number, Opaque, Symbol, Table
from ..domain.leaves import POSITIVE_OF_POSITIVE
from ..domain.term import Term, Val
from .program import Program

SMALLEST = 1e-4  # one over it is a number in fp16


class Structure(Program):
    """Predicates on terms and values; none of them changes anything."""

    def plain_term(self, t: Term) -> bool:
        """No structure: nothing summed, nothing guarded, no weight that moves with an index."""
        return (
            not t.guards
            and t.poly.is_const
            and not t.exp.sums
            and all(f.is_const for _, f in t.exp.lin)
            and not any(v < 0 for _, idx in t.accs for a in idx for v, _ in a.terms)
        )

    def plain(self, v: Val) -> bool:
        return v.single and all(self.plain_term(t) for t in v.terms)

    def index_only(self, v: Val) -> bool:
        """Computed from indices and known numbers alone."""

        def known(accs: Iterable[Access]) -> bool:
            return all(isinstance(self.leaves[leaf].kind, Table) for leaf, _ in accs)

        return all(
            known(t.accs) and all(known(m) for m, _ in t.exp.lin) and all(known(m) for (m, _), _ in t.exp.sums)
            for c in v.cases
            for t in c.terms
        )

    def written(self, v: Val) -> bool:
        """Computed from numbers that the program writes alone, be they known or not."""
        return all(self.leaves.written(leaf) for c in v.cases for t in c.terms for leaf in t.leaves)

    def of_features(self, v: Val, w: Val) -> bool:
        """Whether ``v`` has the features of ``w`` and less of its other dimensions, and moves along features alone.

        What has guards is a mask, of scores whose columns are as many as a chunk has tokens.
        """
        if not v.shape or v.shape == w.shape or len(v.shape) > len(w.shape):
            return False
        if not v.shape[-1] == w.shape[-1] != ONE:
            return False
        last, terms = len(v.shape) - 1, [t for c in v.cases for t in c.terms]
        if any(x.guards for x in (*v.cases, *terms)):
            return False
        moving = [m for t in terms for m, f in t.exp.lin if not f.is_const]
        along = all(any(last in self.space.vars_of(idx) for _, idx in m) for m in moving)
        unweighed = v.with_terms(lambda t: t.but(exp=NO_EXPONENT))
        known = self.index_only(v) or self.plain(unweighed)
        return along and known and not any(t.exp.sums for t in terms)

    def places(self, access: Access) -> list[Aff]:
        """Where it is read along the dimensions of which it is read at one place."""
        leaf, idx = access
        return [i for i, n in zip(idx, self.leaf_shapes[leaf], strict=True) if i.is_const and n != ONE]

    def outer_product(self, t: Term) -> bool:
        """Whether no factor has all dimensions of the product, as in what a token adds to a state."""
        dims = t.vars(self.space)
        return not any(self.space.vars_of(idx) == dims for _, idx in t.accs)

    def in_part(self, v: Val) -> bool:
        """Plain data that is read at one place of a longer tensor, or from a part of it that is no part of features."""
        outer = range(len(v.shape) - 1)

        def part(leaf: int, idx: Sequence[Aff]) -> bool:
            sizes = zip(idx, self.leaf_shapes[leaf], strict=True)
            return any(
                n != ONE if i.is_const else any(x in outer and v.shape[x] != n for x, _ in i.terms) for i, n in sizes
            )

        if not self.plain(v) or self.index_only(v):
            return False
        return any(part(*a) for t in v.terms for accs in (t.accs, *(m for m, _ in t.exp.lin)) for a in accs)

    def never_nan(self, v: Val) -> bool:
        """Made of indices, known numbers, weights and their row sums alone: over the reals no entry is nan or inf.

        Where the program has one all the same, gamma ** (i - j) has overflowed above the diagonal and met a zero there.
        """
        terms = [t for c in v.cases for t in c.terms]
        kinds = {leaf: self.leaves[leaf].kind for t in terms for leaf, _ in t.accs}
        known = all(isinstance(kind, Table) or self._positive_number(leaf) for leaf, kind in kinds.items())
        return v.alt is None and known and not any(math.isinf(t.coef) for t in terms)

    def _positive_number(self, leaf: int) -> bool:
        """Whether it is made of sums of weights that one of them alone keeps from being nothing, in any format."""
        kind = self.leaves[leaf].kind
        if isinstance(kind, Opaque):
            return kind.reading is not None and self._holds_one(kind.reading)
        if not isinstance(kind, Symbol) or kind.op not in POSITIVE_OF_POSITIVE or kind.kwargs:
            return isinstance(kind, Table) and self.leaves[leaf].interval[0] > 0
        numbers = [a.value if isinstance(a, Number) else a for a in kind.args if not isinstance(a, Argument)]
        inside = [a for a in kind.args if isinstance(a, Argument)]
        return all(n is None or n > 0 for n in numbers) and all(
            a.dtype is None and self._positive_number(a.leaf) for a in inside
        )

    def _holds_one(self, v: Val) -> bool:
        """Whether it is a sum of weights, one of which is a number for every entry: that of the diagonal is 1."""
        if not v.single or any(t.accs or t.coef <= 0 or t.poly != ONE for t in v.terms):
            return False
        return any(t.coef >= SMALLEST and self._is_somewhere_a_number(t, v.shape) for t in v.terms)

    def _is_somewhere_a_number(self, t: Term, shape: tuple[Aff, ...]) -> bool:
        bound = t.bound(self.space)
        if len(bound) != 1 or len(t.guards) != 2:
            return not t.exp and not t.guards
        (x,) = bound
        ends = self.bounds(x, t.guards).ends
        if ends is None or self.space.lower(ends[1] - ends[0], self.box(shape)) < 0:
            return False
        return any(not t.exp.sub(self.space, {x: end}) for end in ends)

    def structured_term(self, t: Term) -> bool:
        """Worth looking into rather than taking as it is: weighted, guarded, or summed over a part of a dimension."""
        return t.told(self._structured_term)

    def _structured_term(self, t: Term) -> bool:
        if t.exp.sums or any(not f.is_const for _, f in t.exp.lin):
            return True
        if any(m for m, _ in t.exp.lin) and any(v < 0 for _, idx in t.accs for a in idx for v, _ in a.terms):
            return True
        if self._projects_a_part(t):
            return False
        bound: dict[int, Aff] = {}
        # factors that are read at one place, as those of one token are
        fixed = sum(bool(self.places(a)) and not self._one_matrix_of_several(t, a) for a in t.accs)
        for leaf, idx in t.accs:
            for size, a in zip(self.leaf_shapes[leaf], idx, strict=True):
                for v, c in a.terms:
                    if v < 0:
                        if c != 1 or a.const or len(a.terms) > 1:
                            return True
                        bound[v] = size
        if fixed > 1:
            return True
        for g in t.guards:
            owner = [v for v, _ in g.terms if v in bound]
            if len(owner) != 1:
                return True
            v = owner[0]
            if g not in (Aff.var(v), bound[v] - 1 - Aff.var(v)):
                return True
        return False

    def _projects_a_part(self, t: Term) -> bool:
        """Whether a part of the features, such as those of a head, is multiplied by a matrix, all of which is read."""
        if not self._projection(t):
            return False
        data = self.leaves.tensors(t.accs)
        if len(data) != 2:
            return False
        return any(self.projects_by(m, of) and self._summed_whole(t, m) for m, of in (data, data[::-1]))

    def _one_matrix_of_several(self, t: Term, a: Access) -> bool:
        """Whether it is a layer's matrix, and no token: what it projects is read at no place of as many."""
        if self.of_parameters(a[0]):
            return True
        data = self.leaves.tensors(t.accs)
        if len(data) != 2 or a not in data or not t.bound(self.space):
            return False
        (of,) = (x for x in data if x is not a)
        return self._read_of(a).isdisjoint(self._read_of(of)) and self.projects_by(a, of)

    def _read_of(self, a: Access) -> set[Aff]:
        """Of how many places one is read; of a function, by those of its arguments that have all its dimensions."""
        kind = self.leaves[a[0]].kind
        if not isinstance(kind, Symbol):
            return {n for _, n in self.leaves.places([a])}
        given = [x[0] for x in kind.given(a[1]) if isinstance(x, tuple)]
        free = self.space.vars_of(a[1])
        return {n for x in given if self.space.vars_of(x[1]) == free for n in self._read_of(x)}

    def _summed_whole(self, t: Term, a: Access) -> bool:
        """Whether each summed index runs over a whole dimension of this factor, and nothing else is asked of any."""
        leaf, idx = a
        if any(i.is_const and n != ONE for i, n in zip(idx, self.leaf_shapes[leaf], strict=True)):
            return False  # one token of several
        left = set(t.guards)
        for v in t.bound(self.space):
            ends = self.bounds(v, t.guards).ends
            held = [(i, n) for i, n in zip(idx, self.leaf_shapes[leaf], strict=True) if i.coef(v)]
            if ends is None or len(held) != 1:
                return False
            (i, n), x = held[0], Aff.var(v)
            if i - x != -ends[0] or ends[1] - ends[0] + 1 != n:
                return False
            left -= {self.space.guard(x - ends[0]), self.space.guard(ends[1] - x)}
        return not left

    def structured(self, v: Val) -> bool:
        if v.alt is not None and v.single and len(v.terms) > 1:
            if any(m for t in v.terms for m, _ in t.exp.lin) or not summed(v):
                return True  # a state and its update
        return any(self.structured_term(t) for c in v.cases for t in c.terms)

    def moves_along_a_feature(self, v: Val, feature: int | None = None) -> bool:
        """Data times a weight scale[d] * i: its rate differs along a dimension (this one) that its distance lacks."""

        def moves(t: Term) -> bool:
            free = [{x for _, idx in m for x in self.space.vars_of(idx)} for m, f in t.exp.lin if not f.is_const]
            return any(bool(held) if feature is None else feature in held for held in free)

        return v.single and not self.index_only(v) and any(moves(t) for t in v.terms)

    def projects(self, v: Val) -> bool:
        """Products with matrices that each token is multiplied by: no scores, whatever they are weighted by."""
        if v.alt is None or not v.single:
            return False
        found = [self._projection(t) for t in v.terms]
        return any(found) and all(p or self.plain_term(t) for p, t in zip(found, v.terms, strict=True))

    def _projection(self, t: Term) -> bool:
        data = self.leaves.tensors(t.accs)
        if len(data) > 2:
            data = [a for a in data if not self._weighs_what_is_summed(a)]
        if len(data) != 2 or t.exp.number is None:
            return False
        return bool(t.bound(self.space)) and any(map(self.projects_by, data, reversed(data)))

    def _weighs_what_is_summed(self, a: Access) -> bool:
        """Whether it is made of parameters, as the share that each feature of a token has in a mixture of two."""
        leaf, idx = a
        return self.of_parameters(leaf) and all(x < 0 for x in self.space.vars_of(idx))

    def weighs_columns(self, v: Val, w: Val) -> bool:
        """Whether a weight moves along a free dimension of what ``v`` projects by, if that is no parameter.

        The keys of a single sequence and head have neither batch nor head, and a weight of pairs moves along them.
        """
        moving = {x for c in w.cases for g in c.guards for x in self.space.vars(g)}
        for t in (t for c in w.cases for t in c.terms):
            affs = (*t.guards, *(f for _, f in t.exp.lin), *(p for (_, p), _ in t.exp.sums))
            moving |= self.space.vars_of(affs)
        read = [self.leaves.tensors(t.accs) for t in v.terms]
        pairs = [p for data in read if len(data) == 2 for p in (data, data[::-1])]
        one_way = [m for m, of in pairs if self.projects_by(m, of) and not self.projects_by(of, m)]
        matrices = [m for m in one_way if not self.leaves[m[0]].parameter]
        return any(x >= 0 and x in moving for m in matrices for x in self.space.vars_of(m[1]))

    def projects_by(self, matrix: Access, of: Access) -> bool:
        """Whether a product over what both have is a projection: by a parameter, or by what holds no batch or token."""
        if self.leaves[matrix[0]].parameter:
            return True
        read, read_by = digits_of(self.space, of[1], matrix[1])
        tokens = {(x, step) for x, step in read if x >= 0}
        outer = len(tokens) + len(self.places(of)) + (self._of_one(of) and not self._of_one(matrix))
        return outer > 1 and not tokens & read_by

    def _of_one(self, a: Access) -> bool:
        """Whether it has a dimension of one entry, as a single sequence has a batch of one."""
        return ONE in self.leaf_shapes[a[0]]

    def _sums_places(self, v: Val) -> bool:
        """Whether it is a sum of one tensor at as many places everywhere."""

        def summed(t: Term) -> bool:
            free = any(x >= 0 for g in t.guards for x in self.space.vars(g))
            return len(t.accs) == 1 and not t.exp and bool(t.bound(self.space)) and not free

        return v.single and bool(v.terms) and all(map(summed, v.terms))

    def _sums_parameters(self, v: Val) -> bool:
        """Whether it is a sum, of as many places everywhere, of what is computed from parameters alone."""
        return self._sums_places(v) and all(self.of_parameters(t.accs[0][0]) for t in v.terms)

    def contracts(self, v: Val) -> bool:
        """Holds a sum of products of leaves: the work a rewrite could replace."""
        return (v.alt is not None and self.structured(v)) or any(
            t.told(self._sums_products) for c in v.cases for t in c.terms
        )

    def sums(self, v: Val) -> bool:
        """Holds a sum of products, or of data up to each position."""
        data = v.alt is None and not self.index_only(v)
        return self.contracts(v) or (data and any(t.bound(self.space) for c in v.cases for t in c.terms))

    def _sums_products(self, t: Term) -> bool:
        # exp of plain data, as of a feature map, is a factor like any other
        factors = [*self.leaves.tensors(t.accs), *(a for m, f in t.exp.lin if f.is_const for a in m)]
        factors += {a for (m, _), _ in t.exp.sums for a in m if any(x < 0 for x in self.space.vars_of(a[1]))}
        return len(factors) >= 2 and any(x < 0 for _, idx in factors for a in idx for x, _ in a.terms)

    def scores(self, v: Val) -> bool:
        """Products of rows and columns over features alone, masked or not, no projection: what a power multiplies out.

        What was summed over positions already, an attention's result, is data for the norm behind it.
        """
        terms = [t for c in v.cases for t in c.terms]
        return self.contracts(v) and not self.projects(v) and all(map(self._of_pairs, terms))

    def scores_of_a_row(self, v: Val, dims: Sequence[int]) -> bool:
        """What one row reads of some columns, which ``dims`` number: products over features with a token of their own.

        The columns may weigh values by then. All have a batch or heads in common with the row, which tokens and a
        matrix that projects them have not.
        """
        if not v.single or len(v.terms) != 1:
            return False
        data = self.leaves.tensors(v.terms[0].accs)
        rows = [a for a in data if self.places(a)]
        columns = [self.space.vars_of(idx) for leaf, idx in data if not self.places((leaf, idx))]
        if len(rows) != 1 or not columns:
            return False
        row = self.space.vars_of(rows[0][1])
        return all(all(d in column - row for d in dims) and any(x >= 0 for x in row & column) for column in columns)

    def _of_pairs(self, t: Term) -> bool:
        """Whether all summed indices run over whole dimensions, and rows and columns are each of some factor alone."""
        bound = t.bound(self.space)
        whole = {
            (v, size)
            for leaf, idx in t.accs
            for size, i in zip(self.leaf_shapes[leaf], idx, strict=True)
            for v in bound
            if i == Aff.var(v)
        }
        ranges = {g for v, size in whole for g in (Aff.var(v), size - 1 - Aff.var(v))}
        if not all(g in ranges for g in t.guards if bound & self.space.vars(g)):
            return False
        if bound & self.space.vars_of(f for f in t.exp.affs()):
            return False
        held = [self.space.vars_of(idx) - bound for _, idx in t.accs]
        return not bound or any(not (x <= y or y <= x) for x, y in combinations(held, 2))

    def accumulates(self, v: Val) -> bool:
        """Holds a sum over positions whose weights move along them, be it of one factor, as a recurrence makes it."""

        def weighted(t: Term) -> bool:
            moving = (*(f for _, f in t.exp.lin), *(p for (_, p), _ in t.exp.sums))
            return any(x < 0 for f in moving for x, _ in f.terms)

        return any(weighted(t) for c in v.cases for t in c.terms)


def summed(v: Val) -> bool:
    """Whether some factor runs over a bound index."""
    return any(x < 0 for t in v.terms for _, idx in t.accs for f in idx for x, _ in f.terms)
