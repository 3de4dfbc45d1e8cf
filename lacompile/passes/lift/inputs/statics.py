"""Inputs whose numbers the lift looks at, and the assumptions that come with looking.

These are the buffers of a module, and masks that are passed in: a function that takes its mask as an argument is as
common as a module that keeps one, and the part of a program behind a graph break gets all that it needs that way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import fx

from ...._compat import is_fake, outside_modes
from ...facts import Assumption, unchanged
from ...names import from_a_closure, readable_name, source_name
from ..domain.affine import ONE, Aff
from ..domain.exponent import Access
from ..domain.kinds import Opaque
from ..domain.precision import EXACT_UP_TO
from ..domain.term import Case, Precision, Term, Val, value
from ..engine import Engine, GiveUp
from ..transfer.conditions import truth
from .buffers import (
    Distances,
    Family,
    Fit,
    aligned,
    block_decays,
    distances,
    families,
    fit,
    lines,
    mirrored,
    pairs_apart,
    rounding,
    selected,
    written_slopes,
)
from .fitted import Slope, as_value, in_known_steps

MAX_VECTOR = 4096
MAX_POSITIONS = 2**24
MAX_FACTORS = 2**22


class Statics:
    """The inputs of one graph that are read by value.

    Args:
        engine: the analysis they become part of.
        placeholders: the graph's inputs.
        example_inputs: the real tensors behind them.
    """

    def __init__(self, engine: Engine, placeholders: Sequence[fx.Node], example_inputs: Sequence[Any]):
        self.engine = engine
        self.ambiguous = 0
        self.lines: set[int] = set()  # leaves of vectors that are slopes of heads, or weights of positions
        self.real: dict[fx.Node, torch.Tensor] = {}
        self._passed: dict[fx.Node, Fit | None] = {}  # arguments, and what a mask was fitted to
        self._values: dict[fx.Node, Val] = {}
        self._used: set[fx.Node] = set()
        self._sloped: set[fx.Node] = set()
        self._distances: dict[fx.Node, Distances] = {}
        nodes: list[fx.Node] = []
        fits: dict[int, Fit] = {}
        vectors: dict[int, torch.Tensor] = {}
        passed: dict[int, torch.Tensor] = {}
        for n, (node, real) in enumerate(zip(placeholders, example_inputs, strict=False)):
            nodes.append(node)
            if not isinstance(real, torch.Tensor) or real.requires_grad or is_fake(real):
                continue
            if real.is_floating_point() and real.dtype not in EXACT_UP_TO:
                continue  # eight bits: PyTorch computes nothing in them
            if (apart := distances(real)) is not None:
                self._distances[node], self.real[node] = apart, real
                if not belongs_to_module(node, real):
                    self._passed[node] = None
                continue
            if not belongs_to_module(node, real):
                passed[n] = real
                continue
            self.real[node] = real
            if is_vector(real):
                vectors[n] = real
                self._signed(node)
            elif not _are_distances(real) and (found := fit(real) or mirrored(real)) is not None:
                fits[n] = found
        self._read_passed(passed, nodes, fits, vectors)
        groups = families(fits, vectors)
        joined, left = lines(groups, vectors, alone=bool(engine.choices.fit))
        self.lines = {self._leaf(nodes[n]) for n in left}
        fits |= joined
        fits |= block_decays(groups, vectors)
        for family in groups:
            self._family(family, nodes, fits)
        for n, found in fits.items():
            if found.selects and nodes[n] not in self._values:
                self._enter(nodes[n], found, ONE, None)

    def value(self, node: fx.Node, tensor: torch.Tensor) -> Val | None:
        """What the numbers of this input say; None if they are not looked at."""
        if node in self._distances:
            self._used.add(node)
            return self._distances[node].value(self.engine.shape(tensor))
        if node not in self._used and (positions := self._positions(node, tensor)) is not None:
            return positions
        return self._values.get(node)

    def is_kept(self, node: fx.Node) -> bool:
        """Whether it is a buffer, and no argument."""
        return node in self.real and node not in self._passed

    def _positions(self, node: fx.Node, tensor: torch.Tensor) -> Val | None:
        """Whole numbers on a line or a plane: positions, or the distances of all pairs of them.

        A line of one sign in a floating format may also be slopes, one for each head: that reading comes first.
        """
        real = None if node in self._passed else self.real.get(node)
        if real is None or real.is_complex() or real.dtype is torch.bool or not 1 < real.numel() <= MAX_POSITIONS:
            return None
        with outside_modes():
            corner = real[(slice(2),) * real.dim()].to(torch.float64)
            if not torch.equal(corner, corner.round()):
                return None
            numbers = real.detach().to("cpu", torch.float64).numpy()
        shape = self.engine.shape(tensor)
        if (step := pairs_apart(numbers)) is not None:
            self._used.add(node)
            return self._apart(shape, step)
        try:
            line = self.engine.table_value(numbers, shape)
        except GiveUp:
            return None
        if any(t.accs or t.poly.is_const for t in line.terms) or not line.terms:
            return None
        if node in self._values:  # of one sign
            self.ambiguous += 1
            if not self.engine.choices.fit:
                return None
        self._used.add(node)
        return replace(line, precision=Precision.EXACT)

    def _apart(self, shape: tuple[Aff, ...], step: int) -> Val:
        """``step`` times the distance of all pairs of positions, whichever is the later."""
        ahead = (Aff.var(len(shape) - 2) - Aff.var(len(shape) - 1)) * step
        mask = truth(self.engine, shape, (Aff.var(len(shape) - 2) - Aff.var(len(shape) - 1),))
        cases = tuple(Case(c.guards, (Term(1.0, ahead if c.terms else -ahead),)) for c in mask.cases)
        return replace(self.engine.join_cases(Val(shape, cases)), precision=Precision.EXACT)

    def assumptions(self, nodes: Iterable[fx.Node], looked_at: Iterable[fx.Node]) -> Iterable[Assumption]:
        """What a rewrite takes for granted that rests on these inputs, and on the signs of those looked at."""
        for node in dict.fromkeys((*(n for n in nodes if n in self._used), *looked_at)):
            if node in self._passed:
                text = f"the values of {readable_name(node)}, which is passed in"
                yield Assumption(node, "argument", text, self._still(node))
            elif node in self.real:
                yield Assumption(node, "values", f"the values of {readable_name(node)}", unchanged(self.real[node]))

    def _still(self, node: fx.Node) -> Callable[[torch.Tensor], bool]:
        """Whether another tensor is the mask that this argument is; one without a slope may be of any length."""
        found, seen = self._passed[node], self.real[node]
        if (apart := self._distances.get(node)) is not None:  # of any length
            return lambda now: now.dtype == seen.dtype and distances(now) == apart
        if found is None or not found.selects or node in self._sloped:
            return unchanged(seen)
        dtype, rank = seen.dtype, seen.dim()
        return lambda now: now.dtype == dtype and now.dim() == rank and bool(torch.equal(now, selected(found, now)))

    # -------------------------------------------------------------------------------------------------------- details

    def _read_passed(
        self,
        passed: dict[int, torch.Tensor],
        nodes: Sequence[fx.Node],
        fits: dict[int, Fit],
        vectors: dict[int, torch.Tensor],
    ) -> None:
        """Adds the arguments that are masks or decay factors, and with them the vectors that may be their slopes."""
        found = {n: f for n, real in passed.items() if not is_vector(real) and (f := _passed_fit(real)) is not None}
        fits |= found
        lines = {n: real for n, real in passed.items() if is_vector(real)} if found else {}
        vectors |= lines
        for n in (*found, *lines):
            self.real[nodes[n]] = passed[n]
            self._passed[nodes[n]] = found.get(n)

    def _leaf(self, node: fx.Node) -> int:
        """The leaf that is this input as it stands."""
        if node not in self._values:
            kind = Opaque(node, node.name)
            self._values[node] = self.engine.leaf(node.meta["example_value"], kind, constant=self.is_kept(node))
        (term,) = self._values[node].terms
        return term.accs[0][0]

    def _signed(self, node: fx.Node) -> None:
        low, high = (float(x) for x in torch.aminmax(self.real[node].detach()))
        if low > 0 or high < 0:
            leaf = self.engine.leaves[self._leaf(node)]
            leaf.interval, leaf.rests_on = (low, high), frozenset({node})

    def _family(self, family: Family, nodes: Sequence[fx.Node], fits: dict[int, Fit]) -> None:
        source = family.source()
        written = written_slopes(nodes[0].graph, family.slopes) if source is None else None
        unclear = 0
        for n in sorted(family.members):
            found = fits[n]
            distance = found.distances[0]
            if len(found.distances) > 1:
                # The pair of a chunk's decays, from its start and to its end: in one order, or in the other.
                distance = found.distances[(unclear + self.engine.choices.fit) % len(found.distances)]
                unclear += 1
            if source is not None:
                slope = self._read_slope(nodes[source[0]], source[1], found)
            else:
                assert written is not None
                distance, slope = in_known_steps(self.engine, found, distance, written)
            if slope is not None:
                self._enter(nodes[n], found, distance, slope)
        self.ambiguous += unclear
        if written is not None:
            coarsest = max(rounding(self.real[nodes[n]].dtype) for n in family.members)
            for n, how, _ in family.direct:
                if rounding(self.real[nodes[n]].dtype) <= coarsest:
                    self._rounded(nodes[n], how, written)

    def _read_slope(self, node: fx.Node, how: str, found: Fit) -> Slope | None:
        leaf = self._leaf(node)
        index = aligned(self.engine.leaf_shapes[leaf], found)
        if index is None:
            return None
        self._used.add(node)
        access: Access = (leaf, index)
        if how == "decay":
            (log,) = self.engine.log_terms(access)
            return log.accs, 1
        return (access,), -1 if how == "slope" else 1

    def _rounded(self, node: fx.Node, how: str, slopes: np.ndarray) -> None:
        """A slope that was rounded as its sister buffers were (cast to bf16) stands for the one that they show."""
        if how == "decay":
            return
        shape = self.engine.shape(node.meta["example_value"])
        index = tuple(Aff.var(d) for d, n in enumerate(shape) if n != ONE)
        known = Term(accs=((self.engine.numbered(slopes), index),)) if slopes.shape else Term(float(slopes))
        self._values[node] = value(shape, [known if how == "slope" else known.but(coef=-known.coef)])
        self._used.add(node)

    def _enter(self, node: fx.Node, found: Fit, distance: Aff, slope: Slope | None) -> None:
        shape = self.engine.shape(node.meta["example_value"])
        self._values[node] = as_value(self.engine, shape, found, distance, slope)
        self._used.add(node)
        if slope is not None:
            self._sloped.add(node)


def is_vector(real: torch.Tensor) -> bool:
    """Whether a tensor may be slopes or decay factors, one for each head."""
    return real.is_floating_point() and sum(s > 1 for s in real.shape) <= 1 and 0 < real.numel() <= MAX_VECTOR


def _are_distances(real: torch.Tensor) -> bool:
    """Whether a plane holds whole numbers of both signs: positions, or nothing that is known, and no weights."""
    if real.dim() < 2 or not real.is_floating_point() or not 0 < real.numel() == real.shape[-2] * real.shape[-1]:
        return False
    low, high = (float(x) for x in torch.aminmax(real.detach()))
    return low < 0 < high and bool(torch.equal(real, real.round()))


def _passed_fit(real: torch.Tensor) -> Fit | None:
    """An argument as a mask or as factors that decay; most arguments are neither, and are much larger."""
    found = fit(real, square=True)
    if found is None and real.is_floating_point() and real.numel() <= MAX_FACTORS:
        found = fit(real)
    return None if found is None or (found.constant and not found.guards) else found


def belongs_to_module(node: fx.Node, real: torch.Tensor) -> bool:
    """A tensor that lives in a module or a closure and not one that each call brings along."""
    name = source_name(node)
    if getattr(real, "_dynamo_static_input_type", None) is not None or "_buffers" in name:
        return True
    return name.startswith(("G[", "L['self'].")) or "__closure__" in name or from_a_closure(node)
