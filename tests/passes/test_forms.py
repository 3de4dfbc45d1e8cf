"""Every spelling is taken, with the values and gradients of an fp64 run; every near twin is left alone."""

from __future__ import annotations

import pytest
import torch

from lacompile.testing import assert_refused, assert_rewritten

from . import loops, twins  # noqa: F401  (they register their programs)
from .forms import LOOPS, PARALLEL, TWINS, B, D, E, H, N


def arguments(n=N):
    torch.manual_seed(0)
    q, k, v = torch.randn(B, H, n, D), torch.randn(B, H, n, D), torch.randn(B, H, n, E)
    slope = torch.tensor([0.02, 0.1, 0.4])
    return [x.requires_grad_() for x in (q, k, v, slope)]


@pytest.mark.parametrize("name", PARALLEL)
def test_parallel(name):
    assert_rewritten(PARALLEL[name], *arguments(), compiled=False)


@pytest.mark.parametrize("name", LOOPS)
def test_loop(name):
    assert_rewritten(LOOPS[name], *arguments(), compiled=False)


@pytest.mark.parametrize("name", TWINS)
def test_twin(name):
    form, obligation = TWINS[name]
    assert_refused(form, *arguments(), obligation=obligation)
