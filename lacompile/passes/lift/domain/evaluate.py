"""The number a normal form stands for at one index: what every rule is checked against.

Deliberately naive (sums are loops): it shares no code with the rules it checks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from .affine import FIRST_DIV, FIRST_MIXED, TAU, Aff
from .exponent import Access, Mono
from .space import JOIN, QUOTIENT, Space
from .term import Term, Val

ReadLeaf = Callable[[int, tuple[int, ...]], float]


class Evaluator:
    """Evaluates values of one analysis, given numbers for the leaves and the symbolic sizes."""

    def __init__(self, space: Space, read: ReadLeaf, symbols: Mapping[int, int] | None = None):
        self.space = space
        self.read = read
        self.symbols = dict(symbols or {})

    def index(self, aff: Aff, env: Mapping[int, int]) -> float:
        total = aff.const
        for v, c in aff.terms:
            if v >= FIRST_MIXED:
                total += c * self._mixed(v, env)
            elif v >= FIRST_DIV:
                inner, m = self.space.div_of[v]
                total += c * (int(self.index(inner, env)) // m)
            else:
                total += c * (env[v] if v in env else self.symbols[v])
        return total

    def _mixed(self, v: int, env: Mapping[int, int]) -> int:
        kind, args = self.space.mixed[v]
        x, *more = (int(self.index(a, env)) for a in args)
        return x * more[1] + more[0] if kind == JOIN else x // more[0] if kind == QUOTIENT else x % more[0]

    def access(self, access: Access, env: Mapping[int, int]) -> float:
        leaf, idx = access
        return self.read(leaf, tuple(int(self.index(a, env)) for a in idx))

    def mono(self, mono: Mono, env: Mapping[int, int]) -> float:
        return math.prod(self.access(a, env) for a in mono)

    def value(self, val: Val, at: tuple[int, ...]) -> float:
        env = dict(enumerate(at))
        for case in val.cases:
            if all(self.index(g, env) >= 0 for g in case.guards):
                return sum(self.term(t, env) for t in case.terms)
        raise ValueError(f"no case covers index {at}")

    def term(self, term: Term, env: dict[int, int]) -> float:
        return self._sum(term, sorted(term.bound(self.space)), env)

    def _sum(self, term: Term, bound: list[int], env: dict[int, int]) -> float:
        if not bound:
            if not all(self.index(g, env) >= 0 for g in term.guards):
                return 0.0
            return self._product(term, env)
        # Innermost last: pick an index whose own range mentions no other unset one.
        for var in bound:
            low, high = -math.inf, math.inf
            for g in term.guards:
                c = g.coef(var)
                others = self.space.vars(g.without(var))
                if c and all(o in env or o in self.symbols for o in others):
                    rest = self.index(g.without(var), env)
                    if c > 0:
                        low = max(low, math.ceil(-rest / c))
                    else:
                        high = min(high, math.floor(rest / -c))
            if math.isfinite(low) and math.isfinite(high):
                rest_bound = [b for b in bound if b != var]
                total = 0.0
                for x in range(int(low), int(high) + 1):
                    total += self._sum(term, rest_bound, {**env, var: x})
                return total
        raise ValueError(f"a bound index of {term} has no range")

    def _product(self, term: Term, env: dict[int, int]) -> float:
        out = term.coef * self.index(term.poly, env)
        if out == 0:
            return 0.0
        for a in term.accs:
            out *= self.access(a, env)
        exponent = 0.0
        for mono, f in term.exp.lin:
            exponent += self.mono(mono, env) * self.index(f, env)
        for (mono, pos), c in term.exp.sums:
            end = int(self.index(pos, env))
            # P(x) for negative x continues the sum downwards; only differences of P ever matter.
            steps = range(end) if end >= 0 else range(end, 0)
            sign = 1 if end >= 0 else -1
            exponent += c * sign * sum(self.mono(mono, {**env, TAU: t}) for t in steps)
        return out * math.exp(exponent) if exponent else out
