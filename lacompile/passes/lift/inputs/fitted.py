"""What was fitted to numbers, as a value: a mask, or weights of known slopes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import fx

from ..domain.affine import ONE, Aff
from ..domain.exponent import Exponent, Mono
from ..domain.term import Case, Precision, Term, Val, value
from ..engine import Engine
from ..transfer.conditions import truth
from .buffers import EXPONENT_ERROR, EXPONENT_ERROR_FP64, Fit, fit, head_index, written_slopes
from .powers import powers

Slope = tuple[Mono, int]
"""A rate, and its sign as the logarithm of a decay."""


def as_value(engine: Engine, shape: tuple[Aff, ...], found: Fit, distance: Aff, slope: Slope | None) -> Val:
    """What was fitted, with this slope in steps of this distance; without one where it only selects."""
    mask = truth(engine, shape, found.guards)
    inside = _weight(found, distance, slope)
    outside = _number(found.chosen[1]) if slope is None else (Term(found.outside),) if found.log_space else ()
    if found.mirrored and slope is not None:
        rows, columns = len(shape) - 2, len(shape) - 1
        opposite = engine.space.sub(distance, {rows: Aff.var(columns), columns: Aff.var(rows)})
        outside = _weight(found, opposite, slope)
    cases = tuple(Case(c.guards, inside if c.terms else outside) for c in mask.cases)
    made = engine.join_cases(Val(shape, cases))
    # Zeros and ones are what they are; of a weight only what its format leaves of it is known.
    return replace(made, precision=Precision.EXACT) if slope is None else made


def _weight(found: Fit, distance: Aff, slope: Slope | None) -> tuple[Term, ...]:
    if slope is None:
        return _number(found.chosen[0])
    mono, sign = slope
    if found.log_space:
        return (Term(float(sign), distance, mono),)
    return (Term(1.0, exp=Exponent.of([(mono, distance * sign)], ())),)


def _number(x: float) -> tuple[Term, ...]:
    return (Term(x),) if x else ()


def fitted_constant(
    engine: Engine, shape: tuple[Aff, ...], numbers: torch.Tensor, graph: fx.Graph | None = None
) -> Val | None:
    """Numbers that the program writes down, or makes of those that its ``graph`` does, read as those of a buffer are.

    In fp64 those of one dimension, or without a zero, too: there they are no weights by accident.
    """
    if numbers.dtype not in (torch.bool, torch.float32, torch.float64):
        return None  # of a shorter format too little is left to call it the same weight
    exact = numbers.dtype is torch.float64
    if exact and (term := powers(numbers.cpu().numpy())) is not None:
        return value(shape, [term])
    found = fit(numbers, EXPONENT_ERROR_FP64 if exact else EXPONENT_ERROR, line=exact)
    if found is None or found.numbers is not None:
        return None  # two numbers may be the signs of features
    if found.selects:
        return as_value(engine, shape, found, ONE, None)
    if found.constant or not (found.guards or exact):
        return None
    slopes = found.slopes.middle if graph is None else written_slopes(graph, found.slopes)
    return as_value(engine, shape, found, *in_known_steps(engine, found, found.distances[0], slopes))


def in_known_steps(engine: Engine, found: Fit, distance: Aff, slopes: np.ndarray) -> tuple[Aff, Slope]:
    """A distance in steps of known slopes, and what these are: a table, or 1 for a distance times the only slope."""
    if (slopes == slopes.flat[0]).all():
        return distance * float(slopes.flat[0]), ((), -1)
    return distance, (((engine.numbered(slopes), head_index(found)),), -1)
