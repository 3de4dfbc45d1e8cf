"""What an in-place operation leaves behind, as a functional operation on the same arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from .observer import Observer

aten = torch.ops.aten

Functional = Callable[[Observer, list[Any], dict[str, Any], torch.Tensor, list[Any]], Any]
"""From an observer, the arguments as values, the tensor written to and the dtypes to the value that is left in it."""


@cache
def functional(func: Any) -> Functional | None:
    """The functional twin of an operation that writes into its first argument; None if there is none."""
    packet = func.overloadpacket
    name = packet.__name__
    if packet is aten.copy_ or func is aten.fill_.Tensor:
        return _copied
    if packet in (aten.zero_, aten.fill_):
        fill = (lambda vals: 0.0) if packet is aten.zero_ else (lambda vals: vals[1])
        return lambda obs, vals, kw, t, dts: obs.operation(
            aten.full_like.default, [vals[0], fill(vals)], {}, t, [dts[0]]
        )
    base = getattr(aten, name[:-1], None) if name.endswith("_") and not name.endswith("__") else None
    if base is None or func._overloadname not in base.overloads():
        return None
    overload = getattr(base, func._overloadname)
    return lambda obs, vals, kw, t, dts: obs.operation(overload, vals, kw, t, dts)


def _copied(obs: Observer, vals: list[Any], kw: dict[str, Any], t: torch.Tensor, dtypes: list[Any]) -> Any:
    """What ``copy_`` leaves in ``t``: the source in t's dtype and shape."""
    source = obs.operation(aten.expand.default, [vals[1], list(t.shape)], {}, t.to(dtypes[1]), [dtypes[1]])
    return obs.operation(aten._to_copy.default, [source], {"dtype": t.dtype}, t, [dtypes[1]])
