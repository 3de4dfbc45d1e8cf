"""Puts recipes into a copy of the graph: one operator call per fact, and nothing left of what it replaces."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from .._compat import always_equal, hint, of_fakes
from .effects import ANYWHERE, NOWHERE, overlap
from .facts import Attend, Call, Const, DecayedAttention, Expr, Match, Size, Value, children
from .schedule import Schedule

OpCall = Callable[..., Any]


class CannotRewrite(Exception):
    """The replacement does not fit the value it replaces; the original graph stays."""


def rewrite(schedule: Schedule, matches: Sequence[Match], operator_call: OpCall) -> tuple[fx.GraphModule, set[int]]:
    """A copy of a graph in which every match's target is its replacement, and the ids of the facts that it computes.

    A match of which another's replacement leaves nothing, as one head of a tensor that is replaced whole, is not used.

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
    copied = fx.GraphModule(gm, graph)
    copied.meta = gm.meta
    # A module attribute that the copy does not name would be lost: constants and submodules are shared.
    finals = {id(f) for m in matches for f in _facts_with_final_state(m.replacement)}
    writer = _Writer(copied, mapping, operator_call, finals, schedule)
    for match in sorted(matches, key=lambda m: schedule.order[m.behind]):
        writer.replace(match)
    _erase_dead(graph, _Memory({new: old for old, new in mapping.items()}, writer.stand_ins, schedule))
    graph.lint()
    copied.recompile()
    alive = set(graph.nodes)
    return copied, {fact for fact, call in writer.calls.items() if call in alive}


def _facts_with_final_state(expr: Expr) -> list[DecayedAttention]:
    own = [expr.fact] if isinstance(expr, Attend) and expr.index == 1 else []
    return own + [f for e in children(expr) for f in _facts_with_final_state(e)]


MADE_ANEW = (torch.nn.functional.linear, torch.matmul, operator.matmul, torch.bmm)
"""Functions whose results have strides of their own, whatever those of their arguments are."""
BY_STRIDES = ("view", "view_as", "view_as_complex", "as_strided", "as_strided_", "unflatten")
"""Functions whose result, or whether they have one, depends on the strides of their argument."""


def _known_by_strides(schedule: Schedule) -> set[fx.Node]:
    """The values of which the program can tell which strides they have.

    A result of the graph shows them; a ``view`` needs them; a ``reshape`` goes by them whether it copies, which a later
    write into its result reveals; what an operator outside PyTorch does with them is not known.
    """
    told: set[fx.Node] = set()
    for user in reversed(schedule.nodes):
        foreign = isinstance(user.target, torch._ops.OpOverload | torch._ops.HigherOrderOperator)
        shows = user.op == "output" or user in schedule.effects.writes or foreign
        if (
            shows
            or getattr(user.target, "__name__", user.target) in BY_STRIDES
            or (user in told and user.target not in MADE_ANEW and not _contracts(user))
        ):
            told.update(user.all_input_nodes)
    return told


def _contracts(node: fx.Node) -> bool:
    """Whether it is an einsum of two tensors that sums over what both have: else that is a product entry by entry."""
    if node.target is not torch.einsum or len(node.args) != 3 or not isinstance(equation := node.args[0], str):
        return False
    operands, arrow, result = equation.replace(" ", "").partition("->")
    first = operands.split(",")[0]
    if not arrow or "." in equation or not isinstance(node.args[1], fx.Node):
        return False
    sizes = dict(zip(first, node.args[1].meta["example_value"].shape, strict=True))
    summed = (set(first) & set(operands.split(",")[1])) - set(result)
    return any(isinstance(sizes[letter], int) and sizes[letter] > 1 for letter in summed)


MAY_COPY = ("reshape", "reshape_as", "flatten", "ravel", "contiguous")
"""Functions that copy or not, by the strides of their argument."""


def _decide_values(schedule: Schedule) -> set[fx.Node]:
    """The values whose strides decide results: by them what the program writes into was copied before, or not."""
    lives = schedule.effects.lives
    deciding: set[fx.Node] = set()
    for user in reversed(schedule.nodes):
        name = getattr(user.target, "__name__", user.target)
        shares = name in MAY_COPY or any(
            overlap(lives.get(user, NOWHERE), lives.get(n, NOWHERE)) for n in user.all_input_nodes
        )
        if user in schedule.effects.writes or name == "as_strided" or (user in deciding and shares):
            deciding.update(user.all_input_nodes)
    return deciding


class _Writer:
    def __init__(
        self,
        gm: fx.GraphModule,
        mapping: dict[fx.Node, fx.Node],
        operator_call: OpCall,
        finals: set[int],
        schedule: Schedule,
    ):
        self.gm, self.mapping, self.operator_call, self.finals = gm, mapping, operator_call, finals
        self.order = schedule.order
        self.known_by_strides, self.deciding = _known_by_strides(schedule), _decide_values(schedule)
        self.place = {new: schedule.order[old] for old, new in mapping.items()}  # of the nodes that were copied
        self.made: dict[int, fx.Node] = {}
        self.stand_ins: dict[fx.Node, tuple[fx.Node, int]] = {}  # by target: its new value, and from where on
        self.calls: dict[int, fx.Node] = {}  # by the id of the fact: a call of the operator
        self.kept: list[Any] = []  # recipes stay alive while their ids are keys
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

    def _with_strides_of(self, new: fx.Node, want: torch.Tensor) -> fx.Node:
        """A copy whose dimensions follow each other in memory as those of ``want`` do."""
        rank = range(want.dim())
        order = sorted(rank, key=lambda n: -hint(want.stride(n)))
        if order == list(rank):
            return self._call(torch.Tensor.contiguous, (new,), {})
        laid_out = self._call(torch.Tensor.contiguous, (self._call(torch.permute, (new, order), {}),), {})
        return self._call(torch.permute, (laid_out, sorted(rank, key=order.__getitem__)), {})

    # ------------------------------------------------------------------------------------------------------ emission

    def _emit(self, expr: Expr) -> fx.Node:
        if isinstance(expr, Value):
            return self._sent(self._held(expr))
        found = self.made.get(id(expr))
        if found is None:
            self.kept.append(expr)
            found = self.made[id(expr)] = self._make(expr)
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
        found = self.made.get(id(fact))
        if found is None:
            self.kept.append(fact)
            state = None if fact.initial_state is None else self._emit(fact.initial_state)
            args = (
                self._emit(fact.q),
                self._emit(fact.k),
                self._emit(fact.v),
                self._emit(fact.log_decay),
                fact.scale,
                state,
                id(fact) in self.finals,
            )
            found = self.made[id(fact)] = self.calls[id(fact)] = self._call(self.operator_call, args, {})
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


def same_strides(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Whether two tensors of one shape lie alike in memory, at any length; dimensions of length 1 do not count."""
    return all(
        always_equal(n, 1) or always_equal(a, b) for n, a, b in zip(got.shape, got.stride(), want.stride(), strict=True)
    )


def _as_list(values: Any) -> Any:
    return [_as_list(v) for v in values] if isinstance(values, tuple) else values


# -------------------------------------------------------------------------------------------------------- dead code


class _Memory:
    """Which memory each node of the copy lives in or writes into.

    What stands in for a target has memory of its own, and from there on it is that which the program's views of the
    target and its writes into it are about: storages are counted anew behind each such place.
    """

    def __init__(
        self, origin: dict[fx.Node, fx.Node], stand_ins: dict[fx.Node, tuple[fx.Node, int]], schedule: Schedule
    ):
        self.origin, self.order, self.effects = origin, schedule.order, schedule.effects
        self.stand_ins = {new: (target, at) for target, (new, at) in stand_ins.items()}
        self.cuts: dict[int, set[int]] = {}
        for target, at in self.stand_ins.values():
            for storage in self.effects.lives.get(target, NOWHERE):
                self.cuts.setdefault(storage, set()).add(at)

    def of(self, node: fx.Node) -> frozenset[tuple[int, int]]:
        """The storages of a node, each with how often it had been replaced by then."""
        if node in self.stand_ins:
            target, at = self.stand_ins[node]
            storages, behind = self.effects.lives.get(target, NOWHERE), at + 1
        elif (old := self.origin.get(node)) is not None:
            storages = self.effects.lives.get(old, NOWHERE) | self.effects.writes.get(old, NOWHERE)
            behind = self.order[old]
        else:
            return frozenset()
        return frozenset((s, sum(cut < behind for cut in self.cuts.get(s, ()))) for s in storages)

    def writes(self, node: fx.Node) -> bool:
        return self.origin.get(node) in self.effects.writes

    def is_impure(self, node: fx.Node) -> bool:
        return self.origin.get(node) in self.effects.impure

    def is_outside(self, storage: tuple[int, int]) -> bool:
        """Whether it may be seen from outside of the graph."""
        return storage[0] == ANYWHERE or storage[0] in self.effects.outside


def _erase_dead(graph: fx.Graph, memory: _Memory) -> None:
    """Removes what nobody reads: pure nodes, and writes into tensors made in this graph that nobody reads."""
    while True:
        for node in reversed(graph.nodes):
            pure = not memory.is_impure(node) and not memory.writes(node)
            if pure and not node.users and node.op not in ("placeholder", "output"):
                graph.erase_node(node)
        dead = _dead_memory(graph, memory)
        if not dead:
            return
        for node in reversed(dead):
            graph.erase_node(node)


def _dead_memory(graph: fx.Graph, memory: _Memory) -> list[fx.Node]:
    """The nodes, in order, of storages made in this graph whose every user only views or writes the same storage."""
    where = {node: memory.of(node) for node in graph.nodes}
    members: dict[tuple[int, int], list[fx.Node]] = {}
    for node, storages in where.items():
        for storage in storages:
            members.setdefault(storage, []).append(node)
    dead = {
        storage
        for storage, nodes in members.items()
        if not memory.is_outside(storage)
        and any(memory.writes(n) for n in nodes)
        and all(
            not memory.is_impure(n) and where[n] == {storage} and all(where.get(u) == {storage} for u in n.users)
            for n in nodes
        )
    }
    return [n for n in graph.nodes if where[n] & dead]
