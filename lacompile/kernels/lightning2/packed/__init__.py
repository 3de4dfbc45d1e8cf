"""Sequences of any lengths packed one after the other, on the body that serves a single one (:mod:`..body`)."""

from __future__ import annotations

from .backward import backward
from .forward import forward

__all__ = ["backward", "forward"]
