"""Which other readings of a graph are worth a try, and which of two found more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import fx

from ..._compat import hint
from ..facts import Match, Refusal
from .domain.choices import Choices, Equal
from .inputs.alike import alike, argument_sizes
from .interpret import Interpreter


def other_choices(
    first: Interpreter, gm: fx.GraphModule, example_inputs: Sequence[Any], may_be_equal: bool
) -> Iterator[tuple[Choices, bool]]:
    """Where rounding leaves another formula of a buffer, inputs are turned or weighed, a sum over a part of a dimension
    is no decay, or sizes of several may be one.

    With each comes whether it settles the length that a loop over chunks has.
    """
    if first.statics is not None and (first.statics.ambiguous or _multiplied(first, first.statics.lines)):
        yield Choices(fit=1), False
    if first.engine.turned:
        yield Choices(turned_whole=True), False
    if first.engine.weighed:
        yield Choices(weighed_whole=True), False
    if first.engine.parts_weighed:
        yield Choices(parts_whole=True), False
    inputs = gm.graph.find_nodes(op="placeholder")
    if may_be_equal and (equal := alike(inputs, example_inputs)):
        yield Choices(equal=equal), False
        if first.engine.parts_weighed:
            yield Choices(equal=equal, parts_whole=True), False
    confined = first.engine.sizes.confined
    if may_be_equal and confined and (numbers := alike(inputs, example_inputs, confined)) != equal:
        yield Choices(equal=numbers), True


def _multiplied(interpreter: Interpreter, leaves: set[int]) -> bool:
    """Whether data is multiplied by one of these as it stands, as by a weight and never by a slope."""
    values = (known.value for known in interpreter.known.values()) if leaves else ()
    signatures = (t.signature for v in values for c in v.cases for t in c.terms if len(t.accs) > 1)
    return any(not leaves.isdisjoint(signature) for signature in signatures)


def missing(lengths: set[str], matches: Sequence[Match], refusals: Sequence[Refusal]) -> tuple[int, ...]:
    """What a reading leaves to be wished for: of two the one that is less is better."""
    rows = sum(hint(f.heads) * hint(f.length) for m in matches for f in m.facts)
    return not matches, parts(lengths, matches), len(refusals), -rows, len(matches)


def parts(lengths: set[str], matches: Sequence[Match]) -> int:
    """How many attentions have no length of a sequence, and so may be parts of what a loop computes."""
    return sum(str(f.length) not in lengths for m in matches for f in m.facts)


def lengths_of(gm: fx.GraphModule, example_inputs: Sequence[Any], equal: Sequence[Equal] = ()) -> set[str]:
    """How long sequences may be: of each argument the longest dimension but features, and those that are no number.

    A chunk may be as long as a batch is large, or a matrix wide. Those that some are taken for are among them.
    """
    found: set[str] = set()
    for node, real in zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=False):
        if sizes := argument_sizes(node, real):
            sizes = sizes[:-1] if node.meta["example_value"].is_floating_point() else sizes
            longest = max((n for n in sizes if isinstance(n, int)), default=0)
            found |= {str(n) for n in sizes if not isinstance(n, int) or n == longest}
    return found | {str(number) for size, number in equal if str(size) in found}
