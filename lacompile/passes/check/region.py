"""The part of a graph that a match replaces: found, and run in fp64 on inputs of one's own."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from ..capture.effects import NOWHERE
from ..capture.modes import AUTOCAST, GRAD_MODE, INFERENCE_MODE
from ..examples import is_floating
from ..facts import Match, values_of
from ..graph.schedule import Schedule


@dataclass(frozen=True)
class Region:
    """The nodes that compute a match's target, in graph order, from some values.

    ``copies`` are the nodes that compute the value of an input once more, by that input: both must be one value.
    ``dependent`` are values that the match's replacement reads and that are computed here.
    """

    nodes: list[fx.Node]
    inputs: list[fx.Node]
    copies: dict[fx.Node, fx.Node]
    dependent: list[fx.Node]

    def first(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """The inputs that these are, or are copies of."""
        return {self.copies.get(n, n) for n in nodes}

    def with_copies(self, env: Mapping[fx.Node, Any]) -> dict[fx.Node, Any]:
        return {**env, **{copy: env[given] for copy, given in self.copies.items()}}


def cuts(schedule: Schedule, match: Match) -> Iterator[list[fx.Node]]:
    """Values that what a match is about can be computed from, those that are nearest to it first.

    They are those that the replacement reads; of these the ones that are not computed from others, as a gate and the
    argument of its logarithm may be; and the numbers that the graph is given.
    """
    read = list(dict.fromkeys(v.node for v in values_of(match.replacement)))
    yield read
    independent = [n for n in read if not schedule.computed_from(n, {*read} - {n})]
    if len(independent) < len(read):
        yield independent
    ends = match.target, *read
    given = [n for n in schedule.inputs if is_floating(n) and any(schedule.computed_from(at, {n}) for at in ends)]
    if any(n not in given for n in independent):
        yield given


def region_of(schedule: Schedule, match: Match, inputs: Sequence[fx.Node]) -> Region:
    """What to run for the target, where these values are known.

    The nodes are found from the last to the first: a node is needed for its result, or for what it writes into memory
    that a needed node behind it reads.
    """
    order, lives = schedule.order, schedule.effects.lives
    read = dict.fromkeys(v.node for v in values_of(match.replacement))
    dependent = [n for n in read if n not in inputs]
    numbers = schedule.numbers
    by_number: dict[int, fx.Node] = {}
    copies = {n: first for n in inputs if (first := by_number.setdefault(numbers[n], n)) is not n}
    end = order[match.after or match.target]
    needed: set[int] = set()
    waiting: list[int] = []  # a heap of places, the last first

    def need(nodes: Iterable[fx.Node]) -> None:
        for n in nodes:
            if order[n] not in needed:
                needed.add(order[n])
                heappush(waiting, -order[n])

    need([match.target, schedule.nodes[end], *dependent])
    need(schedule.writers(lives.get(match.target, NOWHERE), -1, end))
    if match.place is not None:
        # behind the place of the replacement a value that it reads may be written to, and then be read by the target
        memory = NOWHERE.union(*(lives.get(n, NOWHERE) for n in inputs))
        need(schedule.writers(memory, order[match.place], end))
    memory = lives.get(match.target, NOWHERE)
    while waiting:
        at = -heappop(waiting)
        node = schedule.nodes[at]
        if (given := by_number.get(numbers[node])) is not None:
            if node is not given:
                copies[node] = given
            continue
        need(node.all_input_nodes)
        held = NOWHERE.union(*(lives.get(n, NOWHERE) for n in node.all_input_nodes if n not in inputs))
        need(schedule.writers(held - memory, -1, at - 1))
        memory |= held
    nodes = [n for at in sorted(needed) if numbers[n := schedule.nodes[at]] not in by_number]
    return Region(nodes, list(by_number.values()), copies, dependent)


def run(
    gm: fx.GraphModule,
    region: Region,
    env: dict[fx.Node, Any],
    real: Mapping[fx.Node, Any],
    inexact: set[fx.Node] | None = None,
) -> dict[fx.Node, Any]:
    """The values of all nodes.

    Args:
        env: the region's inputs.
        real: the inputs at hand of those placeholders that are none of the region's inputs.
        inexact: gets the nodes of :func:`rounded_numbers` of which rounding has changed some number.
    """
    held = region.with_copies(env)
    numbers = rounded_numbers(region)
    for node in region.nodes:
        if node.op == "placeholder":
            held[node] = plain(_own(real[node]))
        elif node.op == "get_attr":
            held[node] = _own(operator.attrgetter(str(node.target))(gm))
        elif node.op == "call_function" and node.target in (*GRAD_MODE, *INFERENCE_MODE, *AUTOCAST):
            held[node] = None
        else:
            args, kwargs = map_arg((node.args, node.kwargs), held.__getitem__)
            args, kwargs = in_fp64_on_cpu(args), in_fp64_on_cpu(kwargs)
            if node.op == "call_method" and node.target in ("float", "half", "bfloat16"):
                held[node] = args[0].to(torch.float64)
            elif node.op == "call_method":
                held[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                held[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            if is_constant(node) or node in numbers:
                before, held[node] = held[node], _in_own_precision(node, held[node])
                if inexact is not None and node in numbers and not _equal(before, held[node]):
                    inexact.add(node)
            held[node] = _in_fp64(held[node])
    return held


def rounded_numbers(region: Region) -> set[fx.Node]:
    """What the program computes in a short format from its own numbers alone: the analysis rounds these too.

    The graph alone is asked, and not what the analysis took for numbers (``lift/interpret/constants.py``): whether that
    was right is what the region is run for.
    """
    numbers: set[fx.Node] = set()
    for node in region.nodes:
        known = all(n.op == "get_attr" or n in numbers for n in node.all_input_nodes)
        if known and node.op not in ("placeholder", "get_attr"):
            numbers.add(node)
    return set(filter(_is_short, numbers))


def rounded_weights(region: Region, inexact: Iterable[fx.Node]) -> Iterator[torch.dtype]:
    """The formats of what is inexact and multiplies data as it is, once for each: a weight, rounded as data is.

    What goes through another function before, as a position does in an exponent, is no rounding of data: the analysis
    knows such numbers as the format leaves them, so that the replacement computes with them too, or does not match.
    """
    inside = set(region.nodes)
    for node in inexact:
        work, seen = [node], {node}
        while work:
            users = [n for n in work.pop().users if n in inside]
            if any(_multiplies_data(n) for n in users):
                yield node.meta["example_value"].dtype
                break
            work += [n for n in users if n not in seen and _name(n) in KEEPS_ERRORS]
            seen.update(work)


def _multiplies_data(node: fx.Node) -> bool:
    """Whether a product has a factor that is no number of the program's."""
    return _name(node) in PRODUCTS and not _of_numbers(node)


def _of_numbers(node: fx.Node) -> bool:
    """Whether no input of the graph is among what a node is computed from."""
    work, seen = [node], {node}
    while work:
        at = work.pop()
        if at.op == "placeholder" and isinstance(at.meta.get("example_value"), Tensor):
            return False
        work += [n for n in at.all_input_nodes if n not in seen]
        seen.update(work)
    return True


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


PRODUCTS = {"mul", "mul_", "imul", "multiply", "matmul", "einsum", "mm", "bmm", "baddbmm", "div", "truediv", "where"}
KEEPS_ERRORS = PRODUCTS | {
    "neg", "to", "type_as", "float", "double", "half", "bfloat16", "tril", "tril_", "triu", "triu_", "masked_fill",
    "masked_fill_", "getitem", "unsqueeze", "squeeze", "view", "reshape", "expand", "expand_as", "transpose", "permute",
    "t", "getattr", "contiguous", "clone", "flip", "cat", "stack", "repeat", "unbind", "split", "chunk", "narrow",
    "select", "repeat_interleave", "detach", "unflatten", "flatten", "movedim", "swapaxes",
}  # fmt: skip
"""Functions whose result has the relative errors of their arguments: products, casts, choices and views."""


def _equal(before: Any, after: Any) -> bool:
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return True
    return bool(torch.equal(before.to(torch.float64), after.to(torch.float64)))


def _is_short(node: fx.Node) -> bool:
    example = node.meta.get("example_value")
    return isinstance(example, Tensor) and example.dtype in (torch.bfloat16, torch.float16)


def is_constant(node: fx.Node) -> bool:
    """Whether the program makes the value from nothing but numbers and sizes."""
    numbers = int | float | torch.SymInt | torch.SymFloat
    return all(isinstance(n.meta.get("example_value"), numbers) for n in node.all_input_nodes)


def _in_own_precision(node: fx.Node, x: Any) -> Any:
    """What a program makes from nothing is a constant: one written down as 0.9 in fp32 is not 0.9."""
    example = node.meta.get("example_value")
    return x.to(example.dtype) if isinstance(x, Tensor) and isinstance(example, Tensor) else x


def _own(x: Any) -> Any:
    """A copy of what the program was given: the region may write into it."""
    return _in_fp64(x.detach().to("cpu", copy=True)) if isinstance(x, Tensor) else x


def _in_fp64(x: Any) -> Any:
    if isinstance(x, Tensor):
        x = x.cpu() if x.device.type != "cpu" else x
        return x.to(torch.float64) if x.is_floating_point() and x.dtype != torch.float64 else x
    return x


def in_fp64_on_cpu(arg: Any) -> Any:
    """Arguments that name a low precision or another device, made fp64 on CPU."""
    if isinstance(arg, torch.dtype):
        return torch.float64 if arg.is_floating_point else arg
    if isinstance(arg, torch.SymInt | torch.SymFloat):
        return plain(arg)
    if isinstance(arg, torch.device):
        return torch.device("cpu")
    if isinstance(arg, dict):
        return {k: ("cpu" if k == "device" else in_fp64_on_cpu(v)) for k, v in arg.items()}
    if isinstance(arg, list | tuple) and not isinstance(arg, torch.Size):
        return type(arg)(in_fp64_on_cpu(a) for a in arg)
    return arg


def plain(x: Any) -> Any:
    """A number as the inputs at hand have it; anything else as it is."""
    return float(x.node.hint) if isinstance(x, torch.SymFloat) else plain_int(x) if isinstance(x, torch.SymInt) else x


def plain_int(size: Any) -> int:
    """A size as the inputs at hand have it."""
    return size if isinstance(size, int) else int(size.node.hint)
