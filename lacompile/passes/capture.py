"""Runs a Dynamo graph on fake tensors and shows every functional ATen operation to an observer.

The graph is neither copied nor re-emitted: a dispatch mode below the interpreter sees the ~12 kinds of operations that
remain of hundreds, and each one belongs to the Dynamo node being run. That costs a tenth of building a second graph
with ``make_fx``. Mutation is undone here: an in-place write becomes the value it leaves behind, and every view of the
written tensor follows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import fx
from torch.fx.node import map_arg
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from .. import _compat
from .._compat import changes_mode, suppressed_guards, symbolic_kernels
from .effects import ANYWHERE, Boundary, Effects, storages

aten = torch.ops.aten

METADATA_QUERIES = {
    aten.sym_size.int,
    aten.sym_size.default,
    aten.sym_stride.int,
    aten.sym_stride.default,
    aten.sym_numel.default,
    aten.sym_storage_offset.default,
    aten.is_contiguous.default,
}

GRAD_MODE = (torch._C._set_grad_enabled, torch.set_grad_enabled)
INFERENCE_MODE = (torch.autograd.grad_mode._enter_inference_mode, torch.autograd.grad_mode._exit_inference_mode)
CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint
AUTOCAST = (torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast)
# Operators that write although their schemas do not say so: (positions of) the running statistics.
UNDECLARED_WRITES = {aten.native_batch_norm: (3, 4), aten.cudnn_batch_norm: (3, 4), aten.miopen_batch_norm: (3, 4)}
# After these the tensor lives elsewhere, or is another one.
MOVES = ("set_", "set_data", "resize_", "resize_as_", "swap_")


def grad_modes(gm: fx.GraphModule) -> dict[fx.Node, bool]:
    """Whether gradients are recorded when each node runs."""
    enabled = torch.is_grad_enabled()
    outside: list[bool] = []
    out = {}
    for node in gm.graph.nodes:
        out[node] = enabled
        if node.op == "call_function" and node.target in GRAD_MODE and isinstance(node.args[0], bool):
            enabled = node.args[0]
        elif node.target is INFERENCE_MODE[0] and node.args[0]:
            outside.append(enabled)
            enabled = False
        elif node.target is INFERENCE_MODE[1] and outside:
            enabled = outside.pop()
    return out


class Observer(Protocol):
    """What the lift implements; values are whatever it likes."""

    def source(self, node: fx.Node, tensor: torch.Tensor, real: Any) -> Any:
        """The value of a graph input or a constant."""

    def operation(self, func: Any, args: list[Any], kwargs: dict[str, Any], out: Any, dtypes: list[Any]) -> Any:
        """The value (or list of values) of one functional operation; tensor arguments arrive as values."""

    def unknown(self, tensor: torch.Tensor, why: str) -> Any:
        """The value of a tensor that nothing is known about."""

    def write(self, base: Any, view: ViewStep, new: Any, tensor: torch.Tensor) -> Any:
        """The value of a tensor one of whose views now holds ``new``."""

    def gradients_resume(self) -> None:
        """Called where a part of the program that recorded no gradients ends."""

    def finished(self, node: fx.Node, outputs: list[tuple[torch.Tensor, Any]]) -> list[Any]:
        """Called after each Dynamo node with its tensor outputs; may replace their values."""
        ...


class Ignorant:
    """The observer of a graph that is run for its effects alone."""

    def source(self, node: fx.Node, tensor: torch.Tensor, real: Any) -> None: ...

    def operation(self, func: Any, args: list[Any], kwargs: dict[str, Any], out: Any, dtypes: list[Any]) -> Any:
        return [None] * len(out) if isinstance(out, list | tuple) else None

    def unknown(self, tensor: torch.Tensor, why: str) -> None: ...

    def write(self, base: Any, view: ViewStep, new: Any, tensor: torch.Tensor) -> None: ...

    def gradients_resume(self) -> None: ...

    def finished(self, node: fx.Node, outputs: list[tuple[torch.Tensor, Any]]) -> list[Any]:
        return [None] * len(outputs)


@dataclass
class ViewStep:
    """How a view was made from its parent, so that it can be made again, and written through."""

    func: Any
    args: list[Any]
    kwargs: dict[str, Any]
    index: int | None  # which of several results
    parent_tensor: torch.Tensor
    out: Any


@dataclass(eq=False)
class Record:
    """One fake tensor: its value, and where it lives."""

    tensor: torch.Tensor
    value: Any
    parent: Record | None = None
    step: ViewStep | None = None
    writes: int = 0  # of a root: how often the storage was written
    seen: int = 0  # the root's count when ``value`` was computed
    node: fx.Node | None = None  # while which it was made

    @property
    def root(self) -> Record:
        r = self
        while r.parent is not None:
            r = r.parent
        return r


class Capture(TorchDispatchMode):
    """One pass over one Dynamo graph."""

    def __init__(self, gm: fx.GraphModule, observer: Observer):
        super().__init__()
        self.gm = gm
        self.observer = observer
        self.records: dict[int, Record] = {}
        self.roots: dict[int, list[Record]] = {}  # by storage: those that are no view of another record
        self.effects = Effects()
        self.mutated: list[tuple[fx.Node, torch.Tensor]] = []
        self.node: fx.Node | None = None
        self.grad_modes = grad_modes(gm)
        self._autocast: list[Any] = []
        self._failed: Any = None  # the operation that raised, if it is one that writes nothing

    # ------------------------------------------------------------------------------------------------------ records

    def record(self, tensor: torch.Tensor) -> Record:
        found = self.records.get(id(tensor))
        if found is None:
            found = self.enter(tensor, self.observer.unknown(tensor, "a tensor from outside the trace"))
        return found

    def enter(self, tensor: torch.Tensor, value: Any, parent: Record | None = None, step: Any = None) -> Record:
        rec = Record(tensor, value, parent, step, node=self.node)
        rec.seen = rec.root.writes
        self.records[id(tensor)] = rec
        if parent is None:
            for storage in storages([tensor]):
                self.roots.setdefault(storage, []).append(rec)
        return rec

    def read(self, rec: Record) -> Any:
        """The value of a tensor now: a view of a tensor written since is made again."""
        root = rec.root
        if rec.seen != root.writes:
            assert rec.parent is not None and rec.step is not None
            rec.value = self._replay(rec.step, self.read(rec.parent))
            rec.seen = root.writes
        return rec.value

    def _replay(self, step: ViewStep, parent: Any) -> Any:
        args = [parent if isinstance(a, torch.Tensor) else a for a in step.args]
        dtypes = [step.parent_tensor.dtype if isinstance(a, torch.Tensor) else None for a in step.args]
        out = self.observer.operation(step.func, args, step.kwargs, step.out, dtypes)
        return out if step.index is None else out[step.index]

    def forget(self, tensor: torch.Tensor, value: Any) -> None:
        """From now on ``tensor`` is ``value``, and no view of another one."""
        self.records[id(tensor)] = Record(tensor, value)

    def overwrite(self, rec: Record, value: Any) -> None:
        """``rec``'s storage now holds ``value`` there; tensors that contain it change with it."""
        if self.node is not None:
            self.mutated.append((self.node, rec.tensor))
        path = [rec]
        while path[-1].parent is not None:
            path.append(path[-1].parent)
        bases = [self.read(r) for r in path]
        root = path[-1]
        root.writes += 1
        rec.value, rec.seen = value, root.writes
        for child, parent, base in zip(path, path[1:], bases[1:], strict=False):
            assert child.step is not None
            parent.value = self.observer.write(base, child.step, child.value, parent.tensor)
            parent.seen = root.writes
        self._forget_aliases(root)

    def _forget_aliases(self, written: Record) -> None:
        """Tensors that share the written storage in a way that no view of this graph explains, as two inputs may."""
        for storage in storages([written.tensor]):
            for other in self.roots.get(storage, ()):
                if other is not written:
                    other.writes += 1
                    other.value = self.observer.unknown(other.tensor, "a tensor it shares memory with was written to")
                    other.seen = other.writes

    # ----------------------------------------------------------------------------------------------------- dispatch

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func.namespace == "prim" or func in METADATA_QUERIES:
            device = _compat.fake_device(args[0]) if func is torch.ops.prim.device.default else None
            return func(*args, **kwargs) if device is None else device
        values, dtypes = self._values(args)
        kw = {
            k: self._value(v) for k, v in kwargs.items() if k not in ("device", "layout", "pin_memory", "memory_format")
        }
        written = self._written(func, args, kwargs)
        self._failed = None if written else func
        out = func(*args, **kwargs)
        self._failed = None
        assert self.node is not None
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.effects.impure.add(self.node)
        if written:
            self.effects.note_write(self.node, written)
            self._mutating(func, args, values, kw, dtypes, out, written)
            return out
        result = self.observer.operation(func, values, kw, out, dtypes)
        if isinstance(out, torch.Tensor):
            if id(out) not in self.records or not any(out is a for a in args):
                self._enter_result(func, args, kw, out, result, None, out)
        elif isinstance(out, list | tuple):
            for n, (t, v) in enumerate(zip(out, result, strict=False)):
                if isinstance(t, torch.Tensor):
                    self._enter_result(func, args, kw, t, v, n, out)
        return out

    def _values(self, args: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        return [self._value(a) for a in args], [_dtypes(a) for a in args]

    def _value(self, arg: Any) -> Any:
        if isinstance(arg, torch.Tensor):
            return self.read(self.record(arg))
        if isinstance(arg, list | tuple) and any(isinstance(a, torch.Tensor) for a in arg):
            return [self._value(a) for a in arg]
        return arg

    def _enter_result(
        self,
        func: Any,
        args: Sequence[Any],
        kw: dict[str, Any],
        out: torch.Tensor,
        value: Any,
        n: int | None,
        all_out: Any,
    ) -> None:
        base = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if _aliases(func) and base is not None and id(base) in self.records and func is not aten.contiguous.default:
            step = ViewStep(func, list(args), kw, n, base, all_out)
            self.enter(out, value, self.records[id(base)], step)
        else:
            self.enter(out, value)

    def _written(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """The tensors that an operation writes into."""
        positions, keywords = _declared_writes(func)
        if not (positions or keywords):
            return []
        held = [args[n] for n in positions if n < len(args)]
        held += [v for k, v in kwargs.items() if k in keywords]
        written = [t for t in tree_leaves(held) if isinstance(t, torch.Tensor)]
        if written and func.overloadpacket.__name__ in MOVES:
            # what shares its old storage is no longer told apart from what shares its new one
            assert self.node is not None
            self.effects.lives[self.node] = self.effects.writes[self.node] = frozenset({ANYWHERE})
        return written

    def _mutating(
        self,
        func: Any,
        args: Sequence[Any],
        values: list[Any],
        kw: dict[str, Any],
        dtypes: list[Any],
        out: Any,
        written: list[torch.Tensor],
    ) -> None:
        functional = _functional_of(func)
        if len(written) == 1 and written[0] is args[0] and functional is not None:
            self.overwrite(self.record(written[0]), functional(self.observer, values, kw, written[0], dtypes))
            return
        for t in written:
            self.overwrite(self.record(t), self.observer.unknown(t, f"{func} writes into it"))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and id(t) not in self.records:
                self.enter(t, self.observer.unknown(t, f"{func}"))

    # -------------------------------------------------------------------------------------------------- interpretation

    @property
    def records_gradients(self) -> bool:
        return self.node is None or self.grad_modes[self.node]

    def run(self, example_inputs: Sequence[Any]) -> None:
        """Interprets the whole graph. A node that cannot run on fakes yields unknown tensors, nothing worse."""
        fake_mode = fake_mode_of(self.gm)
        env: dict[fx.Node, Any] = {}
        reals = iter(example_inputs)
        with contextlib.ExitStack() as stack:
            if fake_mode is not None:
                stack.enter_context(fake_mode)
                stack.enter_context(suppressed_guards(fake_mode))
                stack.enter_context(symbolic_kernels(fake_mode))
            stack.enter_context(torch.no_grad())
            stack.callback(self._leave_autocast)
            for node in self.gm.graph.nodes:
                resumes = self.node is not None and self.grad_modes[node] and not self.grad_modes[self.node]
                self.node = node
                if resumes:
                    self.observer.gradients_resume()
                if node.op in ("placeholder", "get_attr"):
                    real = next(reals, None) if node.op == "placeholder" else None
                    env[node] = self._input(node, real) if node.op == "placeholder" else self._constant(node, fake_mode)
                    self.effects.lives[node] = storages([env[node]])
                    self.effects.outside |= self.effects.lives[node]
                elif node.op == "output":
                    env[node] = None
                    self.observer.finished(node, [])
                else:
                    env[node] = self._step(node, env)
                    self._finish(node, env[node])
        self.node = None

    def _input(self, node: fx.Node, real: Any) -> Any:
        example = node.meta.get("example_value", node.meta.get("val"))
        if isinstance(example, torch.Tensor):
            tensor = example.detach()  # in-place operations of the trace must not touch Dynamo's own fake
            self.enter(tensor, self.observer.source(node, tensor, real))
            return tensor
        return example

    def _constant(self, node: fx.Node, fake_mode: Any) -> Any:
        attr: Any = self.gm
        for part in str(node.target).split("."):
            attr = getattr(attr, part)
        if isinstance(attr, torch.Tensor) and fake_mode is not None:
            tensor = fake_mode.from_tensor(attr)
            self.enter(tensor, self.observer.source(node, tensor, attr))
            return tensor
        return attr

    def _step(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        args, kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
        if node.op == "call_function" and node.target in GRAD_MODE:
            return None
        if node.op == "call_function" and node.target in AUTOCAST:
            return self._switch_autocast(node, args)
        if node.op == "call_function" and changes_mode(node.target) and not self._tensors(args, kwargs):
            return None  # noted as impure, and not run
        if node.target is CHECKPOINT and not (does := self._boundary(args[0])).aliases:
            return self._called(node, args[1:], does)
        try:
            with self:
                if node.op == "call_function":
                    return node.target(*args, **kwargs)  # type: ignore[operator]
                if node.op == "call_method":
                    return getattr(args[0], str(node.target))(*args[1:], **kwargs)
                module: Any = self.gm.get_submodule(str(node.target))
                return module(*args, **kwargs)
        except Exception as error:  # whatever cannot run on fakes is unknown, and the analysis goes on
            return self._opaque(node, args, kwargs, error)

    @staticmethod
    def _tensors(args: Any, kwargs: Any) -> list[torch.Tensor]:
        return [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]

    def _switch_autocast(self, node: fx.Node, args: Any) -> Any:
        if node.target is AUTOCAST[0]:
            self._autocast.append(AUTOCAST[0](*args))
            return self._autocast[-1]
        self._autocast.remove(args[0])
        return AUTOCAST[1](args[0])

    def _leave_autocast(self) -> None:
        for mode in reversed(self._autocast):
            AUTOCAST[1](mode)

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
        for t in written:
            self.overwrite(self.record(t), self.observer.unknown(t, "a checkpointed part writes into it"))
        return self._fresh(node, f"{node.target}")

    def _opaque(self, node: fx.Node, args: Any, kwargs: Any, error: Exception) -> Any:
        """A node that could not be run may have written into every tensor that it was given."""
        name = str(node.target)
        given = self._tensors(args, kwargs) if self._failed is None else []
        self._failed = None
        self.effects.impure.add(node)
        self.effects.note_write(node, given)
        for t in given:
            self.overwrite(self.record(t), self.observer.unknown(t, f"{name} may write into it"))
        return self._fresh(node, f"{name}: {type(error).__name__}")

    def _fresh(self, node: fx.Node, why: str) -> Any:
        """What Dynamo says that a node yields, as tensors that nothing is known about."""

        def forget(t: Any) -> Any:
            if isinstance(t, torch.Tensor):
                fresh = t.detach()
                self.enter(fresh, self.observer.unknown(fresh, why))
                return fresh
            return t

        return tree_map(forget, node.meta.get("example_value", node.meta.get("val")))

    def _finish(self, node: fx.Node, result: Any) -> None:
        self.effects.note_result(node, result)
        leaves = [result] if isinstance(result, torch.Tensor) else tree_leaves(result)
        tensors = [t for t in leaves if isinstance(t, torch.Tensor)]
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            for t in tensors:  # its derivative need not be that of the operations that it runs
                self.forget(t, self.observer.unknown(t, f"{node.target}"))
        outputs = [(t, self.read(self.record(t))) for t in tensors]
        for (t, _), v in zip(outputs, self.observer.finished(node, outputs), strict=True):
            self.records[id(t)].value = v


def fake_mode_of(gm: fx.GraphModule) -> Any:
    """The mode the graph was traced in; None for a graph without tensors."""
    for node in gm.graph.nodes:
        example = node.meta.get("example_value", node.meta.get("val"))
        for t in tree_leaves(example):
            mode = getattr(t, "fake_mode", None)
            if mode is not None:
                return mode
    return None


Functional = Callable[[Any, list[Any], dict[str, Any], torch.Tensor, list[Any]], Any]


def _copied(obs: Any, vals: list[Any], kw: dict[str, Any], t: torch.Tensor, dtypes: list[Any]) -> Any:
    """What ``copy_`` leaves in ``t``: the source in t's dtype and shape."""
    source = obs.operation(aten.expand.default, [vals[1], list(t.shape)], {}, t.to(dtypes[1]), [dtypes[1]])
    return obs.operation(aten._to_copy.default, [source], {"dtype": t.dtype}, t, [dtypes[1]])


def _dtypes(arg: Any) -> Any:
    """The dtype of a tensor argument, a tuple of them for a list of tensors, else None."""
    if isinstance(arg, list | tuple):
        return tuple(map(_dtypes, arg)) if any(isinstance(a, torch.Tensor) for a in arg) else None
    return arg.dtype if isinstance(arg, torch.Tensor) else None


@cache
def _declared_writes(func: Any) -> tuple[tuple[int, ...], frozenset[str]]:
    """Positions and names of the arguments that an operation writes into."""
    schema = func._schema.arguments
    positions = [n for n, s in enumerate(schema) if s.is_write]
    positions += UNDECLARED_WRITES.get(func.overloadpacket, ())
    return tuple(positions), frozenset(s.name for s in schema if s.is_write)


@cache
def _aliases(func: Any) -> bool:
    """Whether a result may share the memory of an argument."""
    return any(a.alias_info is not None for a in func._schema.arguments)


@cache
def _functional_of(func: Any) -> Functional | None:
    """What an in-place operation computes, as a functional one on the same arguments."""
    packet = func.overloadpacket
    name = packet.__name__
    if packet is aten.copy_ or func is aten.fill_.Tensor:
        return _copied
    if packet in (aten.zero_, aten.fill_):
        fill = (lambda vals: 0.0) if packet is aten.zero_ else (lambda vals: vals[1])
        return lambda obs, vals, kw, t, dts: obs.operation(
            aten.full_like.default, [vals[0], fill(vals)], {}, t, [dts[0]]
        )
    base = getattr(aten, name[:-1], None) if name.endswith("_") and not name.endswith("__") else None
    if base is None or func._overloadname not in base.overloads():
        return None
    overload = getattr(base, func._overloadname)
    return lambda obs, vals, kw, t, dts: obs.operation(overload, vals, kw, t, dts)
