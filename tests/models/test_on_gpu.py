"""The programs of the support matrix on a GPU: as many rewrites as on a CPU, computed by the kernels, and right.

A program in fp64 stays as it is: no GPU kernel computes in that format.
"""

from __future__ import annotations

import pytest
import torch

from lacompile.testing import assert_refused, assert_rewritten

from .matrix import Row
from .rows import ROWS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("row", [row for row in ROWS if row.rewrites], ids=str)
def test_row(row: Row):
    if not row.installed:
        pytest.skip("a public package that is tested where it is installed")
    torch.manual_seed(0)
    with torch.device("cuda"):
        program, args = row.make(row.length)
    if isinstance(program, torch.nn.Module) and any(p.dtype is torch.float64 for p in program.parameters()):
        assert_refused(program, *args, obligation="unsupported")
    else:
        assert_rewritten(program, *args, count=row.rewrites, grads=row.grads, compiled=False)
