"""lacompile: linear attention found in any PyTorch program, and compiled to one operator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Report", "__version__", "decayed_attention", "decode_step", "explain", "last_report"]

if TYPE_CHECKING:
    from .decode import decode_step
    from .explaining import explain
    from .ops import decayed_attention
    from .report import Report, last_report

_HOME = {
    "decayed_attention": "ops", "decode_step": "decode",
    "explain": "explaining", "last_report": "report", "Report": "report",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOME:
        from importlib import import_module

        # Kept, since the import is a large part of a short call.
        return globals().setdefault(name, getattr(import_module(f".{_HOME[name]}", __name__), name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
