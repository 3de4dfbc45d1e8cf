"""Accesses of leaves, products of them, and exponents made of these: what a term is weighed by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import is_

from .affine import Aff, Number
from .space import Space

Access = tuple[int, tuple[Aff, ...]]
"""(leaf id, one index per leaf dimension)."""

Mono = tuple[Access, ...]
"""A product of leaf accesses, sorted. In a prefix sum the running position is the variable TAU."""


class Exponent:
    """``sum mono * aff  +  sum coef * P_mono(pos)`` where ``P_mono(x) = sum_{t < x} mono(t)``.

    ``lin`` holds fixed decays (g[h] * (i - j)), ``sums`` holds per-token ones (P(i+1) - P(j+1)). The empty mono is 1.
    """

    __slots__ = ("_hash", "lin", "sums")

    def __init__(self, lin: tuple[tuple[Mono, Aff], ...] = (), sums: tuple[tuple[tuple[Mono, Aff], Number], ...] = ()):
        self.lin = lin
        self.sums = sums
        self._hash: int | None = None

    @staticmethod
    def of(lin: Iterable[tuple[Mono, Aff]], sums: Iterable[tuple[tuple[Mono, Aff], Number]]) -> Exponent:
        a: dict[Mono, Aff] = {}
        for mono, aff in lin:
            a[mono] = a[mono] + aff if mono in a else aff
        b: dict[tuple[Mono, Aff], Number] = {}
        for key, c in sums:
            b[key] = b.get(key, 0) + c
        return Exponent(
            tuple(sorted((m, f) for m, f in a.items() if f.terms or f.const)),
            tuple(sorted((k, c) for k, c in b.items() if abs(c) > 1e-12 and (k[1].terms or k[1].const))),
        )

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash((self.lin, self.sums))
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Exponent) and self.lin == other.lin and self.sums == other.sums

    def __bool__(self) -> bool:
        return bool(self.lin or self.sums)

    def __lt__(self, other: Exponent) -> bool:
        return (self.lin, self.sums) < (other.lin, other.sums)

    def __add__(self, other: Exponent) -> Exponent:
        if not other:
            return self
        if not self:
            return other
        return Exponent.of((*self.lin, *other.lin), (*self.sums, *other.sums))

    def __mul__(self, k: Number) -> Exponent:
        return Exponent.of(((m, f * k) for m, f in self.lin), ((key, c * k) for key, c in self.sums))

    def __sub__(self, other: Exponent) -> Exponent:
        return self + other * -1

    @property
    def number(self) -> float | None:
        """The number that this is everywhere; None if it is not one."""
        if self.sums or any(m or f.terms for m, f in self.lin):
            return None
        return float(sum(f.const for _, f in self.lin))

    def sub(self, space: Space, mapping: Mapping[int, Aff]) -> Exponent:
        if not self:
            return self
        lin = [(sub_mono(space, m, mapping), space.sub(f, mapping)) for m, f in self.lin]
        sums = [((sub_mono(space, m, mapping), space.sub(p, mapping)), c) for (m, p), c in self.sums]
        same = all(m is n and f is h for (m, f), (n, h) in zip(lin, self.lin, strict=True)) and all(
            m is n and p is r for ((m, p), _), ((n, r), _) in zip(sums, self.sums, strict=True)
        )
        return self if same else Exponent.of(lin, sums)

    @property
    def monos(self) -> Iterable[Mono]:
        """The rates, whether fixed or summed over positions."""
        return (*(m for m, _ in self.lin), *(m for (m, _), _ in self.sums))

    def affs(self) -> list[Aff]:
        """Every affine form mentioned, those inside monomials included."""
        out: list[Aff] = []
        for mono, f in (*self.lin, *(key for key, _ in self.sums)):
            out.append(f)
            for _, idx in mono:
                out += idx
        return out

    def __repr__(self) -> str:
        parts = [f"{show_mono(m)}*({f})" for m, f in self.lin]
        parts += [f"{'+' if c == 1 else '-' if c == -1 else f'{c}*'}P[{show_mono(m)}]({p})" for (m, p), c in self.sums]
        return " ".join(parts)


def sub_access(space: Space, access: Access, mapping: Mapping[int, Aff]) -> Access:
    idx = tuple([space.sub(a, mapping) for a in access[1]])
    return access if all(map(is_, idx, access[1])) else (access[0], idx)


def sub_mono(space: Space, mono: Mono, mapping: Mapping[int, Aff]) -> Mono:
    moved = [sub_access(space, a, mapping) for a in mono]
    return mono if all(map(is_, moved, mono)) else tuple(sorted(moved))


def show_mono(mono: Mono) -> str:
    return "*".join(f"L{leaf}[{','.join(map(str, idx))}]" for leaf, idx in mono) or "1"


NO_EXPONENT = Exponent()
