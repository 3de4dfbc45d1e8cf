"""Function symbols: a pointwise function of plain data is a leaf of its own, f(x)[idx] = f(x[idx])."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import torch

from ...._compat import takes_no_number
from ..domain.affine import Aff
from ..domain.exponent import Access, Exponent, Mono
from ..domain.kinds import Number, Symbol, Table
from ..domain.precision import SMOOTH, jumps
from ..domain.term import Case, Precision, Term, Val, value
from ..normal.logs import log_summands
from .limits import MAX_TABLE, GiveUp
from .tables import Tables

aten = torch.ops.aten
DETACH = aten.detach.default


class Symbols(Tables):
    """Values as factors: one access of one leaf each."""

    def pick(self, v: Val) -> Val:
        """The reading of ``v`` a consumer of plain factors wants: its own leaf unless it is worth looking into."""
        return v if v.alt is None or self.structured(v) else self.whole(v)

    def pick_piece(self, v: Val) -> Val:
        """That of a piece of a tensor: a projection as its own leaf, another sum of products as it is."""
        return self.pick(v) if not self.contracts(v) or self.projects(v) else v

    def whole(self, v: Val) -> Val:
        """What can be looked into, as the leaf that it is."""
        assert v.alt is not None
        self.taken_whole.extend(leaf for leaf, _ in v.alt.accs)
        return value(v.shape, [v.alt])

    def access(self, v: Val, dtype: torch.dtype | None = None) -> tuple[Access, torch.dtype | None] | float:
        """``v`` as one access of one leaf (a symbol where it takes arithmetic), or as a number.

        Raises:
            GiveUp: ``v`` holds a contraction, a guard or a moving weight.
        """
        if v.alt is not None:
            self.taken_whole.extend(leaf for leaf, _ in v.alt.accs)
            return self.term_access(v.alt, dtype)
        v = v.with_terms(self._at_places)
        if not v.single or not self.plain(v):
            if self.index_only(v):
                return self.tabulate(v), None
            raise GiveUp("a contraction or a mask inside a pointwise function")
        if not v.terms:
            return 0.0
        out = self.term_access(v.terms[0], dtype)
        for t in v.terms[1:]:
            out = self._symbol(aten.add.Tensor, [out, self.term_access(t, dtype)], dtype), None
        return out

    def _at_places(self, t: Term) -> Term:
        """With each rate of one place as that, as of one layer of several: in a function nothing telescopes with it."""
        return t.but(exp=self.placed(t.exp, lambda _: True)) if t.exp.sums else t

    def term_access(self, t: Term, dtype: torch.dtype | None) -> tuple[Access, torch.dtype | None] | float:
        out: tuple[Access, torch.dtype | None] | None = None
        t = self._at_places(t)
        coef = t.coef

        def times(other: Any) -> None:
            nonlocal out
            out = other if out is None else (self._symbol(aten.mul.Tensor, [out, other], dtype), None)

        data = self.leaves.tensors(t.accs)
        for a in data:
            times((a, dtype))
        for mono, f in t.exp.lin:
            if not f.is_const:
                raise GiveUp("a moving weight inside a pointwise function")
            inner = self.term_access(Term(f.const, accs=mono), dtype)
            if isinstance(inner, float):
                coef *= math.exp(inner)
            else:
                times((self._symbol(aten.exp.default, [inner], dtype), None))
        for (mono, pos), c in t.exp.sums:
            raise GiveUp(f"a prefix sum over {mono} up to {pos} times {c} inside a pointwise function")
        for a in t.accs:
            if a not in data:
                times((a, None))
        if out is None:
            return coef
        if abs(coef - 1) > 1e-12:
            out = (self._symbol(aten.mul.Tensor, [out, coef], dtype), None)
        return out

    def held(self, v: Val) -> Val:
        """A sum of products as the value of the graph that it is: inside a function it is data like any other."""
        if self.plain(v) or (v.alt is not None and not self.structured(v)):
            return v
        found = self.as_held(v)
        return v if found is None else replace(found, precision=Precision.EXACT)

    def as_held(self, v: Val) -> Val | None:
        """The value of the graph that a sum of products is, if one holds it: it is asked what it is by itself."""
        if v.own is None:
            return None
        self.taken_whole.extend(leaf for leaf, _ in v.own.accs)
        return value(v.shape, [v.own])

    def _symbol(
        self, op: Any, args: list[Any], dtype: torch.dtype | None, kwargs: dict[str, Any] | None = None
    ) -> Access:
        if dtype is None:
            dtype = self._common_format(args)
        inner = [self._undetached(a) if isinstance(a, tuple) else a for a in args]
        if op is not DETACH and any(isinstance(a, tuple) for a in args) and all(a is not None for a in inner):
            whole = self._symbol(op, inner, dtype, kwargs)  # f(detach(x)) is detach(f(x))
            return self._symbol(DETACH, [(whole, None)], None)
        out = self.leaves.symbol(op, args, kwargs or {}, dtype)
        if out is None:
            raise GiveUp("a pointwise function of too many indices")
        return out

    def _common_format(self, args: Sequence[Any]) -> torch.dtype:
        """The format of a product or a sum that no node of the program has."""
        dtypes = [
            self.leaves[leaf].dtype for leaf, _ in self.leaves.tensors(a[0] for a in args if isinstance(a, tuple))
        ]
        found = reduce(torch.promote_types, dtypes, torch.bool)
        numbers = any(isinstance(a, float) for a in args)
        return torch.float64 if numbers and not found.is_floating_point else found

    def _undetached(self, arg: tuple[Access, torch.dtype | None]) -> tuple[Access, torch.dtype | None] | None:
        """What is detached; None if the argument is something else."""
        (leaf, idx), dtype = arg
        kind = self.leaves[leaf].kind
        if not isinstance(kind, Symbol) or kind.op is not DETACH:
            return None
        (child,) = kind.args
        return (child.leaf, idx), dtype

    def pointwise(
        self,
        op: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        out: torch.Tensor,
        dtypes: Sequence[torch.dtype | None] = (),
    ) -> Val:
        """A function symbol over the plain arguments: f(x)[idx] = f(x[idx]).

        ``dtypes`` are those of the arguments in the program, where they are not those of the result.
        """
        if any(isinstance(x, Val) for x in kwargs.values()):
            raise GiveUp("a tensor among the keyword arguments")
        if any(isinstance(x, torch.SymInt | torch.SymFloat) for x in (*args, *kwargs.values())):
            raise GiveUp("a number that may be another one in the next call")
        if (found := self._of_padded(op, args, kwargs, out, dtypes)) is not None:
            return found
        shape = self.shape(out)
        scalars = [isinstance(a, Val) and not a.shape for a in args]
        args = [self.held(a) if isinstance(a, Val) else a for a in args]
        used = [d if d is not None and d.is_floating_point else None for d in dtypes] or [None] * len(args)
        vals = [self.broadcast(a, shape) if isinstance(a, Val) else a for a in args]
        if jumps(self.leaves, op, vals, dtypes or [out.dtype], out.dtype):
            raise GiveUp("a decision by numbers that rounding may have changed")
        if all(self.index_only(v) and v.alt is None for v in vals if isinstance(v, Val)):
            try:
                return self.folded(op, vals, kwargs, shape)
            except GiveUp:
                if (counted := self._of_positions(op, vals)) is None:
                    raise
                vals = counted
        spec = [self.access(v, d) if isinstance(v, Val) else v for v, d in zip(vals, used, strict=True)]
        formats = [d or out.dtype for d in dtypes] or [out.dtype] * len(args)
        for n, x in enumerate(spec):
            if isinstance(vals[n], Val) and isinstance(x, int | float) and takes_no_number(op, n):
                spec[n] = Number(float(x), formats[n], scalars[n])
        return value(shape, [Term(accs=(self._symbol(op, spec, out.dtype, kwargs),))])

    def _of_positions(self, op: Any, vals: Sequence[Any]) -> list[Any] | None:
        """The arguments of a smooth function of positions whose number is not known, as data; None if it is another."""
        found: list[Any] = []
        for v in vals:
            if isinstance(v, Val):
                t = v.one
                if t is None or t.accs or t.exp or t.guards or math.isinf(t.coef):
                    return None
                if not t.poly.is_const:
                    if not all(float(c).is_integer() for c in (t.poly.const, *(c for _, c in t.poly.terms))):
                        return None
                    v = value(v.shape, [Term(t.coef, accs=(self.leaves.at_position(t.poly, self.endless),))])
            found.append(v)
        smooth = getattr(op, "overloadpacket", op) in SMOOTH
        return found if smooth and any(isinstance(v, Val) and self._uncounted(v) for v in vals) else None

    def _uncounted(self, v: Val) -> bool:
        """Whether it is made of positions, more of them than a table holds, or nobody knows how many."""
        used = {x for t in v.terms for x in self.space.vars(t.poly)}
        if not all(0 <= x < len(v.shape) and v.shape[x].is_const for x in used):
            return True
        return math.prod(int(v.shape[x].const) for x in used) > MAX_TABLE

    def _of_padded(
        self, op: Any, args: Sequence[Any], kwargs: dict[str, Any], out: torch.Tensor, dtypes: Sequence[Any]
    ) -> Val | None:
        """A function of data that is padded with a number of which it is zero, as the logarithm of gates and ones.

        It is that of the data, continued by zeros; None if it is something else.
        """
        if len(args) != 1 or not isinstance(args[0], Val) or args[0].single or args[0].shape != self.shape(out):
            return None
        v = args[0]
        if self.index_only(v):
            return None
        inside = [c for c in v.cases if any(t.accs for t in c.terms)]
        outside = {c.terms for c in v.cases if c not in inside}
        if len(inside) != 1 or len(outside) != 1 or not self._within_its_ends(inside[0], v.shape):
            return None
        (number,) = (value(v.shape, terms, precision=v.precision) for terms in outside)
        try:
            zero = self.pointwise(op, [number], kwargs, out, dtypes)
            if zero.terms:
                return None
            data = self.pointwise(op, [value(v.shape, inside[0].terms)], kwargs, out, dtypes).one
        except GiveUp:
            return None
        if data is None or len(data.accs) != 1 or data != Term(accs=data.accs):
            return None
        ((leaf, idx),) = data.accs
        return value(v.shape, [Term(accs=((self.leaves.extended(leaf), idx),))])

    def _within_its_ends(self, c: Case, shape: tuple[Aff, ...]) -> bool:
        """Whether a case is one entry of one tensor, wherever that has one."""
        if len(c.terms) != 1 or len(c.terms[0].accs) != 1 or c.terms[0] != Term(accs=c.terms[0].accs):
            return False
        ((leaf, idx),) = c.terms[0].accs
        ends = (g for i, n in zip(idx, self.leaf_shapes[leaf], strict=True) for g in (i, n - 1 - i))
        return self.prune(ends, shape) == self.prune(c.guards, shape)

    def detached(self, v: Val) -> Val:
        """``v`` with every factor detached, those of its weights too."""

        def access(a: Access) -> Access:
            kind = self.leaves[a[0]].kind
            if isinstance(kind, Table) or (isinstance(kind, Symbol) and kind.op is DETACH):
                return a
            return self._symbol(DETACH, [(a, None)], None)

        def mono(m: Mono) -> Mono:
            return tuple(sorted(map(access, m)))

        def term(t: Term) -> Term:
            lin = ((mono(m), f) for m, f in t.exp.lin)
            exp = Exponent.of(lin, (((mono(m), p), c) for (m, p), c in t.exp.sums))
            return t.but(accs=mono(t.accs), exp=exp)

        cases = tuple(Case(c.guards, self.merged(map(term, c.terms), v.shape)) for c in v.cases)
        alt, own = (None if t is None else term(t) for t in (v.alt, v.own))
        return replace(v, cases=cases, alt=alt, own=own)

    def log_terms(self, acc: Access) -> list[Term]:
        """The logarithm of a factor that must be positive; the match proves that, or demands it."""
        return [Term(c, accs=() if x is None else (x,)) for c, x in log_summands(self.leaves, acc)]
