"""The operator's kernels are compiled beside what Inductor compiles, and not after it when the graph first runs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from . import _compat

log = logging.getLogger("lacompile")


@contextmanager
def kernels_compiled(gm: fx.GraphModule) -> Iterator[None]:
    """What is done inside takes a core; the kernels of the graph's operators take another.

    A kernel that fails to compile here is compiled when it is called, and that is where its error belongs.
    """
    calls = set(_calls(gm))
    if not calls or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        yield
        return
    from .kernels.lightning2.warm import compile_kernels

    def compile_all() -> None:
        for call in calls:
            try:
                compile_kernels(call)
            except Exception as error:
                log.debug("kernels of %s are left to their first call: %s", call, error)

    thread = threading.Thread(target=compile_all, name="lacompile-kernels", daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _calls(gm: fx.GraphModule) -> Iterator[Any]:
    """What is known of each call of the operator on a GPU, in a graph and those that it calls.

    Triton is imported on the way, by this thread: two that import much the same at once may see half of a module.
    """
    from .kernels.select import has_kernels

    op = torch.ops.lacompile.decayed_attention.default
    for node in (n for m in gm.modules() if isinstance(m, fx.GraphModule) for n in m.graph.nodes if n.target is op):
        q, k, v, log_decay, _, initial_state, want_state, narrow = (_example(a) for a in node.args)
        if not all(isinstance(x, Tensor) for x in (q, k, v, log_decay)):
            continue
        # Of a symbolic head size nothing is asked: that would be a guard.
        if isinstance(q.shape[3], int) and isinstance(v.shape[3], int) and has_kernels(q, v):
            from .kernels.lightning2.warm import Call

            yield Call.of(q, k, v, log_decay, initial_state, want_state, narrow, _compat.hint)


def _example(arg: Any) -> Any:
    return arg.meta.get("example_value") if isinstance(arg, fx.Node) else arg
