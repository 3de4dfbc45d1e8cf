"""The one place for names that PyTorch does not promise."""

from __future__ import annotations

import contextlib
from typing import Any


def suppressed_guards(fake_mode: Any) -> contextlib.AbstractContextManager[None]:
    """Shape questions asked inside add no guards to the traced program."""
    env = getattr(fake_mode, "shape_env", None)
    return contextlib.nullcontext() if env is None else env.suppress_guards()
