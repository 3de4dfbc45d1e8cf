"""Symbolic sizes of the traced program as affine forms, and what its guards say about them.

A guard holds in every run of the compiled program, so it may be used as a fact. None is added.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import sympy

from .affine import INF, ZERO, Aff, Number
from .space import Space

QUOTIENTS = ("FloorDiv", "CleanDiv")
REMAINDERS = ("Mod", "PythonMod")
ENDS = {"Min": 1, "Max": -1}
UNBOUNDED = 2**40


class Sizes:
    """The sizes of one analysis: PyTorch's expressions to forms over its variables."""

    def __init__(self, space: Space, taken_for: Mapping[Any, Any]) -> None:
        self.space = space
        self._taken_for = taken_for  # symbols, and the symbol or the number that each is taken for
        self._known: dict[Any, Aff] = {}
        self._equal: dict[Any, Any] | None = None  # an expression -> a simpler one of the same value
        self._divisor: dict[Any, int] = {}  # a size -> a number that divides it
        self._within: dict[Any, tuple[Number, Number]] = {}  # a size -> its least and its largest value
        self._counted: set[Any] = set()  # sizes of which so many chunks are known

    def __call__(self, expr: Any, env: Any) -> Aff:
        """The affine form of an expression of PyTorch's shape environment ``env``."""
        found = self._known.get(expr)
        if found is None:
            if self._equal is None:
                self._equal = {a: sympy.sympify(b) for a, b in self._taken_for.items()}
                self._learn(getattr(env, "guards", ()))
            found = self._known[expr] = self._made(expr, env)
        return found

    @property
    def confined(self) -> set[Any]:
        """Sizes of which the guards leave a few numbers, as of so many chunks, the last of which may not be whole."""
        return {size for size in self._counted if size not in self._known or not self._known[size].is_const}

    def name(self, v: int) -> str | None:
        """What PyTorch calls the size that a variable is."""
        return next((str(expr) for expr, form in self._known.items() if form == Aff.var(v)), None)

    def _made(self, expr: Any, env: Any) -> Aff:
        assert self._equal is not None
        if expr.is_Integer:
            return Aff.lit(int(expr))
        if expr in self._equal:
            return self(self._equal[expr], env)
        if isinstance(expr, sympy.Add):
            return sum((self(arg, env) for arg in expr.args), ZERO)
        if isinstance(expr, sympy.Mul):
            out = Aff.lit(1)
            for arg in expr.args:
                out = self.space.times(out, self(arg, env))
            return out
        if isinstance(expr, sympy.Pow) and expr.args[1].is_Integer and expr.args[1] > 0:
            out = base = self(expr.args[0], env)
            for _ in range(int(expr.args[1]) - 1):
                out = self.space.times(out, base)
            return out
        name = type(expr).__name__
        if name in QUOTIENTS:
            inner, m = self(expr.args[0], env), self(expr.args[1], env)
            exact = self.space.divided(inner, m)
            if exact is not None:
                return exact
            if m.is_const and m.const > 0:
                return self.space.floordiv(inner, int(m.const))
        if name in REMAINDERS and expr.args[1].is_Integer and expr.args[1] > 0:
            inner, m = self(expr.args[0], env), int(expr.args[1])
            return inner - self.space.floordiv(inner, m) * m
        if name in ENDS:
            forms = [self(arg, env) for arg in expr.args]
            for form in forms:
                if all(self._is_end(ENDS[name], form, other) for other in forms):
                    return form
        return self._variable(expr, env, self._divisor.get(expr, 1))

    def _is_end(self, side: int, form: Aff, other: Aff) -> bool:
        return self.space.lower((other - form) * side, {}) >= 0

    def _variable(self, expr: Any, env: Any, divisor: int) -> Aff:
        bounds = env.bound_sympy(expr)
        low: Number = int(bounds.lower) if bounds.lower.is_Integer else -INF
        high: Number = int(bounds.upper) if bounds.upper.is_Integer and bounds.upper < UNBOUNDED else INF
        least, most = self._within.get(expr, (-INF, INF))
        low, high = max(low, least), min(high, most)
        low = -(-low // divisor) if math.isfinite(low) else low
        high = high // divisor if math.isfinite(high) else high
        if low == high:  # as many chunks of whole tokens as a loop was traced for
            return Aff.lit(int(low) * divisor)
        return Aff.var(self.space.symbol(low, high)) * divisor

    def _learn(self, guards: Any) -> None:
        """Equations among the guards; ``a mod m = 0`` and ``a // m = k`` say that k m is a.

        The latter says where a is, too: as many chunks as a loop was traced for have so many tokens.
        """
        assert self._equal is not None
        whole: list[tuple[Any, Any]] = []
        for guard in guards:
            expr = guard.expr.xreplace(self._equal) if self._taken_for else guard.expr
            if not isinstance(expr, sympy.Eq):
                continue
            for left, right in (expr.args, reversed(expr.args)):
                if type(left).__name__ in REMAINDERS and right == 0:
                    whole.append((left.args[0], left.args[1]))
                elif type(left).__name__ in QUOTIENTS and (right.is_Integer or right.is_Symbol):
                    self._equal[left] = right
                    if right.is_Integer and left.args[1].is_Integer:
                        self._lies(left.args[0], left.args[1], right)
        for a, m in whole:
            self._divides(a, m)
            for quotient, k in self._equal.items():
                if quotient.args == (a, m) and k.is_Integer and type(m).__name__ in QUOTIENTS and m.args == (a, k):
                    self._divides(a, k)

    def _lies(self, a: Any, m: Any, k: Any) -> None:
        """``a // m = k`` for ``a = c s + d`` with a size s: ``m k <= a <= m k + m - 1``."""
        m, k = int(m), int(k)
        if m <= 0 or len(a.free_symbols) != 1:
            return
        (size,) = a.free_symbols
        self._counted.add(size)
        d = a - (c := a.coeff(size)) * size
        if not (c.is_Integer and d.is_Integer and c > 0):
            return
        low, high, c, d = *self._within.get(size, (-INF, INF)), int(c), int(d)
        least, most = -(-(m * k - d) // c), (m * k + m - 1 - d) // c
        self._within[size] = max(low, least), min(high, most)

    def _divides(self, a: Any, m: Any) -> None:
        if a.is_Symbol and m.is_Integer:
            self._divisor[a] = math.lcm(self._divisor.get(a, 1), int(m))
