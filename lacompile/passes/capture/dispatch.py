"""The dispatch mode below the interpreter: every ATen operation, as it runs, shown as a functional one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ... import _compat
from .effects import ANYWHERE, Effects, storages
from .functional import functional
from .memory import Memory, ViewStep
from .observer import Observer
from .schemas import METADATA_QUERIES, aliases, moves, written
from .standins import Standins

aten = torch.ops.aten

NO_VALUES = ("device", "layout", "pin_memory", "memory_format")  # keywords that say nothing of numbers


class Dispatch(TorchDispatchMode):
    """Shows what runs inside it to an observer; notes what it writes into."""

    def __init__(self, observer: Observer, memory: Memory, effects: Effects, standins: Standins):
        super().__init__()
        self.observer, self.memory, self.effects, self.standins = observer, memory, effects, standins
        self._made: dict[int, Any] = {}  # storages, and the node that they are made in
        self.failed: Any = None  # the operation that raised, if it is one that writes nothing

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func.namespace == "prim" or func in METADATA_QUERIES:
            device = _compat.fake_device(args[0]) if func is torch.ops.prim.device.default else None
            return func(*args, **kwargs) if device is None else device
        values, dtypes = [self._value(a) for a in args], [_dtypes(a) for a in args]
        kw = {k: self._value(v) for k, v in kwargs.items() if k not in NO_VALUES}
        targets = written(func, args, kwargs)
        node = self.memory.node
        assert node is not None
        if targets and moves(func):
            # what shares its old storage is no longer told apart from what shares its new one
            self.effects.lives[node] = self.effects.writes[node] = frozenset({ANYWHERE})
        self.failed = None if targets else func
        out = self.standins.call(func, args, kwargs)
        self.failed = None
        self.effects.note_operation(node, func, args, kwargs, out)
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.effects.impure.add(node)
        if targets:
            self.effects.note_write(node, [t for t in targets if not self._is_temporary(t)])
            self._mutating(func, args, values, kw, dtypes, out, targets)
            return out
        result = self.observer.operation(func, values, kw, out, dtypes)
        if isinstance(out, torch.Tensor):
            if not self.memory.knows(out) or not any(out is a for a in args):
                self._enter(func, args, kw, out, result, None, out)
        elif isinstance(out, list | tuple):
            for n, (t, v) in enumerate(zip(out, result, strict=False)):
                if isinstance(t, torch.Tensor):
                    self._enter(func, args, kw, t, v, n, out)
        return out

    def _value(self, arg: Any) -> Any:
        if isinstance(arg, torch.Tensor):
            return self.memory.read(self.memory.record(arg))
        if isinstance(arg, list | tuple) and any(isinstance(a, torch.Tensor) for a in arg):
            return [self._value(a) for a in arg]
        return arg

    def _enter(
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
        if aliases(func) and base is not None and self.memory.knows(base) and func is not aten.contiguous.default:
            step = ViewStep(func, list(args), kw, n, base, all_out)
            self.memory.enter(out, value, self.memory.record(base), step)
        else:
            self.memory.enter(out, value)
            for storage in storages([out]) - storages(tree_leaves((args, kw))):
                self._made[storage] = self.memory.node

    def _is_temporary(self, tensor: torch.Tensor) -> bool:
        """Whether it lives where no other node can have seen it yet: in memory that this one has made."""
        return all(s != ANYWHERE and self._made.get(s) is self.memory.node for s in storages([tensor]))

    def _mutating(
        self,
        func: Any,
        args: Sequence[Any],
        values: list[Any],
        kw: dict[str, Any],
        dtypes: list[Any],
        out: Any,
        targets: list[torch.Tensor],
    ) -> None:
        twin = functional(func)
        if len(targets) == 1 and targets[0] is args[0] and twin is not None:
            self.memory.overwrite(targets[0], twin(self.observer, values, kw, targets[0], dtypes))
            return
        self.memory.spoil(targets, f"{func} writes into it")
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and not self.memory.knows(t):
                self.memory.enter_unknown(t, f"{func}")


def _dtypes(arg: Any) -> Any:
    """The dtype of a tensor argument, a tuple of them for a list of tensors, else None."""
    if isinstance(arg, list | tuple):
        return tuple(map(_dtypes, arg)) if any(isinstance(a, torch.Tensor) for a in arg) else None
    return arg.dtype if isinstance(arg, torch.Tensor) else None
