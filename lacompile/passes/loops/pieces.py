"""Parts of a tensor, however they are written: an index, a split, a chunk, a selection; each as the index it is."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..examples import example_of, same_shape
from .joins import Join

SPLITS = frozenset[Any]({
    *("chunk", "split", "tensor_split", "unsafe_chunk", "unsafe_split", "split_with_sizes"),
    *(torch.chunk, torch.split, torch.tensor_split, torch.unsafe_chunk, torch.unsafe_split, torch.split_with_sizes),
})  # fmt: skip
UNBINDS = ("unbind", torch.unbind)
SELECTS = ("select", torch.select)
NARROWS = ("narrow", torch.narrow)


@dataclass(frozen=True)
class Piece:
    """``of[index]``, one entry of ``index`` for each dimension of ``of``, and None for each new one.

    ``through``: the node of all the pieces that this is one of, which yields no tensor.
    """

    of: fx.Node
    index: tuple[int | slice | None, ...]
    through: fx.Node | None = None


def piece_of(node: fx.Node) -> Piece | None:
    """The part that a call takes of its first argument; None if it takes another, or where is not known in numbers."""
    of: Any = node.args[0] if node.args else None
    if not isinstance(of, fx.Node):
        return None
    if node.target is operator.getitem:
        return _one_of(of, node.args[1]) if isinstance(example_of(of), tuple | list) else _indexed(of, node.args[1])
    if node.target in SELECTS and (given := _numbers(node, "dim", "index")) is not None:
        return _placed(of, given[0], given[1])
    if node.target in NARROWS and (given := _numbers(node, "dim", "start", "length")) is not None:
        dim, start, length = given
        return _placed(of, dim, slice(start, start + length)) if start >= 0 else None
    return None


def _numbers(node: fx.Node, *names: str) -> list[int] | None:
    """The numbers that a call is given behind its first argument, by order or name."""
    found: list[Any] = [*node.args[1:], *(node.kwargs[n] for n in names[len(node.args) - 1 :] if n in node.kwargs)]
    complete = len(found) == len(names) == len(node.args) - 1 + len(node.kwargs)
    return found if complete and all(type(n) is int for n in found) else None


def _placed(of: fx.Node, dim: int, at: int | slice) -> Piece:
    rank = example_of(of).dim()
    whole: list[int | slice | None] = [slice(None)] * rank
    whole[dim % rank] = at
    return Piece(of, tuple(whole))


def _indexed(of: fx.Node, how: Any) -> Piece | None:
    """By numbers, slices of numbers and new dimensions alone."""
    given = example_of(of)
    how = how if isinstance(how, tuple) else (how,)
    if not isinstance(given, torch.Tensor) or not all(x is Ellipsis or _is_plain(x) for x in how):
        return None
    missing = given.dim() - sum(x is not None and x is not Ellipsis for x in how)
    at = how.index(Ellipsis) if Ellipsis in how else len(how)
    return Piece(of, (*how[:at], *[slice(None)] * missing, *how[at + 1 :])) if missing >= 0 else None


def _is_plain(x: Any) -> bool:
    if isinstance(x, slice):
        return all(n is None or type(n) is int for n in (x.start, x.stop, x.step))
    return x is None or type(x) is int


def _one_of(pieces: fx.Node, nth: Any) -> Piece | None:
    """One of the pieces that a call splits a tensor into along a dimension."""
    of: Any = pieces.args[0] if pieces.args else None
    splits, unbinds = pieces.target in SPLITS, pieces.target in UNBINDS
    if not (splits or unbinds) or not isinstance(example_of(of), torch.Tensor) or type(nth) is not int:
        return None
    at = 1 + splits
    dim: Any = pieces.args[at] if len(pieces.args) > at else pieces.kwargs.get("dim", 0)
    if type(dim) is not int:
        return None
    examples = example_of(pieces)
    nth %= len(examples)
    sizes = [x.shape[dim] for x in examples[: nth + 1]] if splits else []
    if not all(isinstance(n, int) for n in sizes):
        return None
    found = _placed(of, dim, slice(sum(sizes[:-1]), sum(sizes)) if splits else nth)
    return Piece(found.of, found.index, pieces)


def index_of_join(join: Join, parts: Sequence[Piece]) -> tuple[tuple[Any, ...], int] | None:
    """The index of the joined tensors that has the joined parts, and the dimension that those are joined along.

    The parts are at the same index of tensors that differ in the dimension of the places at most, of which each part
    has all: its entry there is a full slice, or there is none where parts are stacked.
    """
    first = parts[0]
    if any(p.index != first.index for p in parts):
        return None
    index = list(first.index)
    at = kept = own = 0  # an entry, and the dimensions of the part and of the tensor in front of it
    while at < len(index) and (kept < join.dim or (not join.stacks and type(index[at]) is int)):
        kept += type(index[at]) is not int
        own += index[at] is not None
        at += 1
    if not join.stacks and index[at : at + 1] != [slice(None)]:
        return None
    shapes = [list(example_of(p.of).shape) for p in parts]
    if not join.stacks:
        shapes = [[n for d, n in enumerate(s) if d != own] for s in shapes]
    if not all(same_shape(s, shapes[0]) for s in shapes):
        return None
    return (*index[:at], *[slice(None)] * join.stacks, *index[at:]), own
