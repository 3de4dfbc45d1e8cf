"""What the backend does around its analysis."""

from __future__ import annotations

import pytest
import torch
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
