"""Tools for testing programs that use the backend, the same ones that this package's own tests use.

``assert_rewritten(model, x)`` states that a model is rewritten and computes the same; ``assert_refused`` that it is
left alone. ``inputs`` makes seeded arguments, and ``budgets`` says how large an error may be.
"""

from __future__ import annotations

from .asserts import assert_refused, assert_rewritten
from .budgets import Budget, budget, check_error, relative_error
from .inputs import head_log_decay, qkv, state, token_log_decay

__all__ = [
    "Budget",
    "assert_refused",
    "assert_rewritten",
    "budget",
    "check_error",
    "head_log_decay",
    "qkv",
    "relative_error",
    "state",
    "token_log_decay",
]
