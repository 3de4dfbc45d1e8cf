"""What the program computes from its own numbers in bf16 and fp16: known as these formats leave it, or not taken apart.

Rounding of data is outside the promise of the normal form. Rounding of positions is not, and there sixteen bits leave
little: of 299 - 1 bf16 makes 300, and 0.37 i, near i = 200, is a multiple of a half. A difference of two such numbers,
in an exponent, is no rounding of a weight. So a value that is made of numbers alone is, in these formats, one of four
things: exact; a number that moves along no dimension; a weight, which is rounded as an entry of a mask is; or what the
operation makes of the numbers when it is run. Else it is a leaf that is marked as numbers (``Opaque.numbers``), of
which the same is asked: cast to fp32 such a leaf is what it holds, but in its own format nothing is computed from it
that the normal form would take for exact.
"""

from __future__ import annotations

import torch

from ...._compat import outside_modes
from ...capture.schemas import is_pointwise
from ..domain.kinds import Table
from ..domain.precision import PRODUCTS, SUMS
from ..domain.term import Precision, Term, Val
from ..engine import GiveUp
from . import Op

aten = torch.ops.aten

ROUNDS_ONCE = (*SUMS, *PRODUCTS, aten.neg, aten._to_copy)
"""What every device rounds alike: the result of one operation in fp32, or that of none, to the format. Of another
function devices may round the results apart, and only the one that it is run on here is known.
"""
RELATIVE = (*PRODUCTS, aten.neg, aten._to_copy)
"""What is off by a part of its result where what it is of is."""


def as_short_numbers(op: Op, v: Val, precision: Precision) -> tuple[Val, Precision]:
    """``v``, the result of ``op`` in a short format, as the format leaves its numbers, and how far it is them.

    Raises:
        GiveUp: they are not known, or a difference of a buffer's numbers is rounded.
    """
    if op.func.is_view:
        return v, precision
    if any(_is_difference(op, c.terms) for c in v.cases):
        raise GiveUp(f"a difference of a buffer's numbers in {op.out.dtype}")
    if not op.engine.written(v) or precision is Precision.EXACT or all(_keeps(c.terms) for c in v.cases):
        return v, precision
    rates = any(map(_is_near, op.args)) and all(_are_rates(op, c.terms) for c in v.cases)
    if rates or (op.engine.of_short_data and all(_are_distances(op, c.terms) for c in v.cases)):
        return v, precision
    return _by_running(op), Precision.EXACT


def _keeps(terms: tuple[Term, ...]) -> bool:
    """Whether a sum is a number that moves along no dimension, or one weight."""
    if all(t.poly.is_const and not t.accs and not t.exp for t in terms):
        return True
    return len(terms) == 1 and bool(terms[0].exp) and terms[0].poly.is_const and not terms[0].accs


def _are_rates(op: Op, terms: tuple[Term, ...]) -> bool:
    """Whether a sum is of lists of numbers, at one place each: no line of positions, of which rates are none."""
    return all(t.poly.is_const and _is_of_lists(op, t) for t in terms)


def _are_distances(op: Op, terms: tuple[Term, ...]) -> bool:
    """Whether a product is a distance of two positions times a rate.

    Rounded, it is off by a part of itself, and ``exp(-x)`` by that part of ``x exp(-x)``: less than what sixteen bits
    leave of the weight, and of the data that it multiplies, if all of that is in sixteen bits.
    """
    if op.func.overloadpacket not in RELATIVE:
        return False
    return all(len(op.engine.space.vars(t.poly)) > 1 and _is_of_lists(op, t) for t in terms)


def _is_of_lists(op: Op, t: Term) -> bool:
    return not t.exp and all(isinstance(op.engine.leaves[n].kind, Table) for n in t.leaves)


def _is_near(arg: object) -> bool:
    """Whether it is known but for rounding, as the slopes are that the numbers of a buffer were fitted by.

    Such a rate, rounded once more, is rounded as data is.
    """
    return isinstance(arg, Val) and arg.precision is Precision.ROUNDED


def _is_difference(op: Op, terms: tuple[Term, ...]) -> bool:
    """Whether one tensor of constants is there at two places."""
    if op.func.overloadpacket not in SUMS:
        return False
    found = [
        t.signature for t in terms if t.accs and not t.exp and all(map(op.engine.leaves.same_in_each_call, t.signature))
    ]
    return len(found) > len(set(found))


def _by_running(op: Op) -> Val:
    """The numbers that the operation makes of the numbers that it is given."""
    given = [a for a in op.args if isinstance(a, Val)]
    exact = all(_is_known(op, v) for v in given) and not any(isinstance(x, Val) for x in op.kwargs.values())
    here = is_pointwise(op.func) and _is_on_the_cpu(op)
    if not exact or not (op.func.overloadpacket in ROUNDS_ONCE or here):
        raise GiveUp(f"numbers computed in {op.out.dtype}, which cannot hold them exactly")
    with outside_modes():
        args = [_numbers(op, a, d) if isinstance(a, Val) else a for a, d in zip(op.args, op.dtypes, strict=False)]
        real = op.func(*args, **{k: x for k, x in op.kwargs.items() if k != "device"})
        return op.engine.table_value(real.to(torch.float64).numpy(), op.shape)


def _is_on_the_cpu(op: Op) -> bool:
    """Whether the program computes this there; what stands for a tensor in the analysis is on no device."""
    example = None if op.engine.running is None else op.engine.running.meta.get("example_value")
    return isinstance(example, torch.Tensor) and example.device.type == "cpu"


def _is_known(op: Op, v: Val) -> bool:
    """Whether the program's own numbers are: none was rounded, or it is a list, which knows what it was rounded to."""
    if v.precision is Precision.EXACT:
        return True
    return v.precision is Precision.SIGN and op.engine.array_of_table(v) is not None


def _numbers(op: Op, v: Val, dtype: torch.dtype | None) -> torch.Tensor:
    return torch.tensor(op.engine.made(v), dtype=dtype)
