"""What PyTorch says of an operation: what it writes into, whether its result is a view, whether it is pointwise."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

METADATA_QUERIES = {
    aten.sym_size.int,
    aten.sym_size.default,
    aten.sym_stride.int,
    aten.sym_stride.default,
    aten.sym_numel.default,
    aten.sym_storage_offset.default,
    aten.is_contiguous.default,
}

# Operators that write although their schemas do not say so: (positions of) the running statistics.
UNDECLARED_WRITES = {aten.native_batch_norm: (3, 4), aten.cudnn_batch_norm: (3, 4), aten.miopen_batch_norm: (3, 4)}
# Pointwise by their definitions, which PyTorch does not tag, or not in all their overloads.
UNTAGGED = (aten.hardswish, aten.log_sigmoid_forward, aten.masked_fill, aten.rsub)
# After these the tensor lives elsewhere, or is another one.
MOVES = ("set_", "set_data", "resize_", "resize_as_", "swap_")


@cache
def _declared_writes(func: Any) -> tuple[tuple[int, ...], frozenset[str]]:
    """Positions and names of the arguments that an operation writes into."""
    schema = func._schema.arguments
    positions = [n for n, s in enumerate(schema) if s.is_write]
    positions += UNDECLARED_WRITES.get(func.overloadpacket, ())
    return tuple(positions), frozenset(s.name for s in schema if s.is_write)


def written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors that an operation writes into."""
    positions, keywords = _declared_writes(func)
    if not (positions or keywords):
        return []
    held = [args[n] for n in positions if n < len(args)]
    held += [v for k, v in kwargs.items() if k in keywords]
    return [t for t in tree_leaves(held) if isinstance(t, torch.Tensor)]


def moves(func: Any) -> bool:
    """Whether a tensor that the operation writes into may live in another storage afterwards."""
    return func.overloadpacket.__name__ in MOVES


@cache
def aliases(func: Any) -> bool:
    """Whether a result may share the memory of an argument."""
    return any(a.alias_info is not None for a in func._schema.arguments)


@cache
def is_pointwise(func: Any) -> bool:
    """Whether each entry of a result is one function of the entries there, after broadcasting, and of nothing else."""
    tags = func.tags
    tagged = torch.Tag.pointwise in tags or func.overloadpacket in UNTAGGED
    return tagged and torch.Tag.nondeterministic_seeded not in tags and not func._schema.is_mutable
