"""The kinds of leaves: tensors that the normal form speaks about but does not look into.

An *opaque* leaf is a value of the Dynamo graph. A *symbol* is a pointwise function of other leaves,
f(x)[idx] = f(x[idx]), interned, so that the same function of a sliced tensor in every step of a loop is one leaf and
not many. A *table* is a small tensor of known numbers. *Extended* is a leaf continued by zeros beyond its ends. A
*scalar* is a number that the sizes of a call decide. *Positions* are read at themselves.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx

from .affine import Aff
from .exponent import Access
from .term import Term, Val

WITHOUT_GRADIENTS = "computed without gradients"
"""The label of a value that is data for autograd, and was computed from what requires a gradient."""
HERE = Aff.var(-1)
"""The place of an argument, in what names a series."""


@dataclass
class Series:
    """Values of the graph that lie side by side along dimension ``dim`` of one tensor; see series.py.

    ``pieces``: for the place where one begins its node, and how many places it has. ``stacked`` pieces have one each,
    and no dimension for it. ``of``: what their functions are called with, at place HERE, if that is else all of a leaf.
    ``as_made``: what they are called with was not written into before.
    """

    dim: int
    stacked: bool
    of: Access | None
    as_made: bool = True
    pieces: dict[int, tuple[fx.Node, int]] = field(default_factory=dict)
    starts: list[int] = field(default_factory=list)
    """In order."""

    def add(self, node: fx.Node, start: int, length: int) -> bool:
        """Whether no piece is there yet; then this one is from now on."""
        at = bisect(self.starts, start)
        before, behind = self.starts[at - 1 : at] if at else [], self.starts[at : at + 1]
        if any(s + self.pieces[s][1] > start for s in before) or any(start + length > s for s in behind):
            return False
        self.starts.insert(at, start)
        self.pieces[start] = node, length
        return True


@dataclass
class Opaque:
    """``node`` is None while the Dynamo node that yields the value has not been assigned (or never will be)."""

    node: fx.Node | None
    label: str
    of: tuple[int, ...] = ()
    """The leaves this value was computed from, for naming a culprit in a refusal."""
    summands: tuple[Term, ...] = ()
    """What was added or multiplied, where that was given up because it grows: a recurrence of another kind."""
    reading: Val | None = None
    """What the value is, of one that can be looked into; where no node holds it, it is computed from that."""
    compute: torch.dtype | None = None
    """The format its sums were computed in."""
    series: Series | None = None
    """The values of the graph that are its pieces; of one that no single node holds."""
    joined: tuple[int, int] | None = None
    """Two dimensions of the value that are one of the leaf, as chunks and their tokens, in the place of the second."""
    numbers: bool = False
    """Whether it was computed from numbers that the program writes, and no data."""

    @property
    def only_node(self) -> fx.Node | None:
        """The value of the graph that this is; of a series, as long as it has but one."""
        if self.series is None or len(self.series.pieces) != 1:
            return self.node
        return next(node for node, _ in self.series.pieces.values())

    @property
    def unmerged(self) -> bool:
        return bool(self.summands)


@dataclass(frozen=True)
class Argument:
    """A child of a symbol: leaf ``leaf`` at the next ``rank`` indices of the symbol's access, cast to ``dtype``."""

    leaf: int
    rank: int
    dtype: torch.dtype | None


@dataclass(frozen=True)
class Number:
    """A number that the program had as a tensor of this format, where the operation takes no other.

    ``scalar`` where that tensor had no dimensions: then its format does not count beside that of one with some.
    """

    value: float
    dtype: torch.dtype
    scalar: bool


@dataclass(frozen=True)
class Symbol:
    op: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]

    def given(self, idx: Sequence[Aff]) -> Iterator[Any]:
        """The arguments where the symbol is read at ``idx``: an access and its format, or what is no tensor."""
        start = 0
        for a in self.args:
            if isinstance(a, Argument):
                yield (a.leaf, tuple(idx[start : start + a.rank])), a.dtype
                start += a.rank
            else:
                yield a


@dataclass(frozen=True)
class Table:
    values: bytes
    shape: tuple[int, ...]

    @property
    def array(self) -> np.ndarray:
        return np.frombuffer(self.values, dtype=np.float64).reshape(self.shape)


@dataclass(frozen=True)
class Extended:
    of: int


@dataclass(frozen=True)
class Positions:
    """0, 1, 2, ... without an end: what a function of positions reads, where it is not known how many there are."""


@dataclass(frozen=True)
class Scalar:
    """One number for a whole tensor, that the sizes of a call decide: the root of a length, or one over a length.

    ``of`` is PyTorch's expression; ``inverse``: it is one over that.
    """

    of: Any
    inverse: bool
