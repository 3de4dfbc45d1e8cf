"""Parts of longer tensors: tokens from an offset on, and outputs of which several parts are read."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lacompile.testing import assert_refused, assert_rewritten

from .drawn import qkv

B, H, N, D = 2, 3, 14, 4
FIRST = 5


def arguments(e=None):
    return [*qkv(B, H, N, D, e), torch.randn(B, H, N, requires_grad=True)]


def weighted(q, k, v, sums):
    return (q @ k.mT * (sums[..., :, None] - sums[..., None, :]).exp().tril()) @ v


def later(*tensors):
    return (t[:, :, FIRST:] for t in tensors)


OFFSETS = {
    "undecayed": lambda q, k, v, x: (q @ k.mT).tril() @ v,
    "gates": lambda q, k, v, x: weighted(q, k, v, F.logsigmoid(x).cumsum(-1)),
}


@pytest.mark.parametrize("decay", OFFSETS)
def test_tokens_from_an_offset_on(decay):
    """As behind a token of another kind: positions are counted from the first that is there."""

    def run(*args):
        return OFFSETS[decay](*later(*args))

    assert_rewritten(run, *arguments(), compiled=False)


def test_sums_of_gates_before_the_offset():
    def run(q, k, v, x):
        sums = F.logsigmoid(x).cumsum(-1)
        return weighted(*later(q, k, v, sums))

    assert_rewritten(run, *arguments(), compiled=False)


@pytest.mark.parametrize("given", [False, True])
def test_a_loop_that_begins_later_and_its_state(given):
    def run(q, k, v, x, s):
        s, out = s if given else torch.zeros_like(s), []
        for t in range(FIRST, N):
            s = torch.sigmoid(x[:, :, t, None, None]) * s + k[:, :, t, :, None] * v[:, :, t, None]
            out.append((q[:, :, t, :, None] * s).sum(-2))
        return torch.stack(out, 2), s

    state = torch.randn(B, H, D, D, requires_grad=True)
    report = assert_rewritten(run, *arguments(), state, compiled=False)
    assert report.rewrites[0].final_state
    assert report.rewrites[0].initial_state is given


def test_offsets_that_differ():
    """Queries of one place and keys of another are an attention all the same; keys that begin later are none."""

    def run(q, k, v, x):
        return (q[:, :, 5:] @ k[:, :, 3:-2].mT).tril() @ v[:, :, 2:-3]

    assert_rewritten(run, *arguments(), compiled=False, grads=False)

    def other(q, k, v, x):
        return ((q @ k.mT).tril()[..., FIRST:]) @ v[:, :, FIRST:]

    assert_refused(other, *arguments())


def features(x):
    return F.elu(x) + 1


PARTS = {
    "a column of ones": lambda o: o[..., :-1] / (o[..., -1:] + 1e-6),
    "split": lambda o: torch.divide(*o.split([D, 1], -1)),
    "heads apart": lambda o: o[:, 0] - 0.2 * o[:, 1],
}


@pytest.mark.parametrize("parts", PARTS)
def test_outputs_read_in_parts(parts):
    """One attention, whose result is viewed twice: nothing is written, so nobody can tell that it is a new tensor."""

    def run(q, k, v, x):
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        return PARTS[parts]((features(q) @ features(k).mT).tril() @ v)

    assert_rewritten(run, *arguments(), compiled=False)


def test_parts_of_which_one_is_written():
    def run(q, k, v, x):
        o = (q @ k.mT).tril() @ v
        first = o[..., :2]
        first.mul_(2.0)
        return first + 0, o[..., 2:] * 2

    assert_rewritten(run, *arguments())


def test_parts_that_are_returned_stay_parts_of_one():
    """The caller may write into one and look at the other."""

    def run(q, k, v, x):
        o = (q @ k.mT).tril() @ v
        return o[..., :2], o

    args = [t.detach() for t in arguments()]
    torch._dynamo.reset()
    part, whole = torch.compile(run, backend="lightning")(*args)
    assert part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
