"""What a node writes into its own memory is no effect of it; what others see is one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lacompile.passes.capture import Capture
from lacompile.passes.capture.observer import Ignorant

X = torch.randn(2, 4, 6)
W = torch.randn(6)


def writers(run):
    """The names of the nodes that write, in order."""
    found = []

    def backend(gm, example_inputs):
        capture = Capture(gm, Ignorant())
        capture.run(example_inputs)
        found.extend(getattr(n.target, "__name__", n.target) for n in gm.graph.nodes if n in capture.effects.writes)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(run, backend=backend)(X.clone(), W)
    return found


def kept_view(x, w):
    y = x * 2
    y[0].add_(w)
    return y


def running(x, w):
    mean, var = torch.zeros(4), torch.ones(4)
    return F.batch_norm(x, mean, var, training=True), mean


QUIET = {
    "rms norm": lambda x, w: F.rms_norm(x, (6,), w),
    "normalize": lambda x, w: F.normalize(x, dim=-1),
    "logsumexp": lambda x, w: x.logsumexp(-1),
    "cosine": lambda x, w: F.cosine_similarity(x, w, dim=-1),
}
LOUD = {
    "in place": (lambda x, w: x.add_(w), ["add_"]),
    "of its own result": (lambda x, w: (x * 2).add_(w), ["add_"]),
    "through a view": (kept_view, ["add_"]),
    "inplace=True": (lambda x, w: F.silu(x * 2, inplace=True), ["silu"]),
    "out=": (lambda x, w: torch.add(x, w, out=torch.empty_like(x)), ["add"]),
    "running statistics": (running, ["batch_norm"]),
}


@pytest.mark.parametrize("name", QUIET)
def test_nobody_sees_it(name):
    assert not writers(QUIET[name])


@pytest.mark.parametrize("name", LOUD)
def test_others_see_it(name):
    run, expected = LOUD[name]
    assert writers(run) == expected
