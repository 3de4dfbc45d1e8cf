"""What Dynamo recorded of a value: a tensor without numbers, or a size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from .._compat import always_equal

AHEAD = "lacompile_ahead"
"""In the ``meta`` of a join: no state is behind what it joins."""
ONE_TENSOR = "lacompile_one_tensor"
"""In the ``meta`` of a value: who reads it shall not look into it, which decides what is found and proves nothing."""


def example_of(arg: Any) -> Any:
    """The example of a value of the graph; None of what is no value."""
    return arg.meta.get("example_value") if isinstance(arg, fx.Node) else None


def is_floating(node: fx.Node) -> bool:
    """Whether it is a tensor of fractions."""
    example = example_of(node)
    return isinstance(example, torch.Tensor) and example.is_floating_point()


def same_shape(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether two shapes are one, whatever their symbols stand for."""
    return len(one) == len(other) and all(map(always_equal, one, other))
