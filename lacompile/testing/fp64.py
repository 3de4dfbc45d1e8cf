"""Runs a program in fp64 whatever precision it names, as the measure of every other run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

LOW = (torch.float32, torch.float16, torch.bfloat16)
CASTS = {torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16}


class _Promoted(TorchFunctionMode):
    """Every floating dtype that the program names is read as fp64: ``x.float()``, ``dtype=torch.bfloat16``, ...."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in CASTS:
            return args[0].double()
        return func(*map(_promote, args), **{k: _promote(v) for k, v in (kwargs or {}).items()})


def _promote(argument: Any) -> Any:
    return torch.float64 if isinstance(argument, torch.dtype) and argument in LOW else argument


@contextlib.contextmanager
def in_fp64() -> Iterator[None]:
    """Inside, new floating tensors are fp64 and casts to a lower precision become casts to fp64.

    Tensors that exist already keep their dtype: pass fp64 arguments. Autocast leaves fp64 tensors alone.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Promoted():
            yield
    finally:
        torch.set_default_dtype(before)
