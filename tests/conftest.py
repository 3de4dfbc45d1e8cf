"""What takes a tenth of the time of all tests, and none of them is about, is turned off where they run."""

from __future__ import annotations

import gc
import logging

import pytest

# By default there is a collection for every 700 new objects, and each compilation makes many more that stay.
gc.set_threshold(10_000, 10, 50)


def pytest_collection_finish() -> None:
    """Once in each process, when PyTorch is imported and before the first test."""
    from torch._dynamo import guards

    # Dynamo times each set of new guards behind a cache that it flushes, 20 ms, for a line of its log.
    guards.profile_guard_manager = lambda *_: 0.0
    # pytest listens to every logger that does not propagate. PyTorch's structured trace is one of them, and computes
    # what it says, all graphs and guards of a compilation among it, where there is a handler.
    trace = logging.getLogger("torch.__trace")
    trace.propagate = True
    trace.handlers.clear()


@pytest.fixture
def without_inductor(monkeypatch):
    """The kernels of eager mode, for tests of what is rewritten and of what is looked at in each call."""
    monkeypatch.setattr("lacompile._compat.cpu_compiler_error", lambda: "not needed for this")
