"""Known numbers as normal forms: constants of the graph, what a factory makes, and tables that are read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from ...._compat import outside_modes
from ..domain.affine import ONE
from ..domain.kinds import Opaque
from ..domain.precision import SHORT
from ..domain.term import Precision, Val, constant
from ..engine import Engine, GiveUp
from ..inputs.fitted import fitted_constant
from ..transfer import Op

MAX_BAKED = 65_536


class Numbers:
    """Those of one analysis."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._weights: dict[Any, Val] = {}  # of tables that were read

    def of(self, tensor: torch.Tensor, real: torch.Tensor, unrounded: torch.Tensor | None = None) -> Val:
        """The numbers that a tensor is known to have: the weights that they are, a table, or a leaf.

        ``unrounded``: what its format has rounded, if that is known.
        """
        engine = self.engine
        if real.is_complex():
            return engine.leaf(tensor, Opaque(None, "complex constant"))
        with outside_modes():
            written = real if unrounded is None else unrounded
            numbers, made = (x.detach().to("cpu", torch.float64).numpy() for x in (written, real))
            precision = _precision(numbers, made)
            if (weights := fitted_constant(engine, engine.shape(tensor), written.detach())) is not None:
                sure = Precision.SIGN if numbers.all() else Precision.ROUNDED  # one that is 0 may have underflowed
                return replace(weights, precision=max(weights.precision, min(precision, sure)))
        try:
            known = engine.table_value(numbers, engine.shape(tensor), made)
        except GiveUp:
            return engine.leaf(tensor, Opaque(None, "constant"))
        return replace(known, precision=precision)

    def made_of_numbers(self, node: fx.Node | None, tensor: torch.Tensor) -> Val:
        """A tensor that PyTorch has made of numbers of the program."""
        if node is None or tensor.dtype not in (torch.float32, torch.float64):
            return self.of(tensor, tensor)
        with outside_modes():
            if tensor.shape:
                numbers = [x for x in tree_leaves(node.args) if isinstance(x, int | float)]
                written = torch.tensor(numbers, dtype=torch.float64)
                if written.numel() != tensor.numel():
                    return self.of(tensor, tensor)
                written = written.view(tensor.shape)
                return self.of(tensor, tensor, written if torch.equal(written.to(tensor.dtype), tensor) else None)
            if not node.all_input_nodes:  # a tensor that the program makes is what it makes
                return self.of(tensor, tensor)
            held = float(tensor)
            numbers = [x for x in tree_leaves((node.args, node.kwargs)) if isinstance(x, float)]
            found = {x for x in numbers if float(torch.tensor(x, dtype=tensor.dtype)) == held}
        if len(found) != 1 or held in found:
            return self.of(tensor, tensor)
        return replace(constant((), found.pop()), precision=Precision.ROUNDED)

    def complete(self, v: Val, dtype: torch.dtype) -> Val:
        """A table that is read, as the weights that its numbers are, if they are."""
        array = self.engine.array_of_table(v)
        if array is None or array.ndim < 2:
            return v
        key = (v.one, v.shape, dtype)
        if key not in self._weights:
            shape = tuple(n if m > 1 else ONE for n, m in zip(v.shape, array.shape, strict=True))
            with outside_modes():
                found = fitted_constant(self.engine, shape, torch.tensor(array, dtype=dtype))
            if found is not None:
                found = replace(self.engine.broadcast(found, v.shape), precision=min(found.precision, v.precision))
            self._weights[key] = found or v
        return self._weights[key]

    def in_format(self, v: Val, out: torch.Tensor) -> Val:
        """Known numbers as a short format leaves them, but positions and their weights: 0.9985 is 1 in bf16.

        What is lost of a weight differs from entry to entry; what is lost of a rate is lost again in each step.
        """
        if out.dtype not in SHORT or not v.single or not self.engine.index_only(v):
            return v
        if any(
            t.guards or t.exp.sums or not all(f.is_const for f in (t.poly, *(f for _, f in t.exp.lin))) for t in v.terms
        ):
            return v
        try:
            with outside_modes():
                numbers = torch.tensor(self.engine.array(v), dtype=torch.float64)
                left = numbers.to(out.dtype).double()
                known = v if torch.equal(left, numbers) else self.engine.table_value(left.numpy(), v.shape)
        except GiveUp:
            return v
        return replace(known, precision=v.precision)

    def made_by(self, op: Op) -> Val | None:
        """A tensor made from numbers alone (linspace, logspace): make it and take its numbers."""
        if not all(isinstance(n, int) for n in op.out.shape) or op.out.numel() > MAX_BAKED:
            return None
        try:
            with outside_modes():
                real = op.func(*op.args, **{k: v for k, v in op.kwargs.items() if k != "device"})
                whole = _whole(real)
            made = self.of(op.out, real)
            # another device may round the same formula in another way
            return made if whole else replace(made, precision=Precision.ROUNDED)
        except Exception:  # a factory that cannot run here stays unknown
            return None


def _precision(written: np.ndarray, made: np.ndarray) -> Precision:
    """What a format has left of numbers."""
    if (written == made).all():
        return Precision.EXACT
    return Precision.SIGN if (np.sign(written) == np.sign(made)).all() else Precision.ROUNDED


def _whole(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool((tensor == tensor.round()).all())
