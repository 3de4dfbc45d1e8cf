"""What a call of the graph does to entries, by the operations that it ran and never by what it is called."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ..capture.effects import JOINS, PLAIN, Effects
from ..capture.schemas import is_pointwise
from ..examples import example_of

aten = torch.ops.aten

PASSES_ON = (aten.alias, aten.clone, aten.detach, aten.lift_fresh)
"""What changes no entry and no place. A function that runs nothing else may well do by its arguments, in another shape,
as ``x[:, 0:1]`` or ``sum_to_size`` where there is one entry."""
CASTS = frozenset[Any]({"to", "type", "type_as", "float", "double", "half", "bfloat16"})
"""What may change the format of its first argument, and no more."""
IDENTITIES = CASTS | {"clone", torch.clone, F.dropout}
"""What is its first argument in any shape, where it runs nothing."""


def is_pointwise_call(node: fx.Node, effects: Effects) -> bool:
    """Whether each entry of the result is one function, whatever the shapes, of the entries of its arguments there.

    What PyTorch's own functions are told beside tensors are numbers that count in every entry alike, if all that they
    run is pointwise. Of another function that Dynamo leaves whole that is not known: it may ask for a shape.
    """
    if not _of_pytorch(node) or not isinstance(example_of(node), torch.Tensor):
        return False
    given = (*node.args, *node.kwargs.values())
    if not node.all_input_nodes or not all(n in given for n in node.all_input_nodes):
        return False
    if not all(isinstance(example_of(n), PLAIN) for n in node.all_input_nodes):
        return False
    computed = list(_computed(node, effects))
    if not computed:
        return node.target in IDENTITIES
    return all(is_pointwise(f) or f.overloadpacket in (aten._to_copy, aten.scalar_tensor) for f in computed)


def is_cast_call(node: fx.Node, effects: Effects) -> bool:
    """Whether a pointwise call changes formats at most."""
    return all(f.overloadpacket is aten._to_copy for f in _computed(node, effects))


def computes_other_than(node: fx.Node, effects: Effects, packets: frozenset[Any]) -> bool:
    """Whether one of its operations is none of these, nor a cast."""
    known = packets | {aten._to_copy, aten.scalar_tensor}
    return any(f.overloadpacket not in known for f in _computed(node, effects))


def joins_tensors(node: fx.Node, effects: Effects) -> bool:
    """Whether a function of PyTorch puts tensors side by side in the end."""
    ran = effects.ran.get(node)
    return bool(ran) and ran[-1] in JOINS and _of_pytorch(node)


def _computed(node: fx.Node, effects: Effects) -> Iterator[Any]:
    return (f for f in effects.ran.get(node, ()) if f.overloadpacket not in PASSES_ON)


def _of_pytorch(node: fx.Node) -> bool:
    if node.op == "call_method":
        return True
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace == "aten"
    module = getattr(target, "__module__", None) or ""
    own = module in ("torch", "_operator") or module.startswith("torch.")
    return node.op == "call_function" and own and not isinstance(target, OPERATORS)


OPERATORS = (torch._ops.OpOverloadPacket, torch._ops.HigherOrderOperator)
"""Those of any library, and those that call graphs."""
