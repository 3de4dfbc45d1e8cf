"""What every tensor of the trace holds now: mutation is undone here.

An in-place write becomes the value it leaves behind. The tensors that contain the written one take it in at once; every
other view of them is made again when it is next read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from .effects import storages

if TYPE_CHECKING:
    from .observer import Observer


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
    node: fx.Node | None = None  # while which it was made
    writers: list[fx.Node] = field(default_factory=list)  # of a root: the nodes that wrote into its storage, in order
    seen: int = 0  # how many of its root's writers had written when ``value`` was computed

    @property
    def root(self) -> Record:
        r = self
        while r.parent is not None:
            r = r.parent
        return r


class Memory:
    """The tensors of one run and their values."""

    def __init__(self, observer: Observer):
        self.observer = observer
        self.node: fx.Node | None = None  # the Dynamo node that is being run
        self._records: dict[int, Record] = {}
        self._roots: dict[int, list[Record]] = {}  # by storage: those that are no view of another record
        self._written: list[tuple[Record, fx.Node]] = []

    def knows(self, tensor: torch.Tensor) -> bool:
        return id(tensor) in self._records

    def record(self, tensor: torch.Tensor) -> Record:
        found = self._records.get(id(tensor))
        if found is None:
            found = self.enter(tensor, self.observer.unknown(tensor, "a tensor from outside the trace"))
        return found

    def enter(self, tensor: torch.Tensor, value: Any, parent: Record | None = None, step: Any = None) -> Record:
        rec = Record(tensor, value, parent, step, node=self.node)
        rec.seen = len(rec.root.writers)
        self._records[id(tensor)] = rec
        if parent is None:
            for storage in storages([tensor]):
                self._roots.setdefault(storage, []).append(rec)
        return rec

    def enter_unknown(self, tensor: torch.Tensor, why: str) -> None:
        self.enter(tensor, self.observer.unknown(tensor, why))

    def forget(self, tensor: torch.Tensor, value: Any) -> None:
        """From now on ``tensor`` is ``value``, and no view of another one."""
        self._records[id(tensor)] = Record(tensor, value)

    def written(self) -> list[tuple[Record, fx.Node]]:
        """The roots that were written into since this was last asked, each with the writer; none that was forgotten."""
        found, self._written = self._written, []
        return found

    # -------------------------------------------------------------------------------------------------------- reading

    def read(self, rec: Record) -> Any:
        """The value of a tensor now: a view of a tensor written since is made again."""
        writes = len(rec.root.writers)
        if rec.seen != writes:
            assert rec.parent is not None and rec.step is not None
            rec.value = self._replay(rec.step, self.read(rec.parent))
            rec.seen = writes
        return rec.value

    def made_from(self, rec: Record, value: Any, base: Record | None = None) -> Any:
        """What a tensor is, if ``base`` that it is a view of, or else its root, has this value."""
        if rec is base or rec.parent is None or rec.step is None:
            return value
        return self._replay(rec.step, self.made_from(rec.parent, value, base))

    def _replay(self, step: ViewStep, parent: Any) -> Any:
        args = [parent if isinstance(a, torch.Tensor) else a for a in step.args]
        dtypes = [step.parent_tensor.dtype if isinstance(a, torch.Tensor) else None for a in step.args]
        out = self.observer.operation(step.func, args, step.kwargs, step.out, dtypes)
        return out if step.index is None else out[step.index]

    # -------------------------------------------------------------------------------------------------------- writing

    def overwrite(self, tensor: torch.Tensor, value: Any) -> None:
        """``tensor`` now holds ``value``; tensors that contain it change with it."""
        assert self.node is not None
        rec = self.record(tensor)
        path = [rec]
        while path[-1].parent is not None:
            path.append(path[-1].parent)
        bases = [self.read(r) for r in path]
        root = path[-1]
        self._note_write(root, self.node)
        rec.value, rec.seen = value, len(root.writers)
        for child, parent, base in zip(path, path[1:], bases[1:], strict=False):
            assert child.step is not None
            parent.value = self.observer.write(base, child.step, child.value, parent.tensor)
            parent.seen = len(root.writers)
        self._forget_aliases(root, self.node)

    def spoil(self, tensors: Sequence[torch.Tensor], why: str) -> None:
        """Nothing is known any more of what these tensors hold."""
        for t in tensors:
            self.overwrite(t, self.observer.unknown(t, why))

    def _note_write(self, root: Record, by: fx.Node) -> None:
        root.writers.append(by)
        if root.node is not None:
            self._written.append((root, by))

    def _forget_aliases(self, written: Record, by: fx.Node) -> None:
        """Tensors that share the written storage in a way that no view of this graph explains, as two inputs may."""
        for storage in storages([written.tensor]):
            for other in self._roots.get(storage, ()):
                if other is not written:
                    other.value = self.observer.unknown(other.tensor, "a tensor it shares memory with was written to")
                    self._note_write(other, by)
                    other.seen = len(other.writers)
