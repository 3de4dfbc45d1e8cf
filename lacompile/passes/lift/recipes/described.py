"""What a report says of a match beside its numbers: how the program wrote it, and what the decay is read from."""

from __future__ import annotations

from typing import Literal

import torch
from torch import fx

from ...names import readable_name
from ..domain.affine import ONE
from ..domain.exponent import Mono
from ..domain.kinds import Argument, Extended, Opaque, Positions, Scalar, Symbol
from ..domain.leaves import Leaves
from ..prove.proof import N_ROLE, Proof

TABLE = "a table of numbers"


def formulation(p: Proof, region: set[fx.Node]) -> Literal["parallel", "chunkwise", "recurrent"]:
    """How the program wrote it, in the nodes between what is read and the result."""
    length = p.roles[N_ROLE]
    steps, square = 0, False
    for node in region:
        example = node.meta.get("example_value")
        if isinstance(example, torch.Tensor) and node.op != "placeholder":
            sizes = [s for s in example.shape[-2:] if isinstance(s, int) and length.is_const and s == length.const]
            symbolic = [s for s in example.shape if not isinstance(s, int)]
            square |= len(sizes) >= 2 or len({str(s) for s in symbolic}) < len(symbolic)
            steps += 1
    if length == ONE or (length.is_const and steps > (8 if square else 4) * length.const):
        return "recurrent"
    return "parallel" if square else "chunkwise"


def source(leaves: Leaves, mono: Mono, c: float) -> str:
    """What a rate is read from."""

    def name(leaf: int) -> str:
        kind = leaves[leaf].kind
        if isinstance(kind, Opaque):
            return readable_name(kind.node) if kind.node is not None else kind.label
        if isinstance(kind, Symbol):
            inner = ", ".join(name(a.leaf) for a in kind.args if isinstance(a, Argument))
            op = getattr(kind.op, "overloadpacket", kind.op)
            return f"{getattr(op, '__name__', op)}({inner})"
        if isinstance(kind, Extended):
            return name(kind.of)
        if isinstance(kind, Scalar):
            return f"1 / {kind.of}" if kind.inverse else str(kind.of)
        return "positions" if isinstance(kind, Positions) else TABLE

    factors = " * ".join(name(leaf) for leaf, _ in mono)
    if c == 1 or factors == TABLE:  # the numbers of a table have their sign
        return factors
    return f"-{factors}" if c == -1 else f"{c:.6g} * {factors}"
