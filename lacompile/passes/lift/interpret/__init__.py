"""The abstract interpreter: what each tensor of a Dynamo graph is, as a normal form.

interpreter  shown every operation of the graph, it keeps what each node's result is
known        what is known of one value
constants    what is computed from numbers alone, run as it stands
numbers      constants of the graph, and tables that are read
writes       tensors that are written into through a view
loops        what a loop computes step by step, as pieces of one tensor
series       which values are pieces of which tensor
windows      of which of them each step reads several tokens
own          the value of the graph that holds a result
"""

from __future__ import annotations

from .interpreter import Interpreter
from .known import Known

__all__ = ["Known", "Interpreter"]
