"""A sum of attentions, each with a recipe of its own: scores that are several products under one mask."""

from __future__ import annotations

import torch

from ..facts import Call, DecayedAttention, Expr
from .build import Builder
from .interpret import Fact
from .proof import Proof, Refused
from .prove import prove
from .roles import sequence_index
from .term import Term, value

MOST = 4
"""Attentions in one sum: of a loop whose pieces do not merge there are as many as pieces."""

Proved = tuple[Proof, DecayedAttention]


def prove_sum(builder: Builder, fact: Fact) -> tuple[list[Proved], Expr] | None:
    """The attentions that this value is the sum of, and the recipe of the sum; None if it is none.

    What is no sum over positions, a state that came in or a plain term, goes to the first attention that takes it.
    """
    if not fact.value.single:
        return None
    sums, rest = [], []
    for t in fact.value.terms:
        (sums if sequence_index(builder.engine, t) is not None else rest).append(t)
    if not 2 <= len(sums) <= MOST:
        return None
    proved: list[Proved] = []
    recipes: list[Expr] = []
    for t in sums:
        found = _alone(builder, fact, [t, *rest]) if rest else None
        if found is not None:
            rest = []
        elif (found := _alone(builder, fact, [t])) is None:
            return None
        proved.append(found[:2])
        recipes.append(found[2])
    if rest:
        return None
    total = recipes[0]
    for recipe in recipes[1:]:
        total = Call(torch.add, (total, recipe))
    return proved, total


def _alone(builder: Builder, fact: Fact, terms: list[Term]) -> tuple[Proof, DecayedAttention, Expr] | None:
    part = Fact(fact.node, value(fact.value.shape, terms), fact.tensor, fact.compute, fact.after)
    try:
        proof = prove(builder.engine, part, queries=False)
        return None if proof.is_part else (proof, *builder.build(proof))
    except Refused:
        return None
