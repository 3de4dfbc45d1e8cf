"""Values that are the state after the last position: the second output of an attention that was proved already."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import fx

from ...facts import Attend, Call, DecayedAttention, Expr, Match, attentions_of
from ..domain.affine import ONE, TAU, ZERO, Aff
from ..domain.exponent import Exponent, sub_access
from ..domain.leaves import NINE_DIGITS
from ..domain.prefix import between, counted_from
from ..domain.term import Term
from ..engine import Engine
from ..interpret import Known
from ..normal.weights import as_update
from ..prove.proof import D_ROLE, E_ROLE, N_ROLE, Proof, Refused
from ..prove.roles import sequence_index
from ..prove.step import prove_step
from .builder import Builder, Proved
from .emit import CannotEmit, permuted, size_of


def looks_like_state(engine: Engine, known: Known) -> bool:
    """A weighted sum of outer products over all positions, or a state and one update: no position is left."""
    if not known.value.single or prove_step(engine, known, known.value.terms) is not None:
        return False
    if len(known.value.terms) == 2 and not any(t.bound(engine.space) for t in known.value.terms):
        return True
    return any(t.bound(engine.space) and sequence_index(engine, t) is None for t in known.value.terms) and not any(
        sequence_index(engine, t) is not None for t in known.value.terms
    )


def final_states(builder: Builder, states: Sequence[Known], proofs: Sequence[Proved]) -> list[Match]:
    """Those of these values that are the last state of an attention that was proved."""
    out: list[Match] = []
    by_leaf: dict[int | None, list[Proved]] = {}
    for proof, attention in proofs:
        # the keys and values of an attention are factors of its state, whatever else is one
        leaf = next((leaf for leaf, _ in (*proof.v, *proof.k)), None)
        by_leaf.setdefault(leaf, []).append((proof, attention))
    for known in states:
        held = dict.fromkeys(leaf for c in known.value.cases for t in c.terms for leaf, _ in t.accs)
        for proof, attention in (found for leaf in (*held, None) for found in by_leaf.get(leaf, ())):
            there = _in_the_mode_of(builder, known, proof.known.node)
            expr = None if there is None else final_state(builder.engine, there, proof, attention)
            if there is not None and expr is not None:
                with suppress(Refused):  # the loop's own last state is as right
                    if _requires_grad(proof.known.node) and not _requires_grad(there.node):
                        expr = Call(torch.Tensor.detach, (expr,))
                    assumed = builder.assumptions.of_state(there.node, expr, proof)
                    out.append(Match(there.node, expr, attentions_of(expr), there.after, assumptions=assumed))
                    break
    return out


def _requires_grad(node: fx.Node) -> bool:
    example = node.meta.get("example_value")
    return isinstance(example, torch.Tensor) and example.requires_grad


def _in_the_mode_of(builder: Builder, state: Known, attention: fx.Node) -> Known | None:
    """The state where gradients are recorded if and only if they are for the attention: one call computes both.

    What a cache keeps is often copied without gradients; then it is what was copied.
    """
    known, recorded = builder.interpreter.known, builder.schedule.records_gradients
    while recorded[state.node] != recorded[attention]:
        before = (known.get(n) for n in builder.interpreter.sources(state.node))
        same = next((f for f in before if f is not None and f.value.cases == state.value.cases), None)
        if same is None:
            return None
        state = same
    return state


def final_state(engine: Engine, known: Known, p: Proof, attention: DecayedAttention) -> Expr | None:
    """``known`` as the state after the last position of a proved attention; None if it is not that state."""
    shape = known.value.shape
    real = [d for d in range(len(shape)) if shape[d] != ONE]
    features = len(p.key_features)
    has_e = E_ROLE in p.roles and p.roles[E_ROLE] != ONE
    if features > 1 or not known.value.single:
        return None
    last = p.roles[N_ROLE] - 1
    for d in real if features and p.roles[D_ROLE] != ONE else [None]:
        for e in [x for x in real if x != d] if has_e else [None]:
            batch = [x for x in range(len(shape)) if x not in (d, e)]
            want = [r for r in p.batch_like if p.roles[r] != ONE]
            have = [x for x in batch if shape[x] != ONE]
            if [p.roles[r] for r in want] != [shape[x] for x in have]:
                continue
            rename = {x: Aff.var(r) for r, x in zip(want, have, strict=True)}
            if d is not None:
                if shape[d] != p.roles[D_ROLE]:
                    continue
                rename[d] = Aff.var(D_ROLE)
            if e is not None:
                if shape[e] != p.roles[E_ROLE]:
                    continue
                rename[e] = Aff.var(E_ROLE)
            times = _multiple_of_state(engine, known, p, rename, last)
            if times is not None:
                heads, rest = p.head_roles(engine.space)
                place = dict(zip(want, have, strict=True))
                order = [place[r] for r in (*rest, *heads) if r in place]
                expr = _state_expr(engine, attention, shape, order, d, e)
                return expr if expr is None or abs(times - 1) <= NINE_DIGITS else Call(torch.mul, (expr, times))
    return None


def _multiple_of_state(engine: Engine, known: Known, p: Proof, rename: dict[int, Aff], last: Aff) -> float | None:
    """The number times the operator's final state that ``known`` is; None if it is none."""
    space = engine.space
    sums: list[float] = []  # what the sum over positions is multiplied by; at most one
    starts: list[float] = []  # what the initial state is multiplied by

    def multiple(t: Term, weight: Exponent, mapping: dict[int, Aff]) -> float | None:
        apart = (t.exp.sub(space, mapping) - weight).number
        return None if apart is None else t.coef * math.exp(apart)

    terms = known.value.terms
    end = last if p.delayed else last + 1
    for t in as_update(space, engine.leaves, known.value.shape, terms) if p.roles[N_ROLE] == ONE else terms:
        bound = t.bound(space)
        if not t.poly.is_const:
            return None
        t = counted_from(space, t, p.first, bound)
        accs = sorted(sub_access(space, a, rename) for a in t.accs)
        if not bound:
            if t.guards:
                return None
            if p.state is not None and not starts and accs == sorted(p.state):
                found, into = multiple(t, _decay_over(p, end, ZERO), rename), starts
                found = None if found is None else found / p.state_number
            elif p.roles[N_ROLE] == ONE and not sums and accs == sorted([*p.k, *p.v]):
                found, into = multiple(t, Exponent(), rename), sums
            else:
                return None
        else:
            if len(bound) != 1 or sums:
                return None
            (j,) = bound
            rename_j = {**rename, j: Aff.var(N_ROLE)}
            accs = sorted(sub_access(space, a, rename_j) for a in t.accs)
            if t.guards != {Aff.var(j), last - Aff.var(j)} or accs != sorted([*p.k, *p.v]):
                return None
            weight = _decay_over(p, end, Aff.var(N_ROLE) + int(not p.delayed))
            for mono, c in p.k_weights:
                weight = weight + Exponent.of([(mono, Aff.lit(c))], ())
            found, into = multiple(t, weight, rename_j), sums
        if found is None:
            return None
        into.append(found)
    if not sums or bool(starts) != (p.state is not None):
        return None
    of_sum = sums[0] / p.key_scale
    return of_sum if all(abs(x - of_sum) <= NINE_DIGITS * abs(of_sum) for x in starts) else None


def _decay_over(p: Proof, end: Aff, start: Aff) -> Exponent:
    """G(end) - G(start) in prefix-sum positions."""
    lin = [(mono, (end - start) * c) for mono, c in p.fixed]
    sums = []
    for mono, c in p.tokens:
        running = tuple(
            sorted(
                (leaf, tuple(a.without(N_ROLE) + Aff.var(TAU) * a.coef(N_ROLE) if a.coef(N_ROLE) else a for a in idx))
                for leaf, idx in mono
            )
        )
        sums += between(running, start, end, c)
    return Exponent.of(lin, sums)


def _state_expr(
    engine: Engine,
    attention: DecayedAttention,
    shape: Sequence[Aff],
    order: Sequence[int],
    d: int | None,
    e: int | None,
) -> Expr | None:
    """The operator's second output in the dimensions of the value it replaces.

    ``order`` are those of batch and heads, as they follow each other in the operator's output.
    """
    tail = [x for x in (d, e) if x is not None]
    expr: Expr = Attend(attention, 1)
    try:
        sizes = [size_of(engine, shape[x]) for x in (*order, *tail)]
    except CannotEmit:
        return None
    expr = Call(torch.reshape, (expr, sizes))
    dims = [*order, *tail]
    expr = permuted(expr, sorted(range(len(dims)), key=lambda n: dims[n]))
    for x, n in enumerate(shape):
        if n == ONE:
            expr = Call(torch.unsqueeze, (expr, x))
    return expr
