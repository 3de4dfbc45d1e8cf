"""Every spelling is taken, with the values and gradients of an fp64 run; every near twin is left alone."""

from __future__ import annotations

import pytest

from lacompile.testing import assert_refused, assert_rewritten

from . import twins  # noqa: F401  (it registers its programs)
from .drawn import qkv, slopes
from .forms import LOOPS, PARALLEL, TWINS, B, D, E, H, N
from .loops import BY_TOKEN


def arguments(n=N):
    return [*qkv(B, H, n, D, E), slopes()]


@pytest.mark.parametrize("name", PARALLEL)
def test_parallel(name):
    assert_rewritten(PARALLEL[name], *arguments(), compiled=False)


@pytest.mark.parametrize("name", LOOPS)
def test_loop(name):
    assert_rewritten(LOOPS[name], *arguments(7 if name in BY_TOKEN else N), compiled=False)


@pytest.mark.parametrize("name", TWINS)
def test_twin(name):
    form, obligation = TWINS[name]
    assert_refused(form, *arguments(), obligation=obligation)
