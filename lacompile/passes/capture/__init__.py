"""Runs a Dynamo graph on tensors without numbers and shows every functional ATen operation to an observer.

The graph is neither copied nor re-emitted: a dispatch mode below the interpreter sees the ~12 kinds of operations that
remain of hundreds, and each one belongs to the Dynamo node being run. That costs a tenth of building a second graph
with ``make_fx``.

    run          the graph, node by node
    dispatch     every operation of a node, as a functional one
    memory       what each tensor holds now: mutation is undone
    functional   what an in-place operation leaves behind
    schemas      what an operation writes into
    standins     the tensors without numbers: fakes, or what is cheaper
    modes        gradients, inference, autocast
    observer     who is shown all this
"""

from .memory import Memory, Record, ViewStep
from .observer import Observer
from .run import Capture
from .schemas import aliases
from .standins import fake_mode_of

__all__ = ["Capture", "Memory", "Observer", "Record", "ViewStep", "aliases", "fake_mode_of"]
