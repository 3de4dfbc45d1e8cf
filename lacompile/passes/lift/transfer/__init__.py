"""Transfer rules: one function per ATen operation, from the values of its arguments to the value of its result."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from ...capture.schemas import is_pointwise
from ..domain.affine import Aff
from ..domain.precision import SHORT, amplifies, numbers_of, result_precision
from ..domain.term import Precision, Term, Val, constant, value
from ..engine import Engine, GiveUp


@dataclass
class Op:
    """One executed operation: tensor arguments as values, everything else as it was passed."""

    engine: Engine
    func: Any
    args: list[Any]
    kwargs: dict[str, Any]
    out: Any
    dtypes: list[Any]  # of the arguments; a tuple for a list of tensors

    def arg(self, n: int, name: str, default: Any = None) -> Any:
        return self.args[n] if n < len(self.args) else self.kwargs.get(name, default)

    @property
    def shape(self) -> tuple[Aff, ...]:
        return self.engine.shape(self.out)

    def tensor(self, n: int) -> Val:
        """Tensor argument ``n``, broadcast to the result."""
        v = self.args[n]
        if not isinstance(v, Val):
            raise GiveUp("a number where a tensor was expected")
        return self.engine.broadcast(v, self.shape)

    def operand(self, n: int) -> Val:
        """The same of an argument that may be a number."""
        x = self.args[n]
        if isinstance(x, Val):
            return self.engine.broadcast(x, self.shape)
        if isinstance(x, int | float) and not math.isnan(x):
            return constant(self.shape, float(x))
        if isinstance(x, torch.SymInt):
            return value(self.shape, (Term(poly=self.engine.aff(x)),), precision=Precision.EXACT)
        raise GiveUp("an operand that is neither a tensor nor a number")

    def symbol(self) -> Val:
        """The result as a pointwise function of the arguments, not looked into."""
        return self.engine.pointwise(self.func, self.args, self.kwargs, self.out, self.dtypes)

    def position(self, n: int, size: Aff) -> Aff:
        """Argument ``n`` as a place in a dimension of this size, from whose end a negative number counts."""
        at = self.engine.aff(self.args[n])
        return at + size if at.is_const and at.const < 0 else at

    def dim(self, d: int, rank: int) -> int:
        return d % rank if rank else 0


Rule = Callable[[Op], Val | list[Val]]
RULES: dict[Any, Rule] = {}
AnyRule = TypeVar("AnyRule", bound=Rule)


def rule(*packets: Any) -> Callable[[AnyRule], AnyRule]:
    """Registers a function as the transfer rule of these operator packets."""

    def register(f: AnyRule) -> AnyRule:
        for p in packets:
            RULES[p] = f
        return f

    return register


TELL_ZEROS_APART = (torch.ops.aten.copysign, torch.ops.aten.atan2, torch.ops.aten.signbit)
"""Functions of which 0.0 and -0.0, one number here, may have two values."""


def transfer(op: Op) -> Val | list[Val]:
    """The value of an operation's result.

    Raises:
        GiveUp: no rule looks into it; the result is an opaque leaf.
    """
    packet = op.func.overloadpacket
    found = RULES.get(packet)
    if found is not None:
        out = found(op)
    elif is_pointwise(op.func) and packet not in TELL_ZEROS_APART and isinstance(op.out, torch.Tensor):
        out = op.symbol()
    else:
        raise GiveUp(f"{packet} has no transfer rule")
    if isinstance(out, Val):
        return _in_its_format(op, out, op.out.dtype)
    return [_in_its_format(op, v, tensor.dtype) for v, tensor in zip(out, op.out, strict=False)]


def _in_its_format(op: Op, v: Val, dtype: torch.dtype) -> Val:
    v = representable(op.engine, v, dtype)
    if dtype.is_floating_point and amplifies(op, v):
        raise GiveUp("numbers that are mostly what rounding changed")
    precision = result_precision(op, v, dtype)
    if dtype in SHORT:
        v, precision = as_short_numbers(op, v, precision)
    if precision is Precision.EXACT:
        return v if v.precision is precision else replace(v, precision=precision)
    return replace(v, precision=precision, rounded=numbers_of(op, v))


from . import (  # noqa: E402, F401  (they register their rules)
    arith,
    conditions,
    contract,
    exponentials,
    factories,
    joining,
    logarithms,
    lookups,
    piecewise,
    reshaping,
    rolls,
    scatter,
    selections,
    views,
)
from .formats import representable  # noqa: E402
from .short_formats import as_short_numbers  # noqa: E402
