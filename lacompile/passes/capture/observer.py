"""Who is shown the operations of a graph."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import fx

from .memory import ViewStep


class Observer(Protocol):
    """What the lift implements; values are whatever it likes."""

    def source(self, node: fx.Node, tensor: torch.Tensor, real: Any) -> Any:
        """The value of a graph input or a constant."""

    def begins(self, node: fx.Node) -> None:
        """Called before each Dynamo node that is run."""

    def operation(self, func: Any, args: list[Any], kwargs: dict[str, Any], out: Any, dtypes: list[Any]) -> Any:
        """The value (or list of values) of one functional operation; tensor arguments arrive as values."""

    def unknown(self, tensor: torch.Tensor, why: str) -> Any:
        """The value of a tensor that nothing is known about."""

    def write(self, base: Any, view: ViewStep, new: Any, tensor: torch.Tensor) -> Any:
        """The value of a tensor one of whose views now holds ``new``."""

    def gradients_resume(self, last: bool) -> None:
        """Called where a part of the program that recorded no gradients ends."""

    def finished(self, node: fx.Node, outputs: list[tuple[torch.Tensor, Any]]) -> list[Any]:
        """Called after each Dynamo node with its tensor outputs; may replace their values."""
        ...


class Ignorant:
    """The observer of a graph that is run for its effects alone."""

    def source(self, node: fx.Node, tensor: torch.Tensor, real: Any) -> None: ...

    def begins(self, node: fx.Node) -> None: ...

    def operation(self, func: Any, args: list[Any], kwargs: dict[str, Any], out: Any, dtypes: list[Any]) -> Any:
        return [None] * len(out) if isinstance(out, list | tuple) else None

    def unknown(self, tensor: torch.Tensor, why: str) -> None: ...

    def write(self, base: Any, view: ViewStep, new: Any, tensor: torch.Tensor) -> None: ...

    def gradients_resume(self, last: bool) -> None: ...

    def finished(self, node: fx.Node, outputs: list[tuple[torch.Tensor, Any]]) -> list[Any]:
        return [None] * len(outputs)
