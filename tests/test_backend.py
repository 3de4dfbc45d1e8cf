"""What the backend does around its analysis."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._inductor.async_compile import AsyncCompile
from torch._subclasses.fake_tensor import FakeTensorMode

from lacompile.backend import lightning


@pytest.mark.parametrize(("device", "times"), [("cpu", 0), ("cuda", 1)])
def test_workers_of_inductor_start_before_the_analysis(device, times, monkeypatch):
    awake = []
    monkeypatch.setattr(AsyncCompile, "wakeup", lambda: awake.append("workers"))
    monkeypatch.setattr("lacompile.backend.decide", lambda *_: awake.append("analysis") or 1 / 0)
    with FakeTensorMode():
        x = torch.empty(1, device=device)
    with pytest.raises(ZeroDivisionError):
        lightning(fx.symbolic_trace(nn.Identity()), [3, x])
    assert awake == [*["workers"] * times, "analysis"]


@pytest.mark.parametrize("function", [F.elu, F.softplus, F.hardsigmoid, F.hardswish, F.relu6, F.logsigmoid])
def test_without_a_compiler(function, monkeypatch):
    """The kernels of eager mode are called with views that only their own strides admit."""
    monkeypatch.setattr("lacompile._compat.cpu_compiler_error", lambda: "there is none")

    def run(x, state, total):
        q = k = v = function(project(x).view(2, 6, 4, 8).transpose(1, 2)) + 1
        states = state.unsqueeze(2) + torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(2)
        sums = total.unsqueeze(2) + k.cumsum(2)
        out = torch.einsum("bhnd,bhnde->bhne", q, states)
        return out / torch.einsum("bhnd,bhnd->bhn", q, sums).unsqueeze(-1), states[:, :, -1], sums[:, :, -1]

    generator, project = torch.Generator().manual_seed(0), nn.Linear(32, 32)
    state, total = torch.rand(2, 4, 8, 8, generator=generator), torch.rand(2, 4, 8, generator=generator) + 9
    x = torch.randn(2, 6, 32, generator=generator)
    torch._dynamo.reset()
    results = []
    for call in (run, torch.compile(run, backend="lightning")):
        y = x.clone().requires_grad_()
        out = call(y, state, total)
        sum(t.square().sum() for t in out).backward()
        results.append((*out, y.grad))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)
