"""A ``vmap`` as the operations on whole tensors that it stands for.

Dynamo leaves in the graph what switches it on and off, and in between operations on one element of the batch. Traced
once more on tensors without numbers, they are what PyTorch runs: that can be analysed, and rewritten.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta
from torch.utils._pytree import tree_map

from .. import _compat
from .capture import fake_mode_of
from .capture.modes import GRAD_MODE, switches_autocast

aten = torch.ops.aten

BEGIN, END = "_vmap_increment_nesting", "_vmap_decrement_nesting"
IN_PLACE = {f"i{op}" for op in ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")}
PARTS = {"lazy_load_decompositions", BEGIN, END, "_add_batch_dim", "_remove_batch_dim"}


class Unmappable(Exception):
    """Something that is not traced anew: a mode that is switched, a graph of its own, a transform of another kind."""


def without_vmaps(gm: fx.GraphModule) -> fx.GraphModule | None:
    """The same graph, each outermost ``vmap`` in it as operations on whole tensors; None if that cannot be had.

    Nor under autocast, which casts what a program calls, and not what that is made of.
    """
    mode = fake_mode_of(gm)
    if _compat.in_autocast() or switches_autocast(gm.graph):
        return None
    if mode is None or any(_name(n) not in PARTS for n in gm.graph.nodes if _compat.is_functorch(n.target)):
        return None
    out = fx.GraphModule(gm, fx.Graph())
    env: dict[fx.Node, fx.Node] = {}
    try:
        for span in _spans(list(gm.graph.nodes)):
            if len(span) == 1:
                env[span[0]] = out.graph.node_copy(span[0], env.__getitem__)
            else:
                _splice(out, _traced(gm, span, mode), env)
    except Exception:
        return None
    out.meta = gm.meta
    out.recompile()
    return out


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target))


def _spans(nodes: Sequence[fx.Node]) -> Iterator[list[fx.Node]]:
    """The nodes one by one, and from the beginning of an outermost vmap to its end together."""
    depth, span = 0, []
    for node in nodes:
        depth += (_name(node) == BEGIN) - (_name(node) == END)
        span.append(node)
        if not depth:
            yield span
            span = []
    if span:
        raise Unmappable("a vmap that does not end")


class Traced:
    """A vmap as a graph of its own: of these values of the program, as results those."""

    def __init__(self, graph: fx.GraphModule, given: list[fx.Node], results: list[fx.Node]):
        self.graph, self.given, self.results = graph, given, results


def _traced(gm: fx.GraphModule, span: Sequence[fx.Node], mode: Any) -> Traced:
    inside = set(span)
    if any(n.op != "call_function" and n.op != "call_method" for n in span):
        raise Unmappable("a call of a module")
    if any(n.target in GRAD_MODE or isinstance(n.target, torch._ops.HigherOrderOperator) for n in span):
        raise Unmappable("a mode that is switched, or a graph of its own")
    if any(map(_overwrites, span)):
        raise Unmappable("what is overwritten")
    given = list(dict.fromkeys(i for n in span for i in n.all_input_nodes if i not in inside))
    results = [n for n in span if any(u not in inside for u in n.users)]
    part = fx.Graph()
    env = {n: part.placeholder(f"given_{i}") for i, n in enumerate(given)}
    for n in span:
        env[n] = part.node_copy(n, env.__getitem__)
    part.output([env[n] for n in results])
    with mode, torch.no_grad(), preserve_node_meta():
        examples = [tree_map(_like, n.meta["example_value"]) for n in given]
        return Traced(make_fx(fx.Interpreter(fx.GraphModule(gm, part)).run)(*examples), given, results)


def _like(x: Any) -> Any:
    return (
        torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) if isinstance(x, torch.Tensor) else x
    )


def _splice(out: fx.GraphModule, traced: Traced, env: dict[fx.Node, fx.Node]) -> None:
    inner: dict[fx.Node, Any] = {}
    given = iter(traced.given)
    for node in traced.graph.graph.nodes:
        if node.op == "placeholder":
            inner[node] = env[next(given)]
        elif node.op == "output":
            for of, made in zip(traced.results, node.args[0], strict=True):
                env[of] = inner[made]
        elif node.op == "call_function":
            inner[node] = made = out.graph.node_copy(node, inner.__getitem__)
            if node.target is aten.view.default:  # right for the strides that were seen, which may become others
                made.target = aten.reshape.default
            made.meta = {k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack")}
            made.meta["example_value"] = node.meta["val"]
        else:
            raise Unmappable("a constant of the trace")


def _overwrites(node: fx.Node) -> bool:
    """Whether a node of the program writes into what it is given: then a view must not become a copy."""
    name = _name(node)
    in_place = (name.endswith("_") and not name.endswith("__")) or name == "setitem"
    return in_place or name in IN_PLACE or "out" in node.kwargs
