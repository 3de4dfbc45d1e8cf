"""What is known of the size of a leaf's entries: an interval, from that of what it is computed from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

aten = torch.ops.aten

Interval = tuple[float, float]
ANY: Interval = (-math.inf, math.inf)

POSITIVE = 5e-324
LEAST_INVERTED = 1e-300  # one over less is a number of no format, or none that says anything

# Open or closed makes no difference for the one question asked: is the value positive (low > 0, or low == 0 and open)?
RANGE_OF: dict[Any, Interval] = {
    aten.sigmoid: (POSITIVE, 1.0),
    aten.rsqrt: (POSITIVE, math.inf),
    aten._softmax: (POSITIVE, 1.0),
    aten.softplus: (POSITIVE, math.inf),
    aten.log_sigmoid: (-math.inf, -POSITIVE),
    aten.relu: (0.0, math.inf),
    aten.abs: (0.0, math.inf),
    aten.cos: (-1.0, 1.0),
    aten.sin: (-1.0, 1.0),
    aten.cosh: (1.0, math.inf),
    aten.erfc: (POSITIVE, 2.0),
    aten.special_ndtr: (POSITIVE, 1.0),
    aten.hardsigmoid: (0.0, 1.0),
}

OPEN = {aten.tanh, aten.erf}
"""Functions that come near -1 and 1, which are their values at infinity, and reach neither."""

RISING: dict[Any, Callable[[float], float]] = {
    aten.exp: math.exp, aten.exp2: math.exp2, aten.expm1: math.expm1, aten.tanh: math.tanh, aten.erf: math.erf,
}  # fmt: skip
ABOVE_NOTHING = {aten.exp, aten.exp2}

BOUNDS: dict[Any, tuple[Any, ...]] = {  # which of two the results are: that of the argument and of each bound
    aten.clamp: (max, min),
    aten.clamp_min: (max,),
    aten.clamp_max: (min,),
    aten.maximum: (max,),
    aten.minimum: (min,),
}


def interval_of(op: Any, given: Sequence[Interval | None]) -> Interval:
    """An interval that the results of ``op`` stay in, given those of its arguments; None for one that is not there."""
    packet = getattr(op, "overloadpacket", op)
    if packet in BOUNDS:
        ends = iter(given[1:])
        bounds = [(side, end) for side in BOUNDS[packet] if (end := next(ends, None)) is not None]
        return _bounded(given[0] or ANY, bounds)
    args = [ANY if x is None else x for x in given]
    if packet == aten.softplus and (any(low <= 0 for low, _ in args[1:2]) or any(low < 0 for low, _ in args[2:])):
        return ANY  # by its beta, or by a threshold behind which it is its argument
    if packet in RANGE_OF:
        return RANGE_OF[packet]
    if packet in RISING and args:
        low, high = (_or_infinite(RISING[packet], x) for x in args[0])
        if args[0][0] > 0 or packet in ABOVE_NOTHING:
            low = max(low, POSITIVE)
        return (low, high)
    if packet == aten.mul and len(args) == 2:
        ends = [
            x * y for x in args[0] for y in args[1] if not ((math.isinf(x) and y == 0) or (math.isinf(y) and x == 0))
        ]
        if all(low >= 0 for low, _ in args):
            low = max(args[0][0] * args[1][0], POSITIVE if args[0][0] and args[1][0] else 0.0)
            return (low, math.inf if math.inf in (*args[0], *args[1]) else max(ends))
        return (min(ends), max(ends)) if len(ends) == 4 else ANY
    if packet == aten.add and len(args) == 2:
        return (args[0][0] + args[1][0], args[0][1] + args[1][1])
    if packet == aten.detach and args:
        return args[0]
    if packet == aten.where and len(args) > 1:
        return (min(low for low, _ in args[-2:]), max(high for _, high in args[-2:]))
    if packet == aten.lerp and len(args) == 3:
        return _mixed(*args)
    if packet == aten.neg and args:
        return (-args[0][1], -args[0][0])
    if packet == aten.log and args and args[0][0] >= 0:
        low, high = args[0]
        return (math.log(low) if low > 0 else -math.inf, math.log(high) if 0 < high < math.inf else math.inf)
    if packet == aten.pow and len(args) == 2 and args[0][0] > 0:
        return (POSITIVE, math.inf)
    if packet == aten.square and args:
        return _square(args[0])
    if packet == aten.pow and len(args) == 2 and args[1][0] == args[1][1] and args[1][0] % 2 == 0:
        return _square(args[0]) if args[1][0] == 2 else (0.0, math.inf)
    if packet == aten.reciprocal and args and args[0][0] > 0:
        low, high = args[0]
        return (POSITIVE if math.isinf(high) else 1 / high, 1 / low if low > LEAST_INVERTED else math.inf)
    return ANY


def _square(of: Interval) -> Interval:
    least, largest = sorted(map(abs, of))
    return (0.0 if of[0] <= 0 <= of[1] else max(least * least, POSITIVE), largest * largest)


def _mixed(start: Interval, end: Interval, share: Interval) -> Interval:
    """``start + share (end - start)``: between both, or beyond the larger one, that of a share that is not 0 to 1."""
    if 0 <= share[0] <= share[1] <= 1:
        return (min(start[0], end[0]), max(start[1], end[1]))
    if share[0] >= 0 and start[1] <= end[0]:
        return (start[0], math.inf)
    if share[1] <= 1 and end[1] <= start[0]:
        return (end[0], math.inf)
    return ANY


def _or_infinite(f: Callable[[float], float], x: float) -> float:
    try:
        return f(x)
    except OverflowError:
        return math.inf


def product(x: Interval, y: Interval) -> Interval:
    """What the products of both lie in; where one is 0 the other is a number, however large."""
    ends = [0.0 if 0 in (a, b) else a * b for a in x for b in y]
    return max(min(ends), POSITIVE) if x[0] > 0 and y[0] > 0 else min(ends), max(ends)


def _bounded(x: Interval, bounds: Iterable[tuple[Callable[[float, float], float], Interval]]) -> Interval:
    for side, (low, high) in bounds:
        x = (side(x[0], low), side(x[1], high))
    return x
