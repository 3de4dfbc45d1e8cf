"""The Triton kernels run by Triton's interpreter on the CPU: in this process if that can still be, else in another.

A kernel is made an interpreted one when its module is imported. So that cannot be where Triton was imported before, or
where there is a GPU for the compiled kernels to run on.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
from types import ModuleType
from unittest import mock

import pytest
import torch


@functools.cache
def interpreted_kernels() -> ModuleType | None:
    """``lacompile.kernels.lightning2`` with interpreted kernels; None where they need a process of their own."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed", allow_module_level=True)
    asked = os.environ.get("TRITON_INTERPRET") == "1"
    if not asked and ("triton.language" in sys.modules or torch.cuda.is_available()):
        return None
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        from lacompile.kernels import lightning2
        from lacompile.kernels.lightning2 import packed as _packed  # noqa: F401
    return lightning2


def run_in_a_process_of_its_own(path: str) -> None:
    """Runs the tests of one file there; fails if any of them does."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", path]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
