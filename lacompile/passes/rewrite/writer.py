"""Puts recipes into a copy of the graph: one operator call per fact, and nothing left of what it replaces."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from ..._compat import always_equal, hint, of_fakes
from ..facts import Attend, Call, Const, DecayedAttention, Expr, Match, Size, Value, children
from ..graph.schedule import Schedule
from ..graph.strides import decide_values, known_by_strides, same_strides
from .dead_code import CopiedMemory, erase_dead
from .narrow import narrow

OpCall = Callable[..., Any]


class CannotRewrite(Exception):
    """The replacement does not fit the value it replaces; the original graph stays."""


@dataclass(frozen=True)
class Rewritten:
    """A copy of a graph in which every match's target is its replacement.

    ``facts``: those that it computes. A match of which another's replacement leaves nothing, as one head of
    a tensor that is replaced whole, is not used. ``gone``: the nodes of the graph that it has no copy of.
    """

    gm: fx.GraphModule
    facts: set[DecayedAttention]
    gone: set[fx.Node]


def rewrite(schedule: Schedule, matches: Sequence[Match], operator_call: OpCall) -> Rewritten:
    """The graph with the matches replaced.

    Args:
        schedule: of the Dynamo graph, which is not changed. What has effects stays.
        matches: what to replace.
        operator_call: the fused operator, called as in ``torch.ops.lacompile.decayed_attention``.

    Raises:
        CannotRewrite: a replacement of another shape or dtype than its target.
    """
    gm = schedule.gm
    mapping: dict[fx.Node, fx.Node] = {}
    graph = fx.Graph()
    output = graph.graph_copy(gm.graph, mapping)
    old_output = gm.graph.output_node()
    new_output = graph.output(output)
    new_output.meta = copy.copy(old_output.meta)
    mapping[old_output] = new_output
    # A module attribute that the copy does not name would be lost: constants and submodules are shared.
    copied = fx.GraphModule(gm, graph)
    copied.meta = gm.meta
    finals = {f for m in matches for f in _facts_with_final_state(m.replacement)}
    writer = _Writer(copied, mapping, operator_call, finals, schedule)
    for match in sorted(matches, key=lambda m: schedule.order[m.behind]):
        writer.replace(match)
    erase_dead(graph, CopiedMemory({new: old for old, new in mapping.items()}, writer.stand_ins, schedule))
    graph.lint()
    copied.recompile()
    alive = set(graph.nodes)
    facts = {fact for fact, call in writer.calls.items() if call in alive}
    return Rewritten(copied, facts, {old for old, new in mapping.items() if new not in alive})


def _facts_with_final_state(expr: Expr) -> list[DecayedAttention]:
    own = [expr.fact] if isinstance(expr, Attend) and expr.index == 1 else []
    return own + [f for e in children(expr) for f in _facts_with_final_state(e)]


class _Writer:
    def __init__(
        self,
        gm: fx.GraphModule,
        mapping: dict[fx.Node, fx.Node],
        operator_call: OpCall,
        finals: set[DecayedAttention],
        schedule: Schedule,
    ):
        self.gm, self.mapping, self.operator_call, self.finals = gm, mapping, operator_call, finals
        self.order = schedule.order
        self.known_by_strides, self.deciding = known_by_strides(schedule), decide_values(schedule)
        self.place = {new: schedule.order[old] for old, new in mapping.items()}  # of the nodes that were copied
        self.made: dict[Expr, fx.Node] = {}
        self.stand_ins: dict[fx.Node, tuple[fx.Node, int]] = {}  # by target: its new value, and from where on
        self.calls: dict[DecayedAttention, fx.Node] = {}  # of the operator
        self.origin: fx.Node | None = None
        self.at = 0  # the place that is written
        self.ends: dict[fx.Node, fx.Node] = {}  # what was written last behind a node: what comes next may read it

    def replace(self, match: Match) -> None:
        target = self.mapping[match.target]
        at = self.mapping[match.behind]
        for node in match.hoisted:
            at.append(self.mapping[node])
            at = self.mapping[node]
        self.origin, self.at = target, self.order[match.behind]
        self.cursor = self.ends.get(at, at)
        new = self._emit(match.replacement)
        want, got = target.meta["example_value"], new.meta["example_value"]
        if got.dtype != want.dtype:
            new = self._call(torch.Tensor.to, (new, want.dtype), {})
            got = new.meta["example_value"]
        if tuple(got.shape) != tuple(want.shape):
            raise CannotRewrite(f"{target.name} has shape {tuple(want.shape)}, its replacement {tuple(got.shape)}")
        if not same_strides(got, want) and match.target in self.known_by_strides:
            new = self._with_strides_of(new, want)
            if not same_strides(new.meta["example_value"], want) and match.target in self.deciding:
                raise CannotRewrite(f"{target.name} has strides {want.stride()}, which its replacement cannot have")
        self.ends[at] = self.cursor
        behind = self.order[match.after or match.target]
        self.stand_ins[match.target] = new, behind
        target.replace_all_uses_with(new, lambda user: self.place.get(user, -1) > behind, propagate_meta=False)

    def _with_whole_rows(self, x: fx.Node) -> fx.Node:
        """``x`` with the features of a token beside each other in memory, as kernels read them.

        They would copy it, forwards and again backwards; in the graph that is part of what makes x.
        """
        example = x.meta["example_value"]
        if example.device.type == "cpu" or always_equal(example.shape[-1], 1) or always_equal(example.stride(-1), 1):
            return x
        others = sorted(range(example.dim() - 1), key=lambda n: -hint(example.stride(n)))
        return self._in_order(x, [*others, example.dim() - 1])

    def _with_strides_of(self, new: fx.Node, want: torch.Tensor) -> fx.Node:
        """A copy whose dimensions follow each other in memory as those of ``want`` do."""
        return self._in_order(new, sorted(range(want.dim()), key=lambda n: -hint(want.stride(n))))

    def _in_order(self, new: fx.Node, order: list[int]) -> fx.Node:
        """A copy whose dimensions follow each other in memory in this order."""
        rank = range(len(order))
        if order == list(rank):
            return self._call(torch.Tensor.contiguous, (new,), {})
        laid_out = self._call(torch.Tensor.contiguous, (self._call(torch.permute, (new, order), {}),), {})
        return self._call(torch.permute, (laid_out, sorted(rank, key=order.__getitem__)), {})

    # ------------------------------------------------------------------------------------------------------ emission

    def _emit(self, expr: Expr) -> fx.Node:
        if isinstance(expr, Value):
            return self._sent(self._held(expr))
        found = self.made.get(expr)
        if found is None:
            found = self.made[expr] = self._make(expr)
        return found

    def _held(self, value: Value) -> fx.Node:
        new, behind = self.stand_ins.get(value.node, (None, 0))
        return new if new is not None and self.at > behind else self.mapping[value.node]

    def _sent(self, node: fx.Node) -> fx.Node:
        """To the target's device: the proof does not tell a value from itself on another one."""
        assert self.origin is not None
        example, there = node.meta.get("example_value"), self.origin.meta["example_value"].device
        if not isinstance(example, torch.Tensor) or example.device == there:
            return node
        return self._call(torch.Tensor.to, (node, there), {})

    def _make(self, expr: Expr) -> fx.Node:
        if isinstance(expr, Const):
            like = self._emit(expr.like).meta["example_value"]
            kwargs = {"dtype": expr.dtype, "device": like.device}
            return self._call(torch.tensor, (_as_list(expr.values),), kwargs)
        if isinstance(expr, Size):
            return self._call(torch.ops.aten.sym_size.int, (self._held(expr.of), expr.dim), {})
        if isinstance(expr, Attend):
            return self._call(operator.getitem, (self._attention(expr.fact), expr.index), {})
        assert isinstance(expr, Call)
        args = tuple(self._argument(a) for a in expr.args)
        return self._call(expr.op, args, {k: self._argument(v) for k, v in expr.kwargs.items()})

    def _argument(self, arg: Any) -> Any:
        if isinstance(arg, Value | Const | Size | Call | Attend):
            return self._emit(arg)
        if isinstance(arg, list | tuple):
            return type(arg)(self._argument(a) for a in arg)
        return arg

    def _attention(self, fact: DecayedAttention) -> fx.Node:
        found = self.calls.get(fact)
        if found is None:
            state = None if fact.initial_state is None else self._emit(fact.initial_state)
            operands = {name: self._with_whole_rows(self._emit(getattr(fact, name))) for name in "qkv"}
            args = (
                *operands.values(),
                self._emit(fact.log_decay),
                fact.scale,
                state,
                fact in self.finals,
                narrow(operands, lambda node: node not in self.place),
            )
            found = self.calls[fact] = self._call(self.operator_call, args, {})
        return found

    def _call(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        with self.gm.graph.inserting_after(self.cursor):
            node = self.gm.graph.call_function(op, args, kwargs)
        self.cursor = node
        assert self.origin is not None
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
            if key in self.origin.meta:
                node.meta[key] = self.origin.meta[key]
        node.meta["example_value"] = self._example(op, args, kwargs)
        return node

    def _example(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What AOTAutograd's cache wants to see on every node."""
        fakes = map_arg((args, kwargs), lambda n: n.meta["example_value"])
        assert self.origin is not None
        with of_fakes(self.origin.meta["example_value"].fake_mode):
            return op(*fakes[0], **fakes[1])


def _as_list(values: Any) -> Any:
    return [_as_list(v) for v in values] if isinstance(values, tuple) else values
