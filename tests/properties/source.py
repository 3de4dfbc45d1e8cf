"""Source code that grows: tensors with named dimensions, and the many ways to multiply and sum them.

A dimension is a letter: b batch, h head, n and m positions of queries and keys, d and e their features, c and z chunks,
r and s positions inside a chunk. What a piece of a program needs to know of a tensor is its name and its letters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .choices import Choices


@dataclass(frozen=True)
class T:
    """A variable of the program; ``number`` if it is a Python number."""

    name: str
    dims: str = ""
    number: bool = False

    def like(self, old: str, new: str) -> T:
        """The same tensor with a dimension called otherwise."""
        return T(self.name, self.dims.replace(old, new), self.number)

    def at(self, dim: str) -> int:
        return self.dims.index(dim)

    def __str__(self) -> str:
        return self.name


def stem(t: T) -> str:
    """The name without the number that made it unique."""
    return t.name.rstrip("_0123456789")


class Writer:
    """The body of ``forward``, line by line, and that of ``__init__``."""

    def __init__(self, pick: Choices):
        self.pick = pick
        self.lines: list[str] = []
        self.init: list[str] = []
        self.sizes: dict[str, str] = {}
        self._depth = 0
        self._names: dict[str, int] = dict.fromkeys(("q", "k", "v", "decay", "gate", "rate", "state"), 1)

    def line(self, text: str) -> None:
        self.lines.append("    " * self._depth + text)

    def indent(self, by: int) -> None:
        self._depth += by

    def fresh(self, hint: str) -> str:
        self._names[hint] = self._names.get(hint, 0) + 1
        count = self._names[hint]
        return hint if count == 1 else f"{hint}{count}"

    def let(self, hint: str, text: str, dims: str = "", number: bool = False) -> T:
        name = self.fresh(hint)
        self.line(f"{name} = {text}")
        return T(name, dims, number)

    # ------------------------------------------------------------------------------------------------------- layouts

    def ordered(self, t: T, dims: str) -> str:
        """An expression for ``t`` with its dimensions in this order."""
        if t.dims == dims or len(dims) < 2:
            return t.name
        order = [t.dims.index(x) for x in dims]
        moved = [n for n, d in enumerate(order) if n != d]
        if len(moved) == 2:
            a, b = moved
            rank = len(dims)
            styles = [f"{t}.transpose({a}, {b})", f"{t}.transpose({a - rank}, {b - rank})"]
            if (a, b) == (rank - 2, rank - 1):
                styles.append(f"{t}.mT")
            return self.pick(styles)
        return self.pick([f"{t}.permute({', '.join(map(str, order))})", f"torch.permute({t}, {tuple(order)})"])

    def to(self, t: T, dims: str) -> T:
        text = self.ordered(t, dims)
        return T(t.name, dims) if text == t.name else self.let(stem(t), text, dims)

    def size(self, dim: str) -> str:
        """The length of a batch-like or feature dimension, as the program spells it."""
        return self.sizes[dim]

    def part(self, t: T, dim: str, index: str) -> str:
        """``t`` with this index, or slice, along one dimension."""
        return f"{t}[{', '.join([':'] * t.at(dim) + [index])}]"

    def select(self, t: T, dim: str, index: str, hint: str = "") -> T:
        """One position of a dimension, which goes."""
        text = self.pick([self.part(t, dim, index), f"{t}.select({t.at(dim)}, {index})"])
        return self.let(hint or stem(t), text, t.dims.replace(dim, ""))

    def zeros(self, dims: str, like: T, hint: str = "state") -> T:
        sizes = ", ".join(self.sizes[x] for x in dims)
        return self.let(hint, self.pick([f"torch.zeros({sizes})", f"{like}.new_zeros({sizes})"]), dims)

    def spread(self, t: T, dims: str) -> str:
        """An expression that broadcasts over these dimensions."""
        if t.number or not t.dims:
            return t.name
        own = [x for x in dims if x in t.dims]
        text = self.ordered(t, "".join(own))
        missing = [x not in t.dims for x in dims]
        while missing and missing[0] and self.pick.flip():
            missing = missing[1:]
        if not any(missing):
            return text
        if self.pick.flip(3):
            for n, gone in enumerate(missing):
                text = f"{text}.unsqueeze({n})" if gone else text
            return text
        return f"{text}[{', '.join('None' if gone else ':' for gone in missing)}]"

    def union(self, *ts: T) -> str:
        seen = "".join(t.dims for t in ts)
        return "".join(x for x in "bhczrsnmde" if x in seen)

    # ------------------------------------------------------------------------------------------------------ products

    def times(self, a: T, b: T, hint: str = "x") -> T:
        """The product of two tensors over the union of their dimensions."""
        if self.pick.flip():
            a, b = b, a
        dims = a.dims if set(b.dims) <= set(a.dims) else b.dims if set(a.dims) <= set(b.dims) else self.union(a, b)
        left, right = self.spread(a, dims), self.spread(b, dims)
        if not a.number and not b.number and self.pick.flip(5):
            return self.let(hint, f"torch.mul({left}, {right})", dims)
        return self.let(hint, f"{left} * {right}", dims)

    def add(self, a: T, b: T, hint: str = "x") -> T:
        """The sum of two tensors of the same dimensions."""
        if self.pick.flip():
            a, b = b, a
        return self.let(
            hint, self.pick([f"{a} + {self.ordered(b, a.dims)}", f"torch.add({a}, {self.ordered(b, a.dims)})"]), a.dims
        )

    def contract(self, a: T, b: T, keep: str, hint: str = "x") -> T:
        """Sum over the dimensions of ``a * b`` that are not kept."""
        summed = [x for x in self.union(a, b) if x not in keep]
        if not summed and not self.pick.flip(4):
            return self.times(a, b, hint)
        styles = ["matmul", "einsum", "sum"] if len(summed) <= 1 else ["einsum", "sum"]
        style = self.pick([*styles, "bmm"] if "matmul" in styles else styles)
        if style in ("matmul", "bmm"):
            made = self._matmul(a, b, summed, hint, style == "bmm")
            if made is not None:
                return made
        if style == "sum":
            dims = self.union(a, b)
            dims = "".join(x for x in dims if x not in summed) + "".join(summed)
            product = f"{self.spread(a, dims)} * {self.spread(b, dims)}"
            if not summed:
                return self.let(hint, product, dims)
            axes = tuple(range(-len(summed), 0)) if len(summed) > 1 else -1
            return self.let(hint, f"({product}).sum({axes})", dims[: -len(summed)])
        return self.einsum([a, b], keep, hint)

    def einsum(self, ts: Sequence[T], keep: str, hint: str = "x") -> T:
        ts = [t for t in ts if not t.number]
        if self.pick.flip():
            ts = [*ts[1:], ts[0]]
        dims = "".join(x for x in self.union(*ts) if x in keep)
        if self.pick.flip(3):
            dims = dims[::-1]
        inputs = ",".join(t.dims for t in ts)
        return self.let(hint, f'torch.einsum("{inputs}->{dims}", {", ".join(map(str, ts))})', dims)

    def _matmul(self, a: T, b: T, summed: list[str], hint: str, flat: bool) -> T | None:
        """A matrix product, if each side has at most one dimension of its own beside batch-like ones."""
        if self.pick.flip():
            a, b = b, a
        inner = summed[0] if summed else ""
        if inner and not (inner in a.dims and inner in b.dims):
            return None
        own_a = [x for x in a.dims if x not in b.dims]
        own_b = [x for x in b.dims if x not in a.dims]
        row, col = own_a[-1:], own_b[-1:]
        batch = [x for x in self.union(a, b) if x not in (*row, *col, inner)]
        both = [x for x in batch if x in a.dims and x in b.dims]
        if flat and both == batch and batch and row and col and inner:
            return self._bmm(a, b, "".join(batch), row[0], col[0], inner, hint)
        left = self._matrix(a, batch, row, [inner] if inner else [])
        right = self._matrix(b, batch, [inner] if inner else [], col)
        text = self.pick([f"{left} @ {right}", f"torch.matmul({left}, {right})"])
        if not row and not col:
            text = f"({text})[..., 0, 0]"
        elif not row:
            text = self.pick([f"({text}).squeeze(-2)", f"({text})[..., 0, :]"])
        elif not col:
            text = self.pick([f"({text}).squeeze(-1)", f"({text})[..., 0]"])
        return self.let(hint, text, "".join([*batch, *row, *col]))

    def _matrix(self, t: T, batch: Sequence[str], rows: Sequence[str], cols: Sequence[str]) -> str:
        text = self.ordered(t, "".join(x for x in (*batch, *rows, *cols) if x in t.dims))
        missing = ["None" if x not in t.dims else ":" for x in batch]
        while missing and missing[0] == "None":
            missing = missing[1:]
        missing += [":" if rows else "None", ":" if cols else "None"]
        return text if "None" not in missing else f"{text}[{', '.join(missing)}]"

    def _bmm(self, a: T, b: T, batch: str, row: str, col: str, inner: str, hint: str) -> T:
        sizes = ", ".join(f"{a}.shape[{a.at(x)}]" for x in batch)
        left = f"{self.ordered(a, batch + row + inner)}.flatten(0, {len(batch) - 1})"
        right = f"{self.ordered(b, batch + inner + col)}.flatten(0, {len(batch) - 1})"
        if len(batch) == 1:
            return self.let(hint, f"torch.bmm({left}, {right})", batch + row + col)
        return self.let(hint, f"torch.bmm({left}, {right}).unflatten(0, ({sizes}))", batch + row + col)

    def product(self, ts: Sequence[T], keep: str, hint: str = "x") -> T:
        """Sum over all dimensions of the product of ``ts`` but the kept ones: at once, or from the left."""
        tensors = [t for t in ts if not t.number]
        if len(tensors) == len(ts) and len(ts) <= 4 and self.pick.flip(4):
            return self.einsum(ts, keep, hint)
        out = ts[0]
        for n, t in enumerate(ts[1:], 1):
            needed = keep + "".join(x.dims for x in ts[n + 1 :])
            out = self.contract(out, t, "".join(x for x in self.union(out, t) if x in needed), hint)
        return out
