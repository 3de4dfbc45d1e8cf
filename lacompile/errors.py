"""One class per fault: what happened, where, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LacompileError(Exception):
    """Base of everything this package raises on purpose."""


class BadArgument(LacompileError, ValueError):
    """A direct call of the operator with an argument it cannot take."""

    def __init__(self, argument: str, expected: str, got: str):
        super().__init__(f"{argument}: expected {expected}, got {got}")
        self.argument, self.expected, self.got = argument, expected, got


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint naming the closest known name, or all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"


class UnknownOption(LacompileError, ValueError):
    """An option that neither this backend nor Inductor has."""

    def __init__(self, name: str, known: Iterable[str]):
        super().__init__(f"unknown option {name!r} for backend 'lightning'; {nearest(name, known)}")


class BadOptionValue(LacompileError, ValueError):
    """A known option with a value it does not take."""

    def __init__(self, name: str, value: object, expected: str):
        super().__init__(f"option {name!r}: expected {expected}, got {value!r}")


class UnknownMode(LacompileError, ValueError):
    """A ``mode=`` that torch.compile does not have."""

    def __init__(self, mode: str, known: Iterable[str]):
        super().__init__(f"unknown mode {mode!r} for backend 'lightning'; {nearest(mode, known)}")


class NotRewritten(LacompileError, RuntimeError):
    """``options={"strict": True}`` and a decayed attention was left as it was (or none was found)."""
