"""Operands at all positions, where the program has nothing to be read at an end of which no result tells.

First differences, ``k_t - k_(t - 1)``, are one fewer than the tokens, and what they weigh leaves one token out. The
operator has all tokens, and gets zeros there.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace

import torch

from ...facts import Call, Expr
from ..domain.affine import Aff
from ..domain.exponent import Access, Mono, sub_access, sub_mono
from ..domain.space import Space
from ..prove.proof import N_ROLE, Proof
from .emit import CannotEmit, Emitter

Operand = Callable[[Emitter, Proof], Expr]
"""What an emitter makes of the accesses of a proof."""


class Positions:
    """The operands of one proof; ``emitter`` is called with its roles, and with those of one position less."""

    def __init__(self, space: Space, p: Proof, emitter: Callable[[Mapping[int, Aff]], Emitter]):
        self.space, self.p, self.emitter = space, p, emitter

    def of_queries(self, operand: Operand) -> Expr:
        """Where each row reads the sum up to the one before it, the first reads what came in alone."""
        return self._all(operand, first=self.p.later and self.p.state is None)

    def of_keys(self, operand: Operand) -> Expr:
        """Keys or values, of which then none reads the last."""
        return self._all(operand, last=self.p.later)

    def of_decays(self, operand: Operand) -> Expr:
        """Decays of tokens: the first one's weighs what came in alone, the last one's what no row reads any more."""
        p = self.p
        return self._all(operand, first=p.state is None and not p.delayed, last=p.later or p.delayed)

    def _all(self, operand: Operand, first: bool = False, last: bool = False) -> Expr:
        """An operand with zeros at an end that may be left out, where it cannot be read there."""
        p = self.p
        try:
            return operand(self.emitter(p.roles), p)
        except CannotEmit:
            if self.space.lower(p.roles[N_ROLE], {}) < 2:
                raise
            for end in [end for end, free in ((1, first), (0, last)) if free]:
                others = self._one_less(end)
                with suppress(CannotEmit):
                    expr = operand(self.emitter(others.roles), others)
                    return Call(torch.cat, ([no_row(expr), expr] if end else [expr, no_row(expr)], 2))
            raise

    def _one_less(self, start: int) -> Proof:
        """The accesses at the positions from ``start`` on, one less than all."""
        p, space, there = self.p, self.space, {N_ROLE: Aff.var(N_ROLE) + start}

        def accesses(of: list[Access]) -> list[Access]:
            return [sub_access(space, a, there) for a in of]

        def rates(of: list[tuple[Mono, float]]) -> list[tuple[Mono, float]]:
            return [(sub_mono(space, mono, there), c) for mono, c in of]

        return replace(
            p,
            roles={**p.roles, N_ROLE: p.roles[N_ROLE] - 1},
            q=accesses(p.q),
            k=accesses(p.k),
            v=accesses(p.v),
            q_weights=rates(p.q_weights),
            k_weights=rates(p.k_weights),
            tokens=rates(p.tokens),
        )


def rows(x: Expr, start: int | None, end: int | None) -> Expr:
    """Some positions of ``[B,H,N,D]``, or of ``[B,H,N]``."""
    return Call(operator.getitem, (x, (slice(None), slice(None), slice(start, end))))


def no_row(x: Expr) -> Expr:
    """Zeros for one position."""
    return Call(torch.zeros_like, (rows(x, 0, 1),))
