"""The one place that knows how large an error may be. Budgets may be tightened; they are never loosened.

An error is a relative L2 error against the same computation in fp64: ``||got - want|| / ||want||``. Two rules hold:

1. it is within the budget of its dtype, unless eager itself is not, as in a deep model;
2. it is at most twice what eager PyTorch makes in the same dtype on the same inputs, plus a floor.

The second rule catches a kernel that is worse than what it replaces but still within the budget. The floor is there
because an eager run may be exact by luck.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["output", "gradient"]


@dataclass(frozen=True)
class Budget:
    """Largest relative L2 errors of one dtype (no unit).

    Attributes:
        output: of an output or a state.
        gradient: of a gradient of any argument or parameter.
        floor: what is added to twice the error of eager.
    """

    output: float
    gradient: float
    floor: float


# A value is rounded to its dtype with a relative error of up to u: 2^-53, 2^-24, 2^-11 and 2^-8. Half-precision budgets
# are two roundings for outputs (products, result) and four for gradients; sums over tokens are taken in fp32.
# In fp32 and fp64 the sums themselves are what is rounded, so those budgets leave room for long ones. The second rule
# says nothing about fp64, where eager is the measure itself: hence the floor.
BUDGETS: dict[torch.dtype, Budget] = {
    torch.float64: Budget(output=1e-13, gradient=1e-12, floor=1e-12),
    torch.float32: Budget(output=2e-6, gradient=1e-5, floor=2.0**-22),
    torch.float16: Budget(output=2.0**-10, gradient=2.0**-9, floor=2.0**-11),
    torch.bfloat16: Budget(output=2.0**-7, gradient=2.0**-6, floor=2.0**-8),
}


def budget(dtype: torch.dtype) -> Budget:
    """The budget of a dtype.

    Raises:
        KeyError: a dtype that has none.
    """
    return BUDGETS[dtype]


def relative_error(got: Tensor, want: Tensor) -> float:
    """``||got - want|| / ||want||`` in fp64, or ``||got - want||`` where want is zero; inf for another shape.

    What is not finite is infinitely far off: no budget allows it, and where eager is, only the budget counts.
    """
    if got.shape != want.shape:
        return float("inf")
    got, want = got.detach().to("cpu", torch.float64), want.detach().to("cpu", torch.float64)
    distance, size = float((got - want).norm()), float(want.norm())
    error = distance / size if size else distance
    return error if math.isfinite(error) else math.inf


def check_error(
    what: str,
    got: Tensor,
    want: Tensor,
    *,
    eager: Tensor | float | None = None,
    kind: Kind = "output",
    dtype: torch.dtype | None = None,
) -> float:
    """The error of ``got``, if both rules allow it.

    Args:
        what: the name of the tensor in the message.
        got: the tensor to be judged.
        want: the fp64 run's.
        eager: eager's in the dtype of ``got``, or its error; without it only the first rule applies.
        kind: an output (or a state), or a gradient.
        dtype: whose budget; that of ``got`` unless given. The gradient of an fp32 decay of a bf16 attention, say, is
            judged as bf16.

    Raises:
        AssertionError: a rule is broken; the message holds the errors and the rule.
    """
    allowed = budget(dtype or got.dtype)
    limit = allowed.output if kind == "output" else allowed.gradient
    error = relative_error(got, want)
    found = f"{what}: relative error {error:.2e} against fp64"
    if eager is not None:
        of_eager = relative_error(eager, want) if isinstance(eager, Tensor) else eager
        found += f", eager's is {of_eager:.2e}"
        # twice the roundings, as in the budgets: once forward, once back
        floor = allowed.floor if kind == "output" else 2 * allowed.floor
        if not error <= 2 * of_eager + floor:
            raise AssertionError(f"{found}; allowed is twice that plus {floor:.2e}")
        if limit < of_eager < math.inf:
            return error
    if not error <= limit:
        raise AssertionError(f"{found}; the budget is {limit:.2e}")
    return error
