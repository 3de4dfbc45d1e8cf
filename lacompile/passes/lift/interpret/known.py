"""What is known of one value of a graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from ..domain.term import Val


@dataclass
class Known:
    """What is known of one Dynamo value."""

    node: fx.Node
    value: Val
    tensor: torch.Tensor
    compute: torch.dtype
    """The widest format the sums inside it were computed in."""
    after: fx.Node | None = None
    """The node that last wrote into it, if it was written after it was made."""


def given_to(node: fx.Node, known: Mapping[fx.Node, Known]) -> list[Val]:
    """The values that a call is given, of those that are known."""
    return [known[n].value for n in node.all_input_nodes if n in known]
