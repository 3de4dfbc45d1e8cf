"""The tensors that a graph is run on: they have a shape, a format and a storage, and no numbers.

Dynamo's fakes know of devices, symbolic sizes and autocast, and that costs more than all else of an operation. A graph
that has no use for these runs on meta tensors, and what becomes of a shape is asked for once: an unrolled loop does the
same to each of its tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Protocol

import torch
from torch import fx
from torch.utils._pytree import tree_leaves, tree_map_only

from ... import _compat
from .effects import storages
from .modes import switches_autocast
from .schemas import aliases

aten = torch.ops.aten

META = torch.device("meta")
TO_DEVICE = ("cpu", "cuda", "xpu", "mtia", "hpu", "ipu", "pin_memory", "new_tensor", "new")
"""Methods that send a tensor to a device which they name, or numbers to that of a tensor."""
RESHAPING = (
    "unsqueeze_", "squeeze_", "transpose_", "t_", "swapaxes_", "swapdims_",
    "as_strided_", "resize_", "resize_as_", "set_",
)  # fmt: skip
"""Methods after which a tensor is of another shape: what Dynamo saw of it before is not known any more."""


class Standins(Protocol):
    """What stands for the tensors of a graph while it runs."""

    def modes(self) -> contextlib.AbstractContextManager[None]:
        """On while the graph runs."""
        ...

    def of_example(self, example: torch.Tensor) -> torch.Tensor:
        """For a tensor that Dynamo made a fake of: another one in the same storage."""
        ...

    def of_real(self, real: torch.Tensor) -> torch.Tensor:
        """For a tensor with numbers that the graph holds."""
        ...

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a node, in the terms of these tensors."""
        ...

    def call(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The results of an ATen operation."""
        ...

    def arrived(self, node: fx.Node, env: Mapping[fx.Node, Any], result: Any) -> Any:
        """What a node yields, given the values before it: what was sent to another device is in memory of its own."""
        ...

    def are_right(self, node: fx.Node, result: Any) -> bool:
        """Whether a node's result has the shapes and formats that Dynamo saw; True where nothing is known of that."""
        ...


def standins(gm: fx.GraphModule) -> Standins:
    """The cheapest ones that are right for this graph."""
    mode = fake_mode_of(gm)
    if mode is None or _needs_fakes(gm, mode):
        return Fakes(mode)
    return Metas(mode, several_devices=len(set().union(*map(_devices, gm.graph.nodes))) > 1)


class Fakes:
    """Fake tensors of the mode that Dynamo traced in; None for a graph without tensors."""

    def __init__(self, mode: Any):
        self._mode = mode

    @contextlib.contextmanager
    def modes(self) -> Iterator[None]:
        if self._mode is None:
            yield
            return
        quiet, symbolic = _compat.suppressed_guards(self._mode), _compat.symbolic_kernels(self._mode)
        with self._mode, quiet, symbolic, _compat.numbers_on_the_cpu():
            yield

    def of_example(self, example: torch.Tensor) -> torch.Tensor:
        return example.detach()

    def of_real(self, real: torch.Tensor) -> torch.Tensor:
        return real if self._mode is None else self._mode.from_tensor(real)

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs

    def call(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        return _as_view(func)(*args, **kwargs)

    def arrived(self, node: fx.Node, env: Mapping[fx.Node, Any], result: Any) -> Any:
        return result  # they know where they are

    def are_right(self, node: fx.Node, result: Any) -> bool:
        return True  # they are Dynamo's own


Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]


class Metas:
    """Meta tensors, wherever Dynamo's are; what an operation makes of a shape is remembered."""

    def __init__(self, mode: Any, several_devices: bool):
        self._mode = mode
        self._several_devices = several_devices
        self._made: dict[Any, list[Layout]] = {}

    def modes(self) -> contextlib.AbstractContextManager[None]:
        return _compat.numbers_on_the_cpu()

    def of_example(self, example: torch.Tensor) -> torch.Tensor:
        empty = torch.empty(0, dtype=example.dtype, device=META)
        return empty.set_(example.untyped_storage(), example.storage_offset(), example.shape, example.stride())

    def of_real(self, real: torch.Tensor) -> torch.Tensor:
        return self.of_example(self._mode.from_tensor(real, static_shapes=True))

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A tensor that is sent to the device where it is stays what it is."""
        if not any(isinstance(a, torch.Tensor) for a in args):
            return args, kwargs
        here = {k: META if _is_device(a) else a for k, a in kwargs.items()} if kwargs else kwargs
        return tuple([META if _is_device(a) else a for a in args]), here

    def call(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        kwargs.pop("pin_memory", None)
        if kwargs.get("device") is not None or _chooses_device(func):
            kwargs["device"] = META
        if _has_numbers((*args, *kwargs.values())):
            args, kwargs = tree_map_only(torch.Tensor, self._as_meta, (args, kwargs))
        key = _key((func, *args, *kwargs.items())) if _is_remembered(func) else None
        if key is None:
            return _as_view(func)(*args, **kwargs)
        if (layouts := self._made.get(key)) is not None:
            made = [torch.empty_strided(shape, stride, dtype=dtype, device=META) for shape, stride, dtype in layouts]
            return made[0] if len(made) == 1 else tuple(made)
        out = func(*args, **kwargs)
        if all(map(_is_strided, outs := out if isinstance(out, tuple) else (out,))):
            self._made[key] = [(x.shape, x.stride(), x.dtype) for x in outs]
        return out

    def arrived(self, node: fx.Node, env: Mapping[fx.Node, Any], result: Any) -> Any:
        if not self._several_devices:
            return result
        there = _devices(node)
        sent = [n for n in node.all_input_nodes if _devices(n) - there]
        if not sent:
            return result
        if len(there) > 1:
            raise TypeError("results on several devices")
        memory = storages(t for n in sent for t in tensors_in(env[n]))
        copy: Any = aten._to_copy.default
        return tree_map_only(torch.Tensor, lambda t: copy(t, dtype=t.dtype) if storages([t]) & memory else t, result)

    def are_right(self, node: fx.Node, result: Any) -> bool:
        got, seen = tensors_in(result), _examples(node)
        return not seen or [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in seen]

    def _as_meta(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if tensor.is_meta else self.of_real(tensor)


def _as_view(func: Any) -> Any:
    """The same on tensors without numbers, where PyTorch remembers for views alone what becomes of a shape."""
    return aten.view.default if func is aten._unsafe_view.default else func


@cache
def _chooses_device(func: Any) -> bool:
    """Whether it makes a tensor on the device that is given, or on the default one."""
    arguments = func._schema.arguments
    return any(a.name == "device" for a in arguments) and not any(
        isinstance(a.type, torch.TensorType) for a in arguments
    )


@cache
def _is_remembered(func: Any) -> bool:
    """Whether shapes and formats say all of its results: tensors in memory of their own."""
    plain = all(isinstance(r.type, torch.TensorType) for r in func._schema.returns)
    return func.namespace == "aten" and plain and not aliases(func) and func is not aten._unsafe_view.default


def _has_numbers(arg: Any) -> bool:
    if isinstance(arg, torch.Tensor):
        return not arg.is_meta
    return isinstance(arg, list | tuple) and any(map(_has_numbers, arg))


def _key(arg: Any) -> Any:
    """What a result's shape depends on in an argument; None if it cannot be told."""
    if isinstance(arg, torch.Tensor):
        return (arg.dtype, arg.shape, arg.stride()) if _is_strided(arg) else None
    if isinstance(arg, list | tuple):
        parts = tuple(map(_key, arg))
        return None if None in parts else parts
    return type(arg), arg


def _is_strided(x: Any) -> bool:
    return type(x) is torch.Tensor and x.layout is torch.strided and not x.is_complex()


def _is_device(arg: Any) -> bool:
    return isinstance(arg, torch.device) or (isinstance(arg, str) and _spells_device(arg))


@cache
def _spells_device(text: str) -> bool:
    try:
        torch.device(text)
    except RuntimeError:
        return False
    return True


def _needs_fakes(gm: fx.GraphModule, mode: Any) -> bool:
    """Whether something in the graph may depend on what a meta tensor does not know.

    That is a size that is a symbol, an autocast, which asks for the device, a method that names one, an input that is
    no plain tensor, and a shape that changes.
    """
    if _compat.has_symbols(mode) or _compat.in_autocast():
        return True
    graphs = [m.graph for m in gm.modules() if isinstance(m, fx.GraphModule)]
    nodes = [n for graph in graphs for n in graph.nodes]
    return (
        any(map(switches_autocast, graphs))
        or any(n.op == "call_method" and (n.target in TO_DEVICE or n.target in RESHAPING) for n in nodes)
        or not all(_is_plain(n) for n in nodes if n.op in ("placeholder", "get_attr"))
    )


def _is_plain(node: fx.Node) -> bool:
    return all(
        _compat.is_fake(t) and t.layout is torch.strided and not (t.is_complex() or t.is_quantized)
        for t in _examples(node)
    )


def _devices(node: fx.Node) -> set[torch.device | None]:
    return {_compat.fake_device(t) for t in _examples(node)}


def _examples(node: fx.Node) -> list[torch.Tensor]:
    return tensors_in(node.meta.get("example_value", node.meta.get("val")))


def tensors_in(tree: Any) -> list[torch.Tensor]:
    return [tree] if isinstance(tree, torch.Tensor) else [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


def fake_mode_of(gm: fx.GraphModule) -> Any:
    """The mode the graph was traced in; None for a graph without tensors."""
    modes = (getattr(t, "fake_mode", None) for node in gm.graph.nodes for t in _examples(node))
    return next((mode for mode in modes if mode is not None), None)
