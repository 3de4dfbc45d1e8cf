"""Short convolutions beside attentions, each channel by itself: a sum of shifted products, which Inductor fuses.

They mix a token with the few before it, in front of q, k and v. On a GPU such a convolution is a call into a library,
which reads and writes all tokens once more, and where channels lie beside each other copies them first
(docs/decisions/0008).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from ..._compat import always_equal
from ..examples import example_of
from ..facts import Call, Expr, Match, Value
from ..graph.schedule import Schedule

DEVICES = ("cuda",)
"""Where Inductor's own kernels are faster."""
MOST_TAPS = 8
PARAMETERS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
PLAIN = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}


def short_convolutions(schedule: Schedule) -> Iterator[Match]:
    """The short convolutions of a graph on DEVICES, with what replaces them."""
    for node in schedule.gm.graph.find_nodes(op="call_function", target=torch.conv1d):
        if example_of(node).device.type in DEVICES and (sum_of_taps := _sum_of_taps(node)) is not None:
            yield Match(node, sum_of_taps, ())


def _sum_of_taps(node: fx.Node) -> Call | None:
    """``o[c, t] = bias[c] + sum_j weight[c, 0, j] x[c, t + j]`` of padded x, if that is what the node computes.

    As in the library it is rounded once, at its end.
    """
    given: dict[str, Any] = PLAIN | dict(zip(PARAMETERS, node.args, strict=False)) | node.kwargs
    x, weight, bias = (given[name] for name in PARAMETERS[:3])
    padding = _number(given["padding"])
    if _number(given["stride"]) != 1 or _number(given["dilation"]) != 1 or not isinstance(padding, int):
        return None
    channels, _, taps = example_of(weight).shape
    dtypes = {example_of(n).dtype for n in (node, *node.all_input_nodes)}
    each = always_equal(channels, given["groups"]) and always_equal(example_of(x).shape[-2], channels)
    if not each or not isinstance(taps, int) or taps > MOST_TAPS or len(dtypes) > 1:
        return None
    exact = torch.promote_types(dtypes.pop(), torch.float32)
    padded = Call(torch.nn.functional.pad, (Value(x), (padding, padding)))
    weights = _in(exact, _part(Value(weight), (slice(None), 0)))
    terms = [_in(exact, _part(Value(bias), (slice(None), None)))] if bias is not None else []
    for tap in range(taps):
        seen = _in(exact, _part(padded, (..., slice(tap, tap + 1 - taps or None))))
        terms.append(Call(torch.mul, (seen, _part(weights, (slice(None), tap, None)))))
    total, *rest = terms
    for term in rest:
        total = Call(torch.add, (total, term))
    return total


def _number(arg: Any) -> Any:
    """The one entry of a tuple."""
    return arg[0] if isinstance(arg, tuple) and len(arg) == 1 else arg


def _part(of: Expr, places: tuple[Any, ...]) -> Call:
    return Call(operator.getitem, (of, places))


def _in(dtype: torch.dtype, of: Expr) -> Call:
    return Call(torch.Tensor.to, (of, dtype))
