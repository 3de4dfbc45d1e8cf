"""Series: what a loop computes for one token or chunk after another, as the pieces of one tensor.

A program that projects inside its loop holds ``k_t = f(x[:, t])`` for each token, where nothing is known of ``f``. Each
result by itself is a tensor that no other step has. Side by side they are one, ``K[:, t] = k_t``, whatever ``f`` is:
``K`` is made of the values of the graph, so there is nothing to prove. Which values are put side by side decides only
what is found: those of one call, whose arguments are one but for the place that they read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from torch import fx

from ..domain.affine import ONE, Aff
from ..domain.exponent import Access
from ..domain.kinds import HERE, Opaque, Series, Symbol
from ..domain.leaves import Interval, Leaf, Leaves
from ..domain.space import own_index
from ..domain.term import Term, Val
from .windows import Window


@dataclass(frozen=True)
class Place:
    """Where along a dimension a tensor lies: from ``start``, as long as its own dimension ``dim``, or one long."""

    start: int
    length: int
    of: Aff
    dim: int


@dataclass(frozen=True)
class Argument:
    """A tensor that a call is given, but for the place that it is at."""

    value: Term
    shape: tuple[Aff, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Circumstances:
    """``records_gradients``: for autograd a value computed without them is another. ``repeatable``: the same call again
    has the same value. ``as_made``: nobody has written into what it is given since that was made.
    """

    records_gradients: bool
    repeatable: bool
    as_made: bool


Bounds = tuple[Interval, frozenset[fx.Node]]
"""The interval of a leaf, and the inputs whose values that was read off."""


class NoPlace(Exception):
    """An argument is no part of a longer tensor, or of two in different places."""


class SeriesTable:
    """The series of one analysis.

    Args:
        leaves: of the analysis.
        unnamed: whether an argument beside another one weighs its features, with numbers that may be others in each
            call, as those of a position are.
    """

    def __init__(self, leaves: Leaves, unnamed: Callable[[Val, Val], bool]):
        self._leaves, self._unnamed = leaves, unnamed
        self._found: dict[Any, tuple[int, Series]] = {}
        self._begun: dict[Any, list[tuple[int, Series]]] = {}  # of one token, by what their next call may be too
        self._calls: dict[tuple[int, int], Any] = {}  # by series and place: the numbers that the call was given
        self._names: dict[tuple[int, int], Any] = {}  # likewise: what the call was, as two may begin one series

    def piece(
        self,
        node: fx.Node,
        shape: tuple[Aff, ...],
        dtype: torch.dtype,
        value_of: Callable[[fx.Node], Val | None],
        kind: Opaque,
        bounds: Bounds,
        call: Circumstances,
    ) -> Access | None:
        """The value of a call as a part of the tensor of all such values; None if it is none.

        Args:
            node: the call.
            shape: of its value.
            dtype: of its value.
            value_of: what is known of an argument.
            kind: of the leaf that its value is by itself.
            bounds: of that leaf.
            call: what else tells it from others.
        """
        rest, reading = (dtype, call.records_gradients, bounds), None
        for n in range(2):
            other = self._reading(node, shape, value_of, n)
            if other is not None and (*other[0], *rest, 0) in self._found:
                reading = other
                break
            reading = reading or other
        if reading is None:
            return None
        how, place, numbers = reading
        _, dim, stacked, *_ = how
        for nth in count():
            leaf, series = self._series((*how, *rest, nth), kind, place)
            if self._calls.setdefault((leaf, place.start), numbers) == numbers:
                break  # with other numbers the same call is another one
        named = how, place.length
        again = call.repeatable and self._names.get((leaf, place.start)) == named
        if not again and not series.add(node, place.start, place.length):
            return None
        self._names.setdefault((leaf, place.start), named)
        series.as_made &= call.as_made
        return leaf, _piece_at(place.start, dim, shape, stacked)

    def of_windows(
        self,
        node: fx.Node,
        shape: tuple[Aff, ...],
        dtype: torch.dtype,
        found: Window,
        kind: Opaque,
        call: Circumstances,
    ) -> Access | None:
        """The value of a call that reads a window of tokens, at the place of the last one."""

        def named(arg: Any) -> Any:
            if isinstance(arg, fx.Node):
                return fx.Node
            return type(arg), tuple(map(named, arg)) if isinstance(arg, list | tuple) else repr(arg)

        dim, size = min(found.dim, len(shape)), self._leaves[found.leaf].shape[found.dim]
        how = node.op, node.target, named(node.args), repr(node.kwargs)
        key = (how, found.leaf, found.weight, dim, shape, dtype, call.records_gradients)
        if key not in self._found:
            series = Series(dim, stacked=True, of=None)
            tensor = Leaf(replace(kind, series=series), (*shape[:dim], size, *shape[dim:]), dtype)
            self._found[key] = self._leaves.add(tensor), series
        leaf, series = self._found[key]
        if not series.add(node, found.last, 1):
            return None
        series.as_made &= call.as_made
        return leaf, _piece_at(found.last, dim, shape, stacked=True)

    def _series(self, key: Any, kind: Opaque, place: Place) -> tuple[int, Series]:
        if key not in self._found:
            (_, _, args, _), dim, stacked, rest, length, dtype, _, bounds, _ = key
            if (begun := self._first_token(key, place)) is not None:
                self._found[key] = begun
                return begun
            series = Series(dim, stacked, _whole_access(args, self._leaves))
            leaf = Leaf(replace(kind, node=None, series=series), (*rest[:dim], length, *rest[dim:]), dtype, *bounds)
            self._found[key] = self._leaves.add(leaf), series
            if place.length == 1:
                self._begun.setdefault((_but_for_tokens(key), place.start + 1), []).append(self._found[key])
        return self._found[key]

    def _first_token(self, key: Any, place: Place) -> tuple[int, Series] | None:
        """The series that a call on a token and on those before it goes on with; None if it is none.

        Of a first token there is none before it, or one that came in: the same function has another argument there.
        """
        if not _reads_earlier(key):
            return None
        begun = self._begun.get((_but_for_tokens(key), place.start), [])
        while begun:
            leaf, series = begun.pop(0)
            if len(series.pieces) == 1:
                series.of = None  # what the first call was given is no place of what the others are
                return leaf, series
        return None

    # -------------------------------------------------------------------------------------------- what names a series

    def _reading(
        self, node: fx.Node, shape: tuple[Aff, ...], value_of: Callable[[fx.Node], Val | None], nth: int
    ) -> tuple[tuple[Any, ...], Place, list[Any]] | None:
        """What names the series, the place in it, and the numbers that do not name it; None if the call is no piece.

        ``nth``: of the dimensions of one entry that the place of one token may have, as beside a single head.
        """
        try:
            key, place, numbers = self._named(node, value_of, nth)
        except NoPlace:
            return None
        dim = _dimension_of(place, shape)
        if dim > len(shape):
            return None
        stacked = dim == len(shape) or shape[dim] != Aff.lit(place.length)
        if stacked and place.length != 1:
            return None
        rest = (*shape[:dim], *shape[dim if stacked else dim + 1 :])
        return (key, dim, stacked, rest, place.of), place, numbers

    def _named(
        self, node: fx.Node, value_of: Callable[[fx.Node], Val | None], nth: int
    ) -> tuple[Any, Place, list[Any]]:
        """The call without the place that its arguments are at, that place, and the numbers that do not name it."""
        given = {arg: _known(value_of, arg) for arg in node.all_input_nodes}
        numbers = {
            arg: v for arg, v in given.items() if any(w is not v and self._unnamed(v, w) for w in given.values())
        }
        place = _of_token(p for arg, v in given.items() if arg not in numbers for p in self._places(v, nth))
        rank = max(len(v.shape) for v in given.values())

        def named(arg: Any) -> Any:
            if isinstance(arg, fx.Node) and arg in numbers:
                shape = numbers[arg].shape
                return "numbers", _sizes(shape, place, rank - len(shape)), arg.meta["example_value"].dtype
            if isinstance(arg, fx.Node):
                return self._argument(_known(value_of, arg), arg.meta["example_value"].dtype, place, nth)
            if isinstance(arg, list | tuple):
                return tuple(map(named, arg))
            if isinstance(arg, dict):
                return tuple((k, named(v)) for k, v in arg.items())
            if isinstance(arg, slice):
                return "slice", named(arg.start), named(arg.stop), named(arg.step)
            return type(arg), arg

        return (node.op, node.target, named(node.args), named(node.kwargs)), place, [v.cases for v in numbers.values()]

    def _argument(self, v: Val, dtype: torch.dtype, place: Place, nth: int) -> Argument:
        t = _one_product(v)
        accs = tuple(
            (leaf, tuple(_from_here(i, p, place) for i, p in self._indices(leaf, idx, v.shape, nth)))
            for leaf, idx in t.accs
        )
        at_place = any(_is_here(i) for _, idx in accs for i in idx)
        return Argument(t.but(accs=accs), _sizes(v.shape, place) if at_place else v.shape, dtype)

    def _places(self, v: Val, nth: int) -> Iterator[Place]:
        for leaf, idx in _one_product(v).accs:
            yield from (p for _, p in self._indices(leaf, idx, v.shape, nth) if p is not None)

    def _indices(
        self, leaf: int, idx: Sequence[Aff], shape: tuple[Aff, ...], nth: int
    ) -> Iterator[tuple[Aff, Place | None]]:
        """Each index with the place that it is at, unless the leaf is a parameter."""
        found = self._leaves[leaf]
        if isinstance(found.kind, Symbol):  # of which each argument has dimensions of its own
            for given in found.kind.given(idx):
                if isinstance(given, tuple):
                    (of, at), _ = given
                    yield from self._indices(of, at, shape, nth)
            return
        behind, met = 0, set[int]()  # the dimension behind those of the value that were met
        for a, size in zip(idx, found.shape, strict=True):
            # Of what has one token left that may be a dimension of one entry: one that follows, or that was left out.
            ones = [d for d in (*range(behind, len(shape)), *range(behind)) if shape[d] == ONE and d not in met]
            yield a, None if found.parameter else _place(a, size, shape, (ones or [behind])[: nth + 1][-1])
            met |= {v for v, _ in a.terms if 0 <= v < len(shape)}
            behind = max([behind, *(v + 1 for v in met)])
            if size == ONE and behind < len(shape) and shape[behind] == ONE:
                met.add(behind)
                behind += 1


def _dimension_of(place: Place, shape: Sequence[Aff]) -> int:
    """The dimension of a result along which its places are: that of what it is made of, or the only one as long.

    A product may put a dimension of the weights in front, and a function its arguments' in another order.
    """
    dim, length = place.dim, Aff.lit(place.length)
    if place.length == 1 or (dim < len(shape) and shape[dim] == length) or list(shape).count(length) != 1:
        return dim
    return list(shape).index(length)


def _piece_at(start: int, dim: int, shape: tuple[Aff, ...], stacked: bool) -> tuple[Aff, ...]:
    """Where a piece of this shape is read in its series."""
    own = own_index(shape)
    at = Aff.lit(start) if stacked else own[dim] + start
    return (*own[:dim], at, *own[dim if stacked else dim + 1 :])


def _sizes(shape: tuple[Aff, ...], place: Place, behind: int = 0) -> tuple[Aff, ...]:
    """The sizes of what is at a place, or beside it from dimension ``behind`` on, but for how long that is."""
    here = (place.dim - behind, Aff.lit(place.length))
    return tuple(HERE if (d, n) == here else n for d, n in enumerate(shape))


def _known(value_of: Callable[[fx.Node], Val | None], arg: fx.Node) -> Val:
    value = value_of(arg)
    if value is None:
        raise NoPlace
    return value


def _one_product(v: Val) -> Term:
    t = v.taken
    if t is None or t.exp or t.guards or not t.poly.is_const:
        raise NoPlace
    return t


def _of_token(found: Iterable[Place]) -> Place:
    """The place that moves from call to call: of several that of one token, or the first; the rest name the call.

    A head is a part of the features of a token, or a place of its own among fewer; so are the halves that are turned.
    Of several tokens it is the last.
    """
    places = set(found)
    if not places:
        raise NoPlace
    first = min(places, key=lambda p: (p.length != 1, p.dim, -p.of.const if p.of.is_const else 0, p.start))
    return max((p for p in places if _beside(p, first)), key=lambda p: p.start)


def _beside(p: Place, place: Place) -> bool:
    """Whether both are places of one dimension, equally long."""
    return replace(p, start=place.start) == place


def _from_here(i: Aff, p: Place | None, place: Place) -> Aff:
    """An index at this place, or at one beside it, counted from it."""
    return i if p is None or not _beside(p, place) else HERE + (p.start - place.start)


def _is_here(i: Aff) -> bool:
    return i - i.const == HERE


def _arguments(named: Any) -> Iterator[Argument]:
    """Those of a call, in nested lists too."""
    if isinstance(named, Argument):
        yield named
    elif isinstance(named, tuple):
        for x in named:
            yield from _arguments(x)


def _reads_earlier(key: Any) -> bool:
    """Whether what a series is named by reads tokens before the last one."""
    (_, _, args, kwargs), *_ = key
    at = (i for a in _arguments((args, kwargs)) for _, idx in a.value.accs for i in idx)
    return any(_is_here(i) and i != HERE for i in at)


def _but_for_tokens(key: Any) -> Any:
    """What a series is named by, without what it is of the tokens that its calls are given."""

    def without(named: Any) -> Any:
        if isinstance(named, Argument) and any(_is_here(i) for _, idx in named.value.accs for i in idx):
            return named.shape, named.dtype
        return tuple(map(without, named)) if isinstance(named, tuple) else named

    (op, target, args, kwargs), *rest = key
    return op, target, without(args), without(kwargs), *rest


def _whole_access(args: tuple[Any, ...], leaves: Leaves) -> Access | None:
    """The first of the arguments, where it is one access of all of a leaf but for the place that it is at."""
    if not args or not isinstance(args[0], Argument):
        return None
    t, shape = args[0].value, args[0].shape
    if t.coef != 1 or t.poly != ONE or len(t.accs) != 1:
        return None
    leaf, idx = t.accs[0]
    lengths = {Aff.var(d): n for d, n in enumerate(shape)}  # a part of the features has as many as it reads
    whole = all(i == HERE or n in (ONE, lengths.get(i)) for i, n in zip(idx, leaves[leaf].shape, strict=True))
    return (leaf, idx) if whole else None


def _place(a: Aff, size: Aff, shape: tuple[Aff, ...], dim: int) -> Place | None:
    """The place that an index is at along a dimension, in ``dim`` if it is one token; None if it runs over it all."""
    if a.is_const:
        return Place(int(a.const), 1, size, dim) if size != ONE else None
    if len(a.terms) != 1 or a.terms[0][1] != 1 or not 0 <= (d := a.terms[0][0]) < len(shape):
        return None
    if shape[d] == size or not shape[d].is_const:
        return None
    return Place(int(a.const), int(shape[d].const), size, d)
