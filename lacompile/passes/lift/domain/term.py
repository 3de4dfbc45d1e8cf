"""The normal form: what a tensor *is*, as a sum of guarded, exponentially weighted products of leaf accesses.

    term = coef * poly(idx) * prod leaf[affine(idx)] * exp(exponent)   on guards, 0 elsewhere, summed over bound indices

The value of a tensor is a list of *cases*: disjoint, covering regions of its index space, each with its own sum of
terms. Contractions live in one case (their guards sit in the terms); masks and log-space values keep several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

from .affine import ONE, TAU, Aff
from .exponent import NO_EXPONENT, Access, Exponent, show_mono, sub_access
from .space import Space


class Term:
    """One guarded, weighted product; see the module docstring. Immutable and hashed."""

    __slots__ = ("_hash", "_signature", "_told", "_vars", "accs", "coef", "exp", "guards", "poly")

    def __init__(
        self,
        coef: float = 1.0,
        poly: Aff = ONE,
        accs: tuple[Access, ...] = (),
        exp: Exponent = NO_EXPONENT,
        guards: Iterable[Aff] = (),
    ):
        if poly.is_const and poly.const != 1:
            coef, poly = coef * poly.const, ONE
        self.coef = float(coef)
        self.poly = poly
        self.accs = accs
        self.exp = exp
        self.guards: frozenset[Aff] = frozenset(guards)
        self._hash: int | None = None
        self._vars: frozenset[int] | None = None
        self._signature: tuple[int, ...] | None = None
        self._told: dict[Callable[[Term], bool], bool] = {}

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash((self.coef, self.poly, self.accs, self.exp, self.guards))
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return (
            isinstance(other, Term)
            and self.coef == other.coef
            and self.accs == other.accs
            and self.guards == other.guards
            and self.exp == other.exp
            and self.poly == other.poly
        )

    @property
    def body(self) -> tuple[Aff, tuple[Access, ...], Exponent]:
        """Everything but the coefficient and the guards."""
        return (self.poly, self.accs, self.exp)

    @property
    def signature(self) -> tuple[int, ...]:
        """The leaves of the product."""
        if self._signature is None:
            self._signature = tuple([leaf for leaf, _ in self.accs])
        return self._signature

    @property
    def is_product(self) -> bool:
        """Of two factors at least, of which exp of plain data is one."""
        return len(self.accs) + sum(bool(m) and f.is_const for m, f in self.exp.lin if self.accs) >= 2

    @property
    def leaves(self) -> Iterator[int]:
        """Those of the factors, and of the weight."""
        return (leaf for accs in (self.accs, *self.exp.monos) for leaf, _ in accs)

    def but(self, **changes: Any) -> Term:
        get = changes.get
        return Term(
            get("coef", self.coef),
            get("poly", self.poly),
            get("accs", self.accs),
            get("exp", self.exp),
            get("guards", self.guards),
        )

    def factors(self) -> list[Aff]:
        """Every affine form but the guards."""
        out = [self.poly]
        for _, idx in self.accs:
            out += idx
        if self.exp:
            out += self.exp.affs()
        return out

    def affs(self) -> list[Aff]:
        return [*self.factors(), *self.guards]

    def vars(self, space: Space) -> frozenset[int]:
        if self._vars is None:
            self._vars = space.vars_of(self.affs()) - {TAU}
        return self._vars

    def bound(self, space: Space) -> frozenset[int]:
        """The indices that are summed over."""
        return frozenset([v for v in self.vars(space) if v < 0])

    def told(self, ask: Callable[[Term], bool]) -> bool:
        """The answer of ``ask``, which an analysis asks of each term, and of a term but once."""
        if ask not in self._told:
            self._told[ask] = ask(self)
        return self._told[ask]

    def sub(self, space: Space, mapping: Mapping[int, Aff]) -> Term:
        if not mapping:
            return self
        return Term(
            self.coef,
            space.sub(self.poly, mapping),
            tuple(sub_access(space, a, mapping) for a in self.accs),
            self.exp.sub(space, mapping),
            (space.sub(g, mapping) for g in self.guards),
        )

    def __repr__(self) -> str:
        parts = [f"{self.coef:g}"]
        if self.poly != ONE:
            parts.append(f"({self.poly})")
        parts += [show_mono((a,)) for a in self.accs]
        if self.exp:
            parts.append(f"exp({self.exp})")
        return " ".join(parts) + (f" on {sorted(self.guards)}" if self.guards else "")


Guards = frozenset[Aff]
NO_GUARDS: Guards = frozenset()


@dataclass(frozen=True)
class Case:
    """The value on the region where all ``guards`` (over free dimensions only) hold."""

    guards: Guards
    terms: tuple[Term, ...]


class Precision(IntEnum):
    """How the program's numbers relate to the normal form's, where positions and known numbers are concerned.

    EXACT: they are the same. SIGN: they are zero together, and of one sign. ROUNDED: they differ by rounding.
    """

    ROUNDED = 0
    SIGN = 1
    EXACT = 2


@dataclass(frozen=True)
class Val:
    """The value of one tensor.

    ``alt`` is a second reading of the same tensor as a plain access of one leaf: a product of two plain tensors can be
    looked into (q k^T) or taken as it is (a projection), and only the consumer knows which is wanted.

    ``own`` is the value of the graph that holds the tensor, as one access, where a consumer may prefer it.

    ``rounded`` stands for the program's own numbers, where rounding may have changed them: two values of one shape that
    have the same one hold the same numbers.
    """

    shape: tuple[Aff, ...]
    cases: tuple[Case, ...]
    alt: Term | None = None
    precision: Precision = Precision.ROUNDED
    own: Term | None = None
    rounded: object | None = field(default=None, compare=False)

    @property
    def terms(self) -> tuple[Term, ...]:
        """The terms of a single-case value."""
        assert len(self.cases) == 1, "value has several cases"
        return self.cases[0].terms

    @property
    def single(self) -> bool:
        return len(self.cases) == 1

    @property
    def one(self) -> Term | None:
        """The only term of the only case, if that is what the value is."""
        return self.cases[0].terms[0] if self.single and len(self.cases[0].terms) == 1 else None

    @property
    def number(self) -> float | None:
        """The number that every entry is, if they are one."""
        return number_of(self.terms) if self.single else None

    @property
    def taken(self) -> Term | None:
        """The value as it is where it may be taken so, else its only term."""
        return self.one if self.alt is None else self.alt

    def with_terms(self, f: Callable[[Term], Term]) -> Val:
        return replace(
            self,
            cases=tuple(Case(c.guards, tuple(f(t) for t in c.terms)) for c in self.cases),
            alt=None if self.alt is None else f(self.alt),
            own=None if self.own is None else f(self.own),
            rounded=None,
        )


def number_of(terms: tuple[Term, ...]) -> float | None:
    """The number, perhaps infinite, that a sum is; None if it is none."""
    if len(terms) > 1:
        return None
    t = terms[0] if terms else Term(0.0)
    return t.coef if not t.accs and not t.exp and not t.guards and t.poly == ONE else None


def value(
    shape: Iterable[Aff],
    terms: Iterable[Term],
    alt: Term | None = None,
    precision: Precision = Precision.ROUNDED,
) -> Val:
    """A single-case value."""
    return Val(tuple(shape), (Case(NO_GUARDS, tuple(terms)),), alt, precision)


def constant(shape: Iterable[Aff], c: float) -> Val:
    """A number that the program gives."""
    return value(shape, (Term(c),) if c != 0 else (), precision=Precision.EXACT)
