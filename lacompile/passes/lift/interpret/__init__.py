"""The abstract interpreter: what each tensor of a Dynamo graph is, as a normal form.

interpreter  shown every operation of the graph, it keeps what each node's result is
constants    what is computed from numbers alone, run as it stands
numbers      constants of the graph, and tables that are read
writes       tensors that are written into through a view
series       what a loop computes step by step, as the pieces of one tensor
windows      of which of them each step reads several tokens
own          the value of the graph that holds a result
"""

from __future__ import annotations

from .interpreter import Fact, Interpreter

__all__ = ["Fact", "Interpreter"]
