"""Forms as a report says them: positions by their names, quotients as quotients, sizes as PyTorch calls them."""

from __future__ import annotations

from collections.abc import Mapping

from ..domain.affine import FIRST_DIV, FIRST_MIXED, FIRST_SYMBOL, Aff
from ..domain.space import JOIN, QUOTIENT
from ..engine import Engine


def spoken(engine: Engine, form: Aff, names: Mapping[int, str]) -> str:
    """``i-16*(j // 16)``, say; ``names`` are those of variables, of which others are called by their dimension."""
    return form.spelled(lambda v: _variable(engine, v, names))


def _variable(engine: Engine, v: int, names: Mapping[int, str]) -> str:
    if v in names:
        return names[v]
    space = engine.space
    if v >= FIRST_MIXED:
        kind, args = space.mixed[v]
        x, *more = (_in_brackets(engine, a, names) for a in args)
        if kind == JOIN:
            return f"({x} * {more[1]} + {more[0]})"
        return f"({x} {'//' if kind == QUOTIENT else '%'} {more[0]})"
    if v >= FIRST_DIV:
        inner, m = space.div_of[v]
        return f"({_in_brackets(engine, inner, names)} // {m})"
    if v >= FIRST_SYMBOL:
        return engine.sizes.name(v) or "a size"
    return f"dim{v}" if v >= 0 else f"index{-v}"


def _in_brackets(engine: Engine, form: Aff, names: Mapping[int, str]) -> str:
    text = spoken(engine, form, names)
    alone = form.is_const or (len(form.terms) == 1 and form.terms[0][1] == 1 and not form.const)
    return text if alone else f"({text})"
