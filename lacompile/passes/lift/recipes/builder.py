"""From a proof to the recipe that replaces its target."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from ...facts import Attend, Call, DecayedAttention, Expr, Progress, values_of
from ...graph.schedule import Schedule
from ..domain.affine import ONE, Aff
from ..domain.exponent import Access
from ..domain.kinds import Opaque
from ..domain.term import Term
from ..interpret import Interpreter, Known
from ..prove.obligations import prove
from ..prove.proof import E_ROLE, N_ROLE, Proof, Refused, unbounded
from .assumptions import Assumptions
from .described import formulation, source
from .emit import CannotEmit, Emitter, Piece, permuted, size_of
from .holders import Holders, Place
from .positions import Positions, no_row, rows

MOST_PRODUCTS = 256

Proved = tuple[Proof, DecayedAttention]
"""What was proved of a value, and the attention that a recipe computes of it."""


class Builder:
    """Turns a proof into the recipe that replaces its target."""

    def __init__(self, schedule: Schedule, interpreter: Interpreter, held: Holders):
        self.schedule, self.interpreter, self.engine, self.held = schedule, interpreter, interpreter.engine, held
        self.assumptions = Assumptions(schedule, interpreter)
        self.sums: dict[tuple[int, fx.Node], Expr] = {}

    def build(self, p: Proof) -> tuple[DecayedAttention, Expr]:
        """The attention and the replacement.

        Raises:
            Refused: a factor cannot be read off the graph.
        """
        try:
            return self._build(p)
        except CannotEmit as e:
            raise Refused("emission", e.expected, e.found, Progress.RECIPE) from None

    def _build(self, p: Proof) -> tuple[DecayedAttention, Expr]:
        everything = [*p.q, *p.k, *p.v, *p.outer, *(p.state or ())]
        for mono, _ in (*p.q_weights, *p.k_weights, *p.outer_weights, *p.fixed, *p.tokens):
            everything += mono
        target_of = {d: Aff.var(r) for r, d in p.place.items() if p.known.value.shape[d] != ONE}
        residual = [t.sub(self.engine.space, target_of) for t in p.residual]
        for t in residual:
            everything += t.accs
            everything += [a for mono, _ in t.exp.lin for a in mono]
        held = self.held.readable(self.schedule.records_gradients[p.known.node])
        rates = [a for m, _ in (*p.q_weights, *p.fixed, *p.tokens) for a in m]
        like = self._some_node([*p.q, *rates, *p.k, *p.v], held)
        dtype = p.known.compute

        def emitter(roles: Mapping[int, Aff]) -> Emitter:
            formats = dtype, _exact(dtype)
            return Emitter(self.engine, roles, everything, held, like, *formats, lambda leaf: self._sum(leaf, p.known))

        self.emitter, positions = emitter(p.roles), Positions(self.engine.space, p, emitter)
        heads, batch = p.head_roles(self.engine.space)
        dk = self._length(p, p.key_features)
        if len(p.key_features) > 1 and isinstance(dk, int) and dk > MOST_PRODUCTS:
            raise Refused(
                "separable",
                f"at most {MOST_PRODUCTS} products of features",
                f"{dk} of them",
                Progress.FACTORS,
                "a power of scores, or a product of sums, has a feature for each product of theirs: a tensor larger "
                "than what it would replace",
            )
        groups_q = [batch, heads, [N_ROLE], p.key_features]
        e_group = [E_ROLE] if E_ROLE in p.roles else []
        dv = self._length(p, e_group)
        shared = not p.later or p.state is None
        q = positions.of_queries(lambda e, at: e.operand(at.q, at.q_weights, groups_q, dtype, shared))
        k = positions.of_keys(lambda e, at: e.operand(at.k, at.k_weights, groups_q, dtype))
        if p.key_scale != 1:
            k = Call(torch.mul, (k, p.key_scale))
        v = positions.of_keys(lambda e, at: e.operand(at.v, [], [batch, heads, [N_ROLE], e_group], dtype))
        log_decay = positions.of_decays(lambda e, at: _log_decay(e, at, batch, heads))
        if p.delayed:
            log_decay = Call(torch.cat, ([no_row(log_decay), rows(log_decay, 0, -1)], 2))
        state = None
        if p.state is not None:
            piece = self.emitter.product(p.state) or self.emitter.numbers.constant(p.state_number, _exact(dtype))
            state = self.emitter.assemble(piece.to(_exact(dtype)), [batch, heads, p.key_features, e_group])
        row_factor, added = self._around(p, residual)
        recipes = [e for e in (q, k, v, log_decay, state, row_factor, *added) if isinstance(e, Expr)]
        read = {v.node for e in recipes for v in values_of(e)}
        region = self.assumptions.region(p.known.node, read)
        if any(self.engine.exponentials[x].isdisjoint(region | read) for x in p.overflowing):
            raise unbounded()
        written = formulation(p, region)
        if written != "parallel" and not p.key_features and dv == 1:
            # a prefix sum or a loop of each channel by itself, which an operator of as many heads only slows down
            raise Refused(
                "separable", "queries and keys", "an elementwise recurrence, without queries and keys", Progress.NAMED
            )
        attention = DecayedAttention(
            q=Call(torch.cat, ([rows(q, 1, None), no_row(q)], 2)) if p.later else q,
            k=k,
            v=v,
            log_decay=log_decay,
            scale=p.scale,
            initial_state=state,
            batch=self._length(p, batch),
            heads=self._length(p, heads),
            length=self._length(p, [N_ROLE]),
            dk=dk,
            dv=dv,
            dtype=dtype,
            decay_per_token=bool(p.tokens),
            formulation=written,
            decay_source=self._decay_source(p),
            assumptions=self.assumptions.of(p, read, region),
        )
        out: Expr = self._one_later(p, attention, q) if p.later else Attend(attention, 0)
        return attention, self._replacement(p, out, batch, heads, e_group, row_factor, added)

    def _one_later(self, p: Proof, attention: DecayedAttention, q: Expr) -> Expr:
        """What each position reads of the sum up to the one before it: the first nothing, or what came in."""
        out = rows(Attend(attention, 0), 0, -1)
        if attention.initial_state is None:
            return Call(torch.cat, ([no_row(Attend(attention, 0)), out], 2))
        first = Call(torch.Tensor.to, (rows(q, 0, 1), _exact(attention.dtype)))
        read = Call(torch.mul, (Call(torch.matmul, (first, attention.initial_state)), p.scale))
        return Call(torch.cat, ([Call(torch.Tensor.to, (read, attention.dtype)), out], 2))

    def _sum(self, leaf: int, inside: Known) -> Expr:
        """A sum that no node holds, as the attention that it is."""
        if (leaf, inside.node) not in self.sums:
            found = self.engine.leaves[leaf]
            assert isinstance(found.kind, Opaque) and found.kind.reading is not None and found.kind.compute is not None
            known = replace(inside, value=found.kind.reading, compute=found.kind.compute)
            proof = prove(self.engine, known)
            _, expr = Builder(self.schedule, self.interpreter, self.held).build(proof)
            if found.dtype != known.compute or proof.residual or proof.outer or proof.outer_weights:
                expr = Call(torch.Tensor.to, (expr, found.dtype))
            self.sums[leaf, inside.node] = expr
        return self.sums[leaf, inside.node]

    def _length(self, p: Proof, roles: Sequence[int]) -> Any:
        total: Any = 1
        for r in roles:
            size = p.roles[r]
            if size.is_const:
                total = total * int(size.const)
            elif size in self.engine.symints:
                total = total * self.engine.symints[size]
            else:
                raise CannotEmit("known sizes", f"a symbolic length {size} that no tensor has")
        return total

    def _some_node(self, accesses: Sequence[Access], held: Mapping[int, Place]) -> fx.Node:
        """A value of the graph that is some factor, or that one is computed from."""
        for leaf, _ in accesses:
            if leaf in held:
                return held[leaf][0]
            kind = self.engine.leaves[leaf].kind
            if isinstance(kind, Opaque) and kind.node is not None:
                return kind.node
            series = kind.series if isinstance(kind, Opaque) else None
            inner = self.engine.leaves.made_of(leaf) if series is None else () if series.of is None else series.of[:1]
            for n in inner:
                try:
                    return self._some_node([(n, ())], held)
                except CannotEmit:
                    continue
            if series is not None:
                return series.pieces[series.starts[0]][0]
        raise CannotEmit("a value of the traced graph", "queries made of constants")

    def _decay_source(self, p: Proof) -> str:
        leaves = self.engine.leaves
        rates = (*p.fixed, *p.tokens)
        sources = [source(leaves, m, c) if m else f"the constant {math.exp(c):.6g}" for m, c in rates]
        return " + ".join(sources or ["none (un-decayed)"])

    def _replacement(
        self,
        p: Proof,
        expr: Expr,
        batch: list[int],
        heads: list[int],
        e_group: list[int],
        row_factor: Expr | None,
        added: Sequence[Expr | float],
    ) -> Expr:
        """The operator's output in the target's dimensions, times row factors, plus what is added to it."""
        order: list[int] = []
        at = 0
        for group in (batch, heads, [N_ROLE], e_group):
            if not group or group[0] not in p.place:
                expr = Call(torch.squeeze, (expr, at))
                continue
            if len(group) > 1:
                sizes = [size_of(self.engine, p.roles[r]) for r in group]
                expr = Call(torch.unflatten, (expr, at, sizes))
            order += group
            at += len(group)
        dims = [p.place[r] for r in order]
        expr = permuted(expr, [dims.index(d) for d in range(len(dims))])
        if row_factor is not None:
            expr = Call(torch.mul, (expr, row_factor))
        for term in added:
            expr = Call(torch.add, (expr, term))
        if p.backwards:
            expr = Call(torch.flip, (expr, [p.place[N_ROLE]]))
        for d in p.flattened:
            expr = Call(torch.flatten, (expr, d, d + 1))
        rank = len(p.known.value.shape) - len(p.flattened)
        for n, dims in enumerate(p.chunked):
            expr = _in_chunks(expr, rank + n, *dims)
        return expr

    def _summed_product(self, p: Proof, t: Term) -> Piece | None:
        """The factors of a plain term; those that hold key features are multiplied and summed first."""
        features = set(p.key_features)

        def held(idx: Iterable[Aff]) -> bool:
            return not features.isdisjoint(self.engine.space.vars_of(idx))

        monos = [(m, float(f.const), held(i for _, idx in m for i in idx)) for m, f in t.exp.lin if m]
        inner = self.emitter.product(
            [a for a in t.accs if held(a[1])], [self.emitter.exponential(m, c) for m, c, inside in monos if inside]
        )
        summed = [] if inner is None else [self.emitter.summed(inner, p.key_features)]
        rest = [self.emitter.exponential(m, c) for m, c, inside in monos if not inside]
        return self.emitter.product([a for a in t.accs if not held(a[1])], [*rest, *summed])

    def _around(self, p: Proof, residual: Sequence[Term]) -> tuple[Expr | None, list[Expr | float]]:
        """In the target's dimensions: the factor of each row, if there is one, and the terms that are added."""
        groups = [[r] for r in sorted(p.place, key=lambda r: p.place[r])]

        def in_target(piece: Piece) -> Expr:
            return self.emitter.assemble(piece, groups, shrink=range(len(groups)))

        outer = self.emitter.product(p.outer, [self.emitter.exponential(m, c) for m, c in p.outer_weights])
        added: list[Expr | float] = []
        for t in residual:
            coef = t.coef * math.exp(sum(float(f.const) for m, f in t.exp.lin if not m))
            piece = self._summed_product(p, t)
            if not t.poly.is_const:
                counted = self.emitter.numbers.index(t.poly)
                piece = counted if piece is None else piece * counted
            if piece is None:
                added.append(coef)
            else:
                added.append(in_target(piece) if coef == 1 else Call(torch.mul, (in_target(piece), coef)))
        return None if outer is None else in_target(outer), added


def _log_decay(emitter: Emitter, p: Proof, batch: list[int], heads: list[int]) -> Expr:
    """The decay of each head, or of each token."""
    exact = _exact(p.known.compute)
    total: Piece | None = None
    for mono, c in (*p.fixed, *p.tokens):
        piece = emitter.product(mono, rate=True)
        piece = emitter.numbers.constant(c, exact) if piece is None else piece.to(exact).scaled(c)
        total = piece if total is None else total + piece
    if total is None:
        total = emitter.numbers.constant(0.0, exact)
    return emitter.assemble(total, [batch, heads, [N_ROLE]] if p.tokens else [heads])


def _in_chunks(expr: Expr, rank: int, chunk: int, place: int, places: int) -> Expr:
    """The rows of ``expr``, which has ``rank`` dimensions, as chunks in dimension ``chunk`` and places in another."""
    order = [d for d in range(rank + 1) if d != place]
    at = order.index(chunk)
    order.insert(at + 1, place)
    return permuted(Call(torch.unflatten, (expr, at, [-1, places])), [order.index(d) for d in range(rank + 1)])


def _exact(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states and log-decays beside q, k and v of this one."""
    return torch.float64 if dtype == torch.float64 else torch.float32
