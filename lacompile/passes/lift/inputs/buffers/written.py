"""The slope of buffers among the numbers that a program writes: ``state * gamma ** 64``, beside a mask of gamma."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import fx

from .slopes import Slopes


def written_slopes(graph: fx.Graph, slopes: Slopes) -> np.ndarray:
    """What explains the buffers and is written in the program, as it is or as the decay of several steps.

    The middle of what explains them if nothing is.
    """
    for numbers in _written(graph, slopes.middle.shape):
        for rates in _rates(numbers):
            steps = np.round(rates / np.where(slopes.middle > 0, slopes.middle, np.inf)).flat[0]
            if 1 <= steps < np.inf and slopes.holds(rates / steps):
                return rates / steps
    return slopes.middle


def _written(graph: fx.Graph, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """The floats of a program, or its lists of as many as there are heads."""
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        for arg in (*node.args, *node.kwargs.values()):
            if isinstance(arg, float if not shape else list | tuple):
                numbers = np.array(arg, dtype=object)
                if numbers.shape == shape and all(isinstance(x, float) for x in numbers.flat):
                    yield numbers.astype(np.float64)


def _rates(numbers: np.ndarray) -> Iterator[np.ndarray]:
    """Numbers as slopes, negative ones, or decay factors."""
    if (numbers > 0).all():
        yield numbers
    if (numbers < 0).all():
        yield -numbers
    if ((numbers > 0) & (numbers < 1)).all():
        yield -np.log(numbers)
