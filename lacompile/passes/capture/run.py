"""One pass over one Dynamo graph, node by node."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg
from torch.utils._pytree import tree_map

from ..._compat import changes_mode
from .dispatch import Dispatch
from .effects import Boundary, Effects, storages
from .gradients import Gradients
from .memory import Memory
from .modes import AUTOCAST, GRAD_MODE, Autocasts, grad_modes
from .observer import Ignorant, Observer
from .standins import standins, tensors_in

CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint
DETACHES = ("detach_", torch.detach_)
"""What autograd alone sees: the operations below it write nothing, and yet no gradient passes any more."""


class Capture:
    """Runs a graph on tensors without numbers and shows every functional ATen operation to an observer."""

    def __init__(self, gm: fx.GraphModule, observer: Observer):
        self.gm = gm
        self.observer = observer
        self.memory = Memory(observer)
        self.effects = Effects()
        self.gradients = Gradients(self.effects)
        self._standins = standins(gm)
        self._dispatch = Dispatch(observer, self.memory, self.effects, self._standins)
        self._grad_modes = grad_modes(gm)
        self._autocasts = Autocasts()

    @property
    def node(self) -> fx.Node | None:
        """The node that is being run."""
        return self.memory.node

    @property
    def records_gradients(self) -> bool:
        return self.node is None or self._grad_modes[self.node]

    def records_gradients_at(self, node: fx.Node) -> bool:
        """Whether a node's gradients are recorded as far as it has some."""
        return self._grad_modes[node] or not self.gradients.reach(node)

    def run(self, example_inputs: Sequence[Any]) -> None:
        """Interprets the whole graph. A node that cannot run yields unknown tensors, nothing worse."""
        env: dict[fx.Node, Any] = {}
        reals = iter(example_inputs)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._standins.modes())
            stack.enter_context(torch.no_grad())
            stack.callback(self._autocasts.leave_all)
            for node in self.gm.graph.nodes:
                resumes = self._grad_modes[node] and not self.records_gradients
                self.memory.node = node
                if resumes:
                    self.observer.gradients_resume(last=node.op == "output")
                if node.op in ("placeholder", "get_attr"):
                    real = next(reals, None) if node.op == "placeholder" else None
                    env[node] = self._input(node, real) if node.op == "placeholder" else self._constant(node)
                    self.effects.lives[node] = storages([env[node]])
                    self.effects.outside |= self.effects.lives[node]
                    self.gradients.input(node, real if node.op == "placeholder" else self._held(node))
                elif node.op == "output":
                    env[node] = None
                    self.observer.finished(node, [])
                else:
                    self.observer.begins(node)
                    env[node] = self._step(node, env)
                    self._finish(node, env[node])
        self.memory.node = None

    def _input(self, node: fx.Node, real: Any) -> Any:
        example = node.meta.get("example_value", node.meta.get("val"))
        if isinstance(example, torch.Tensor):
            tensor = self._standins.of_example(example)  # what the graph writes in place must not touch Dynamo's own
            self.memory.enter(tensor, self.observer.source(node, tensor, real))
            return tensor
        return example

    def _constant(self, node: fx.Node) -> Any:
        attr = self._held(node)
        if isinstance(attr, torch.Tensor):
            tensor = self._standins.of_real(attr)
            self.memory.enter(tensor, self.observer.source(node, tensor, attr))
            return tensor
        return attr

    def _held(self, node: fx.Node) -> Any:
        attr: Any = self.gm
        for part in str(node.target).split("."):
            attr = getattr(attr, part)
        return attr

    # ------------------------------------------------------------------------------------------------------ one node

    def _step(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        args, kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
        if node.op == "call_function" and node.target in GRAD_MODE:
            return None
        if node.op == "call_function" and node.target in AUTOCAST:
            return self._autocasts.switch(node, args)
        if node.op == "call_function" and changes_mode(node.target) and not tensors_in((args, kwargs)):
            return None  # noted as impure, and not run
        if node.target is CHECKPOINT and not (does := self._boundary(args[0])).aliases:
            return self._called(node, args[1:], does)
        if node.target == "requires_grad_" and not self.records_gradients:
            self.effects.impure.add(node)  # it must stay; where gradients resume, the tensor is a leaf in any case
            return args[0]
        if node.target in (*DETACHES, "requires_grad_"):
            return self._opaque(node, args, kwargs, "autograd forgets it")
        try:
            with self._dispatch:
                result = self._standins.arrived(node, env, self._run(node, *self._standins.given(args, kwargs)))
            if not self._standins.are_right(node, result):
                raise TypeError("not what Dynamo saw")
        except Exception as error:  # whatever cannot run without numbers is unknown, and the analysis goes on
            return self._opaque(node, args, kwargs, type(error).__name__)
        return result

    def _run(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        module: Any = self.gm.get_submodule(str(node.target))
        return module(*args, **kwargs)

    def _finish(self, node: fx.Node, result: Any) -> None:
        self.effects.note_result(node, result)
        self.gradients.note(node)
        tensors = tensors_in(result)
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            for t in tensors:  # its derivative need not be that of the operations that it runs
                self.memory.forget(t, self.observer.unknown(t, f"{node.target}"))
        records = [self.memory.record(t) for t in tensors]
        outputs = [(t, self.memory.read(r)) for t, r in zip(tensors, records, strict=True)]
        for t, v in zip(tensors, self.observer.finished(node, outputs), strict=True):
            self.memory.record(t).value = v

    # -------------------------------------------------------------------------------------------- what is not run here

    @staticmethod
    def _boundary(body: Any) -> Boundary:
        """What a graph that this one calls does to it; a part of the body that cannot run is no more than that part."""
        inside = Capture(body, Ignorant())
        inside.run(())
        return inside.effects.boundary(body)

    def _called(self, node: fx.Node, given: Sequence[Any], does: Boundary) -> Any:
        """The results of a graph of its own: values that nothing is known about (see :meth:`_finish`)."""
        written = [given[n] for n in does.writes]
        if does.impure:
            self.effects.impure.add(node)
        self.effects.note_write(node, written)
        self.memory.spoil(written, "a checkpointed part writes into it")
        return self._fresh(node, f"{node.target}")

    def _opaque(self, node: fx.Node, args: Any, kwargs: Any, why: str) -> Any:
        """A node that could not be run may have written into every tensor that it was given."""
        name = str(node.target)
        given = tensors_in((args, kwargs)) if self._dispatch.failed is None else []
        self._dispatch.failed = None
        self.effects.impure.add(node)
        self.effects.note_write(node, given)
        self.memory.spoil(given, f"{name} may write into it")
        return self._fresh(node, f"{name}: {why}")

    def _fresh(self, node: fx.Node, why: str) -> Any:
        """What Dynamo says that a node yields, as tensors that nothing is known about."""

        def forget(t: Any) -> Any:
            if isinstance(t, torch.Tensor):
                fresh = self._standins.of_example(t)
                self.memory.enter_unknown(fresh, why)
                return fresh
            return t

        return tree_map(forget, node.meta.get("example_value", node.meta.get("val")))
