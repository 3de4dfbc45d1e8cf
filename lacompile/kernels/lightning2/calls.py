"""Launching with little Python in between: what depends on shapes alone is worked out once for each of them.

A launch through ``kernel[grid](...)`` binds and inspects every argument, which for forty arguments takes longer than a
small attention itself. So the first launch goes that way and the later ones call what it compiled, by CUDA's driver if
that may be (:mod:`.direct`). That is sound because everything that the compiler specialises on is in the key
(:func:`signature`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor

from .direct import Direct, direct, watched

MOST = 1024
"""Calls that are kept: more than a model has."""

Built = TypeVar("Built")


def signature(*tensors: Tensor | None) -> Hashable:
    """What a launch may depend on: shapes, strides, dtypes, whether rows are aligned, which tensors are there."""
    return tuple(
        [None if x is None else (x.shape, x.stride(), x.dtype, x.data_ptr() % 16 == 0, x.device) for x in tensors]
    )


class Calls(Generic[Built]):
    """Values worked out once for each key."""

    def __init__(self) -> None:
        self.known: dict[Hashable, Built] = {}
        _EVERY.append(self)

    def get(self, key: Hashable, build: Callable[[], Built]) -> Built:
        found = self.known.get(key)
        if found is None:
            if len(self.known) >= MOST:
                self.known.clear()
            found = self.known[key] = build()
        return found


_EVERY: list[Calls[Any]] = []


def forget() -> None:
    """Works everything out anew: after a change of what a launch is made from."""
    for calls in _EVERY:
        calls.known.clear()


class _Described:
    """A tensor descriptor as the launch of a compiled kernel reads it, without the checks of Triton's own class."""

    __slots__ = ("base", "shape", "strides")
    padding = "zero"
    round_f32_to_tf32 = False

    def __init__(self, base: Tensor, shape: list[int], strides: list[int]):
        self.base, self.shape, self.strides = base, shape, strides


class Box:
    """Tiles ``[rows, columns]`` of one head of a tensor ``[B,H,N,D]``, read or written by descriptor.

    ``layout`` is that of the tiles in shared memory, for Gluon's kernels; Triton's choose it themselves.
    """

    def __init__(self, x: Tensor, rows: int, columns: int, layout: Any = None):
        # The stride of a dimension of one element means nothing but must be a valid one.
        outer = zip(x.shape[:-1], x.stride()[:-1], strict=True)
        self.shape, self.strides = list(x.shape), [*(8 if size == 1 else stride for size, stride in outer), 1]
        self.tile, self.layout = [1, 1, rows, columns], layout

    def checked(self, x: Tensor) -> Any:
        """What Triton's own launch takes."""
        if self.layout is None:
            from triton.tools.tensor_descriptor import TensorDescriptor

            return TensorDescriptor(x, self.shape, self.strides, self.tile)
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

        return GluonDescriptor(x, self.shape, self.strides, self.tile, self.layout)

    def unchecked(self, x: Tensor) -> _Described:
        """What the launch of a compiled kernel takes."""
        return _Described(x, self.shape, self.strides)


class Launch:
    """One kernel over so many programs. Its arguments are tensors, then numbers, then compile-time constants.

    ``boxes`` has for each tensor how it is described, or None where it is handed over by its address.
    """

    def __init__(
        self,
        kernel: Any,
        programs: int,
        boxes: Sequence[Box | None],
        numbers: Sequence[int | float],
        constants: dict[str, Any],
        options: dict[str, int],
    ):
        self.kernel, self.grid, self.boxes = kernel, (programs, 1, 1), tuple(boxes)
        self.numbers, self.constants, self.options = tuple(numbers), constants, options
        self.run: Callable[..., None] | None = None
        self.direct: Direct | None = None
        self.rest: tuple[Any, ...] = ()

    def __call__(self, *tensors: Tensor) -> None:
        if self.direct is not None and not watched():
            self.direct(tensors)
            return
        pairs = zip(self.boxes, tensors, strict=True)
        if self.run is not None:
            self.run(*[x if box is None else box.unchecked(x) for box, x in pairs], *self.rest)
            return
        arguments = [x if box is None else box.checked(x) for box, x in pairs]
        compiled = self.kernel[self.grid](*arguments, *self.numbers, **self.constants, **self.options)
        if compiled is not None:  # as it is from Triton's interpreter
            named = self.kernel.arg_names[len(arguments) + len(self.numbers) :]
            self.rest = (*self.numbers, *(self.constants[name] for name in named))
            self.run = compiled[self.grid]
            described = [None if box is None else box.unchecked for box in self.boxes]
            self.direct = direct(compiled, self.grid[0], described, tensors, self.rest)
