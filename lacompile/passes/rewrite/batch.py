"""One module per head: attentions of one shape, none of which needs another's result, are one with more heads.

The operator runs at the first of them. What the others are computed from is moved up to there, if nothing in between
can tell: it is computed from values that are not written to in between, and no mode changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ..capture.effects import NOWHERE
from ..facts import Attend, Call, DecayedAttention, Expr, Match, values_of
from ..graph.schedule import Schedule


def batched(schedule: Schedule, matches: Sequence[Match]) -> list[Match]:
    """The matches, those that can be joined reading their head of one operator; their order is kept."""
    order = schedule.order
    heads: dict[DecayedAttention, _Head] = {}
    for m in sorted(matches, key=lambda m: order[m.behind]):
        for f in m.facts:
            heads.setdefault(f, _Head(f, [])).matches.append(m)
    layers = _layers(schedule, {m.target for m in matches})
    groups: dict[Any, list[_Group]] = {}
    for head in heads.values():
        if any(m.after is not None or m.place is not None for m in head.matches):
            continue
        key = _shape(head.fact)
        if key is None:
            continue
        modes = tuple(schedule.records_gradients[m.target] for m in head.matches)
        layer = max(layers[v.node] for m in head.matches for v in values_of(m.replacement))
        mine = groups.setdefault((*key, modes, layer), [])
        for group in mine:
            if group.takes(head):
                break
        else:
            mine.append(_Group(schedule, [head], []))
    made = {m: m for m in matches}
    for group in (g for found in groups.values() for g in found if len(g.heads) > 1):
        group.join(made)
    return [made[m] for m in matches]


def _layers(schedule: Schedule, targets: set[fx.Node]) -> dict[fx.Node, int]:
    """How many targets lie one behind the other on the way to each node: those of one layer do not need each other."""
    out: dict[fx.Node, int] = {}
    for node in schedule.nodes:
        out[node] = max((out[n] for n in node.all_input_nodes), default=0) + (node in targets)
    return out


def _shape(fact: DecayedAttention) -> Any:
    """What attentions must have in common; None for one of several heads."""
    if not isinstance(fact.heads, int) or fact.heads != 1:
        return None
    state = fact.initial_state is not None
    sizes = map(str, (fact.batch, fact.length, fact.dk, fact.dv))  # a symbolic one has no hash
    return (*sizes, fact.dtype, fact.decay_per_token, fact.scale, state)


@dataclass
class _Head:
    """An attention, and what it is read by: its output, and the state that it leaves."""

    fact: DecayedAttention
    matches: list[Match]


@dataclass
class _Group:
    schedule: Schedule
    heads: list[_Head]
    moved: list[fx.Node]  # in their order in the graph

    def takes(self, head: _Head) -> bool:
        """Adds a head whose inputs can be had at the first one's target."""
        first = self.heads[0].matches[0].target
        needed = self._needed(head, self.schedule.order[first])
        if not self._movable(first, needed):
            return False
        self.heads.append(head)
        self.moved = sorted({*self.moved, *needed}, key=self.schedule.order.__getitem__)
        return True

    def _needed(self, head: _Head, at: int) -> set[fx.Node]:
        """What is computed after ``at`` and the head is computed from: no results of the group, which is one layer."""
        needed: set[fx.Node] = set()
        work = [v.node for m in head.matches for v in values_of(m.replacement)]
        while work:
            node = work.pop()
            if self.schedule.order[node] > at and node not in needed:
                needed.add(node)
                work += node.all_input_nodes
        return needed

    def _movable(self, first: fx.Node, needed: set[fx.Node]) -> bool:
        if not needed:
            return True
        schedule, modes = self.schedule, self.schedule.records_gradients
        order, effects = schedule.order, schedule.effects
        start, end = order[first], max(order[n] for n in needed)
        if schedule.impure_between(start, end) or any(modes[n] != modes[first] for n in needed):
            return False
        if any(n in effects.writes for n in needed):
            return False
        return not any(
            True
            for node in needed
            for n in (node, *node.all_input_nodes)
            for _ in schedule.writers(effects.lives.get(n, NOWHERE), start, order[node] - 1)
        )

    def join(self, made: dict[Match, Match]) -> None:
        """Puts in the place of each match one that reads its heads of the joined operator."""
        facts = [head.fact for head in self.heads]
        first = facts[0]

        def cat(parts: Sequence[Expr], dim: int) -> Expr:
            return Call(torch.cat, (list(parts), dim))

        states = [f.initial_state for f in facts if f.initial_state is not None]
        sources = list(dict.fromkeys(f.decay_source for f in facts))
        fact = replace(
            first,
            q=cat([f.q for f in facts], 1),
            k=cat([f.k for f in facts], 1),
            v=cat([f.v for f in facts], 1),
            log_decay=cat([f.log_decay for f in facts], 1 if first.decay_per_token else 0),
            initial_state=cat(states, 1) if states else None,
            heads=len(facts),
            decay_source=", ".join(sources[:2]) + (f" and {len(sources) - 2} more" if len(sources) > 2 else ""),
            assumptions=tuple({(a.node, a.kind): a for f in facts for a in f.assumptions}.values()),
        )
        for n, head in enumerate(self.heads):
            for match in head.matches:
                old = made[match]
                own = _reading(old.replacement, head.fact, fact, n)
                others = tuple(f for f in old.facts if f is not head.fact and f is not fact)
                first_of_all = n == 0 and match is head.matches[0]
                hoisted = (*old.hoisted, *self.moved) if first_of_all else old.hoisted
                made[match] = replace(old, replacement=own, facts=(fact, *others), hoisted=hoisted)


def _reading(expr: Expr, fact: DecayedAttention, joined: DecayedAttention, head: int) -> Expr:
    """``expr`` with each output of ``fact`` read off the joined operator."""
    if isinstance(expr, Attend) and expr.fact is fact:
        return Call(torch.narrow, (Attend(joined, expr.index), 1, head, 1))
    if not isinstance(expr, Call):
        return expr

    def walk(arg: Any) -> Any:
        if isinstance(arg, list | tuple):
            return type(arg)(map(walk, arg))
        return _reading(arg, fact, joined, head)

    return Call(expr.op, walk(expr.args), {k: walk(v) for k, v in expr.kwargs.items()})
