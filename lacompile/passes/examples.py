"""What Dynamo recorded of a value: a tensor without numbers, or a size."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx


def example_of(arg: Any) -> Any:
    """The example of a value of the graph; None of what is no value."""
    return arg.meta.get("example_value") if isinstance(arg, fx.Node) else None


def is_floating(node: fx.Node) -> bool:
    """Whether it is a tensor of fractions."""
    example = example_of(node)
    return isinstance(example, torch.Tensor) and example.is_floating_point()
