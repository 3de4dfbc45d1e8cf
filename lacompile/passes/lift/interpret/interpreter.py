"""The abstract interpreter: what each tensor of a Dynamo graph is, as a normal form."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from ...._compat import AnotherInEachCall, no_number_for_a_symbol
from ...capture import Capture, Memory, ViewStep, aliases, fake_mode_of
from ...examples import ONE_TENSOR, example_of, is_floating
from ..domain.choices import Choices
from ..domain.intervals import interval_of
from ..domain.kinds import WITHOUT_GRADIENTS, Opaque
from ..domain.precision import SHORT
from ..domain.term import Val
from ..engine import Engine, GiveUp, Unmerged
from ..inputs.statics import Statics
from ..transfer import TELL_ZEROS_APART, Op, transfer
from .constants import Constants
from .known import Known, given_to
from .loops import LoopResults
from .numbers import MAX_BAKED, Numbers
from .own import leaves_of, own_leaf, readable, rooted, unsplit, whole_if_inside
from .writes import written_through

log = logging.getLogger("lacompile")
aten = torch.ops.aten


@dataclass
class Interpreter:
    """Implements :class:`lacompile.passes.capture.Observer` over the normal form."""

    engine: Engine = field(init=False)
    known: dict[fx.Node, Known] = field(default_factory=dict)
    demanded: dict[fx.Node, None] = field(default_factory=dict)  # in the order of their first demand
    give_ups: dict[fx.Node, str] = field(default_factory=dict)
    statics: Statics | None = None
    capture: Capture | None = None
    without_gradients: list[tuple[fx.Node, torch.Tensor]] = field(default_factory=list)
    read_buffers: bool = True
    choices: Choices = field(default_factory=Choices)
    cuts: frozenset[fx.Node] = frozenset()
    """Values that are taken as the tensors that they are."""
    numbers: Numbers = field(init=False)
    _mode: Any = None  # that Dynamo traced in
    _gave_up: str | None = None
    _repeatable: bool = True  # whether the node has run operations of PyTorch alone, and known ones
    _constants: Constants = field(init=False)
    _pieces: LoopResults = field(init=False)
    _of_numbers: bool = False  # whether the node is computed from numbers that the program writes, and no input
    _runs_pytorch: bool = True  # whether all that the node has run are operations of PyTorch
    _leaves: int = 0  # how many there were when the last node had been run

    def __post_init__(self) -> None:
        self.engine = Engine(self.choices)
        self.numbers = Numbers(self.engine)

    def run(self, gm: fx.GraphModule, example_inputs: Any) -> None:
        self.capture, self._mode = Capture(gm, self), fake_mode_of(gm)
        self._constants = Constants(self.engine, self.capture, self.known)
        self._pieces = LoopResults(self.engine, self.capture, self.known, self._demand)
        self.engine.patience += len(gm.graph.nodes)
        for node in gm.graph.nodes:
            example = node.meta.get("example_value")
            if node.op == "placeholder" and isinstance(example, torch.SymInt):
                self.engine.size_nodes.setdefault(self.engine.aff(example), node)
            if isinstance(example, torch.SymInt | torch.SymFloat):
                self.engine.number_nodes.setdefault(example.node.expr, node)
        inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
        self.engine.of_short_data = all(example_of(n).dtype in SHORT for n in inputs if is_floating(n))
        if self.read_buffers:
            self.statics = Statics(self.engine, inputs, example_inputs)
        self.capture.run(example_inputs)

    # ------------------------------------------------------------------------------------------------------ observer

    def source(self, node: fx.Node, tensor: torch.Tensor, real: Any) -> Val:
        self._pieces.given[node] = tensor
        if node.op == "get_attr" and isinstance(real, torch.Tensor) and not real.requires_grad:
            self._constants.hold(node, real)
        if node.op == "get_attr" and isinstance(real, torch.Tensor) and real.numel() <= MAX_BAKED:
            return self.numbers.of(tensor, real)
        if self.statics is not None and (known := self.statics.value(node, tensor)) is not None:
            return known
        kept = self.statics is not None and self.statics.is_kept(node)
        return self.engine.leaf(
            tensor, Opaque(node, node.name), constant=kept, parameter=isinstance(real, torch.nn.Parameter)
        )

    def begins(self, node: fx.Node) -> None:
        self._of_numbers = self._constants.are_read_by(node)
        if not self._of_numbers:
            for given in node.all_input_nodes:
                self._constants.settle(given)

    def unknown(self, tensor: torch.Tensor, why: str) -> Val:
        held = getattr(tensor, "constant", None)
        if isinstance(held, torch.Tensor) and held.numel() <= MAX_BAKED:
            return self.numbers.of(tensor, held)
        if type(tensor) is torch.Tensor and tensor.numel() <= MAX_BAKED and tensor.device.type == "cpu":
            return self.numbers.made_of_numbers(self._node, tensor)
        self._gave_up, self._repeatable = why, False
        return self.engine.leaf(tensor, Opaque(None, why, numbers=self._of_numbers))

    def operation(self, func: Any, args: list[Any], kwargs: dict[str, Any], out: Any, dtypes: list[Any]) -> Any:
        op = Op(self.engine, func, args, kwargs, out, dtypes)
        self._repeatable &= func.namespace == "aten" and func.overloadpacket not in TELL_ZEROS_APART
        self._runs_pytorch &= func.namespace == "aten"
        self.engine.running = self._node
        try:
            # a kernel of PyTorch may ask whether a size is 1, which Dynamo did before; a rule has not been asked before
            with no_number_for_a_symbol(self._mode, no_answer=True):
                found = transfer(self._completed(op))
            return self.numbers.in_format(found, op.out) if isinstance(found, Val) and self._of_numbers else found
        except GiveUp as reason:
            return self._give_up(op, str(reason), isinstance(reason, Unmerged))
        except AnotherInEachCall as reason:
            return self._give_up(op, str(reason))
        except Exception as broken:  # a rule at fault costs this value, and nothing else of the program
            log.debug("%s could not be lifted", func, exc_info=True)
            return self._give_up(op, f"internal error: {type(broken).__name__}: {broken}")

    def _completed(self, op: Op) -> Op:
        """With tables that are read as the weights that they are."""
        if aliases(op.func):
            return op
        args = [self.numbers.complete(a, op.dtypes[n]) if isinstance(a, Val) else a for n, a in enumerate(op.args)]
        return replace(op, args=args)

    def _give_up(self, op: Op, reason: str, unmerged: bool = False) -> Any:
        vals = [v for v in tree_leaves((op.args, op.kwargs)) if isinstance(v, Val)]
        if isinstance(op.out, torch.Tensor) and not vals and torch.Tag.nondeterministic_seeded not in op.func.tags:
            folded = self.numbers.made_by(op)
            if folded is not None:
                return folded
        if any(self.engine.structured(v) for v in vals):
            self._gave_up = reason
        inputs = leaves_of(vals)
        summands = tuple(t for v in vals for c in v.cases for t in c.terms) if unmerged else ()
        by_itself = op.func.namespace == "aten" and torch.Tag.nondeterministic_seeded not in op.func.tags
        of_numbers = by_itself and all(map(self.engine.written, vals))
        numbers = [(float(x), float(x)) if isinstance(x, int | float) else None for x in op.args]

        def fresh(t: Any) -> Any:
            if not isinstance(t, torch.Tensor):
                return None
            kind = Opaque(None, op.func.overloadpacket.__name__, inputs, summands, numbers=of_numbers)
            return self.engine.leaf(t, kind, interval=interval_of(op.func, numbers))

        if isinstance(op.out, list | tuple):
            return [fresh(t) for t in op.out]
        return fresh(op.out)  # None for a number, such as a size

    def write(self, base: Val, view: ViewStep, new: Val, tensor: torch.Tensor) -> Val:
        try:
            known = written_through(self.engine, base, view, new, self._made_together(view))
            return replace(known, precision=min(base.precision, new.precision))
        except GiveUp as reason:
            return self.unknown(tensor, f"written through a view: {reason}")
        except Exception as broken:  # costs what was written into, whose other views are made from it
            log.debug("a write through %s could not be lifted", view.func, exc_info=True)
            return self.unknown(tensor, f"internal error: {type(broken).__name__}: {broken}")

    def _made_together(self, view: ViewStep) -> bool:
        """Whether the program only ever saw the view: ``zeros_like`` detaches what it makes, say."""
        return self._memory.record(view.parent_tensor).node is self._memory.record(view.out).node

    def gradients_resume(self, last: bool) -> None:
        """For autograd what was computed so far without gradients, from what requires one, is data.

        So is what was written then into a tensor, and of the rest of that tensor no more is known. At the ``last``
        node, the output, nothing is computed any more that would see it as data; but what autograd knows of a tensor
        that was made with gradients is then no longer what it holds.
        """
        assert self.capture is not None
        if not last:
            self._demand(node for node, _ in self.without_gradients)
            for node, tensor in self.without_gradients:
                before = self._memory.read(self._memory.record(tensor))
                own, made = (node if node in self.known else None), self.engine.written(before)
                kind = Opaque(own, WITHOUT_GRADIENTS, leaves_of([before]), numbers=made)
                self._memory.forget(tensor, self.engine.leaf(tensor, kind))
            self.without_gradients.clear()
        recorded = self.capture.records_gradients_at
        data = [root for root, by in self._memory.written() if not recorded(by)]
        for root in dict.fromkeys(data):
            by_itself = not any(recorded(n) for n in (root.node, *root.writers) if n is not None)
            if by_itself and root.node is not None:
                self._demand([root.node])
            if not (last and by_itself) and not self.engine.index_only(root.value):
                self._memory.spoil([root.tensor], "written into without gradients")

    def finished(self, node: fx.Node, outputs: list[tuple[torch.Tensor, Val]]) -> list[Val]:
        if node.op == "output":
            self._demand(node.all_input_nodes)
            return []
        if self._of_numbers and self._runs_pytorch:
            self._constants.note(node, makes=bool(outputs))
        self._runs_pytorch = True
        gave_up, self._gave_up = self._gave_up, None
        repeatable, self._repeatable = self._repeatable, True
        if gave_up is not None:
            self.give_ups[node] = gave_up
            self._demand(node.all_input_nodes, by=node)
        kinds = [self.engine.leaves[leaf].kind for leaf in self.engine.taken_whole]
        held = (k.only_node for k in kinds if isinstance(k, Opaque))
        self._demand((n for n in held if n is not None), by=node)
        self.engine.taken_whole.clear()
        out = []
        single = len(outputs) == 1 and not isinstance(node.meta.get("example_value"), list | tuple)
        assert self.capture is not None
        for tensor, val in outputs:
            compute = self._compute(node, tensor)
            if single and node in self.cuts:
                val = self.engine.leaf(tensor, Opaque(node, node.name))
            val = rooted(self.engine, node, val, tensor) if single else val
            val = whole_if_inside(self.engine, node, val, tensor, self._born_since()) if single else val
            val = unsplit(self.engine, node, val, given_to(node, self.known)) if single else val
            val = self._pieces.beside_others(node, val, tensor, repeatable) if single else val
            val = self._written_anew(node, val, tensor) if single and val.alt is not None else val
            if single and (self.engine.moves_along_a_feature(val) or self.engine.sums(val)):
                val = readable(self.engine, node, val, tensor, compute)
            val = self._pieces.of_a_window(node, val, tensor) if single else val
            out.append(val)
            if not self.capture.records_gradients_at(node) and not self.engine.index_only(val):
                self.without_gradients.append((node, tensor))
            if single:
                self.known[node] = Known(node, val, tensor, compute)
            if single and ONE_TENSOR in node.meta:
                self._demand([node])
                out[-1] = own_leaf(self.engine, node, val, tensor)
        return out

    # -------------------------------------------------------------------------------------------------------- details

    def _demand(self, nodes: Iterable[fx.Node], by: fx.Node | None = None) -> None:
        for node in nodes:
            known = self._current(node, by)
            if known is None or node in self.demanded:
                continue
            if self.engine.contracts(known.value) or self.engine.accumulates(known.value):
                self.demanded[node] = None

    @property
    def _node(self) -> fx.Node | None:
        return self.capture.node if self.capture is not None else None

    @property
    def _memory(self) -> Memory:
        assert self.capture is not None
        return self.capture.memory

    def _current(self, node: fx.Node, by: fx.Node | None = None) -> Known | None:
        """What is known of a node's tensor now, or before what ``by`` writes, which reads it, or before all that was
        written over a sum of products by what holds none.
        """
        known = self.known.get(node)
        if known is None:
            return None
        record = self._memory.record(known.tensor)
        writers = record.root.writers
        if not writers or writers == [by] or (value := self._memory.read(record)) is known.value:
            return known
        if self.engine.contracts(value) or not self.engine.contracts(known.value):
            known = self.known[node] = Known(node, value, known.tensor, known.compute, writers[-1])
        return known

    @property
    def fitted(self) -> Iterable[fx.Node]:
        """Tensors of the program's own numbers that are known by these."""
        return self._constants.fitted

    def sources(self, node: fx.Node) -> list[fx.Node]:
        """The values that a node is computed from, those that were written into it since among them.

        Of one that was written into before the node read it that is the later value, unless more was written since.
        """
        out = list(node.all_input_nodes)
        for given in out:
            known = self.known.get(given)
            if known is not None and all(w < node for w in self._memory.record(known.tensor).root.writers):
                self._current(given)
        known = self.known.get(node)
        if known is not None and known.after is not None:
            for writer in self._memory.record(known.tensor).root.writers:
                out += [n for n in writer.all_input_nodes if n is not node and n not in out]
        return out

    def _born_since(self) -> range:
        """The leaves that are new since this was asked for the node before."""
        before, self._leaves = self._leaves, len(self.engine.leaves)
        return range(before, self._leaves)

    def _written_anew(self, node: fx.Node, val: Val, tensor: torch.Tensor) -> Val:
        """What this node wrote into, as the tensor that it is now: what a product held before is gone from memory."""
        if node not in self._memory.record(tensor).root.writers[-1:]:
            return val
        return replace(val, alt=own_leaf(self.engine, node, val, tensor).one)

    def _compute(self, node: fx.Node, tensor: torch.Tensor) -> torch.dtype:
        """The widest float format on the way from plain data to this value."""
        out = tensor.dtype
        for arg in node.all_input_nodes:
            known = self.known.get(arg)
            if known is None or known.compute is out or not known.compute.is_floating_point:
                continue
            if self.engine.contracts(known.value):
                out = torch.promote_types(out, known.compute) if out.is_floating_point else known.compute
        return out
