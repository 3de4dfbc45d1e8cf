"""Tensors made from numbers alone."""

from __future__ import annotations

import math

import torch

from ..domain.affine import ONE, ZERO, Aff
from ..domain.term import Term, Val, constant, value
from ..engine import GiveUp
from . import Op, rule

aten = torch.ops.aten


@rule(aten.arange)
def arange(op: Op) -> Val:
    plain = [a for a in op.args if not isinstance(a, torch.dtype)]
    start, step = (plain[0], plain[2] if len(plain) > 2 else 1) if len(plain) > 1 else (0, 1)
    if isinstance(start, float) or isinstance(step, float):
        if not (float(start).is_integer() and float(step).is_integer()):
            raise GiveUp("a fractional range")
        start, step = int(start), int(step)
    if not isinstance(step, int):
        raise GiveUp("a symbolic step")
    poly = (ZERO if op.shape[0] == ONE else Aff.var(0)) * step + op.engine.aff(start)
    return value(op.shape, [Term(1.0, poly)])


@rule(aten.zeros, aten.zeros_like, aten.new_zeros, aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided)
@rule(aten.new_empty_strided, aten.empty_permuted)
def zeros(op: Op) -> Val:
    """What an uninitialised tensor holds is nobody's promise, so zero is as good a reading as any."""
    return constant(op.shape, 0.0)


@rule(aten.ones, aten.ones_like, aten.new_ones)
def ones(op: Op) -> Val:
    return constant(op.shape, 1.0)


@rule(aten.full, aten.full_like, aten.new_full, aten.scalar_tensor)
def full(op: Op) -> Val:
    fill = op.arg(
        0 if op.func.overloadpacket is aten.scalar_tensor else 2 if op.func.overloadpacket is aten.new_full else 1,
        "fill_value",
    )
    if isinstance(fill, bool | int | float) and not math.isnan(fill):
        return constant(op.shape, float(fill))
    raise GiveUp("a fill value that is not a number")


@rule(aten.eye)
def eye(op: Op) -> Val:
    d = Aff.var(0) - Aff.var(1)
    return op.engine.sum_of(op.shape, [Term(guards=(d, -d))])
