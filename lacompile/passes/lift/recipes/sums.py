"""A sum of attentions, each with a recipe of its own: scores that are several products under one mask."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import torch

from ...facts import Call, DecayedAttention, Expr
from ..domain.affine import Aff
from ..domain.exponent import Access
from ..domain.term import Term, value
from ..interpret import Known
from ..prove.fragments import is_part
from ..prove.obligations import prove
from ..prove.proof import D_ROLE, E_ROLE, N_ROLE, Proof, Refused
from ..prove.roles import sequence_index
from .builder import Builder, Proved
from .first_rows import from_the_first_row

MOST = 4
"""Attentions in one sum: of a loop whose pieces do not merge there are as many as pieces."""


def prove_sum(builder: Builder, known: Known) -> tuple[list[Proved], Expr] | None:
    """The attentions that this value is the sum of, and the recipe of the sum; None if it is none.

    What is no sum over positions, a state that came in or a plain term, goes each to the first attention that takes it.
    """
    if not known.value.single:
        return None
    sums, rest = [], []
    for t in from_the_first_row(builder.engine, known.value.shape, known.value.terms):
        (sums if sequence_index(builder.engine, t) is not None else rest).append(t)
    if not 2 <= len(sums) <= MOST:
        return None
    proved: list[Proved] = []
    recipes: list[Expr] = []
    for t in sums:
        found, taken = _alone(builder, known, [t]), [t]
        for other in rest:
            if (more := _alone(builder, known, [*taken, other])) is not None:
                found, taken = more, [*taken, other]
        if found is None:
            return None
        rest = [x for x in rest if x not in taken]
        proved.append(found[:2])
        recipes.append(found[2])
    proofs = [p for p, _ in proved]
    if rest or _one_operand_apart(proofs) or not all(any(_read(x) and x.v == p.v for x in proofs) for p in proofs):
        return None
    total = recipes[0]
    for recipe in recipes[1:]:
        total = Call(torch.add, (total, recipe))
    return proved, total


def _read(p: Proof) -> bool:
    """Whether queries read it: by itself a plain sum is none of these."""
    return bool(p.q or p.q_weights)


def _one_operand_apart(proofs: list[Proof]) -> bool:
    """Whether two differ in their queries or in their keys alone, or in numbers that either is multiplied by.

    The sum of these would be one attention.
    """

    def tensors(p: Proof) -> tuple[Any, Any, Any]:
        q, k, v = (sorted(map(_place, filter(_of_tokens, accs))) for accs in ((*p.q, *p.outer), p.k, p.v))
        return (q, p.q_weights, p.outer_weights), (k, p.k_weights), (v, p.fixed, p.tokens)

    return any(
        x[2] == y[2] and (x[0] == y[0] or x[1] == y[1]) for x, y in combinations([tensors(p) for p in proofs], 2)
    )


def _of_tokens(a: Access) -> bool:
    return any(i.coef(N_ROLE) for i in a[1])


def _place(a: Access) -> Access:
    """An access without its features, of which each attention has its own: what part of the tensor it reads."""
    return a[0], tuple(Aff(tuple(t for t in i.terms if not D_ROLE <= t[0] < E_ROLE), i.const) for i in a[1])


def _alone(builder: Builder, known: Known, terms: list[Term]) -> tuple[Proof, DecayedAttention, Expr] | None:
    part = replace(known, value=value(known.value.shape, terms))
    try:
        proof = prove(builder.engine, part, queries=False)
        return None if is_part(builder.engine.space, proof) else (proof, *builder.build(proof))
    except Refused:
        return None
