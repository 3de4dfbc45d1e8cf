"""What the backend would do, without doing it. (Not ``explain.py``: the module would take the function's name.)"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .decision import decide
from .options import Options
from .report import Report


def explain(fn: Callable[..., Any], **options: Any) -> Callable[..., Report]:
    """``explain(model)(*args)`` runs the model once, uncompiled, and reports on every graph that Dynamo captures.

    Args:
        fn: a module or a function.
        options: as in ``torch.compile(options=...)``.

    Returns:
        A callable that takes what ``fn`` takes and returns a :class:`lacompile.Report`.
    """
    settings, _ = Options.split(options)

    def explained(*args: Any, **kwargs: Any) -> Report:
        found: list[Report] = []

        def collect(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
            found.append(decide(gm, example_inputs, settings).report)
            return gm.forward

        torch.compile(fn, backend=collect)(*args, **kwargs)
        return sum(found[1:], found[0]) if found else Report(graphs=0)

    return explained
