"""What stands around the attention in a layer: projections, norms and fused tensors, with or without a bias."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lacompile.testing import assert_refused, assert_rewritten

from .drawn import qkv

B, H, N, D = 2, 3, 16, 4
RATES = torch.tensor([0.9, 0.8, 0.7])


def weight(rows, columns):
    return (torch.randn(rows, columns) / columns**0.5).requires_grad_()


def heads(x):
    return x.unflatten(-1, (-1, D)).transpose(1, 2)


def merged(o):
    return o.transpose(1, 2).flatten(2)


def retention(q, k, v):
    distance = torch.arange(N)[:, None] - torch.arange(N)
    return (q @ k.mT * (RATES[:, None, None] ** distance).tril()) @ v


def chunks(q, k, v, size=4):
    """A loop over chunks whose values are weighted before they are added to the state."""
    place = torch.arange(size)
    inside = (0.9 ** (place[:, None] - place).float()).tril()
    state, out = q.new_zeros(B, H, D, D), []
    for a in range(0, N, size):
        x, y, z = (t[:, :, a : a + size] for t in (q, k, v))
        read = (x @ state) * 0.9 ** (place[:, None] + 1.0)
        out.append(read + (x @ y.mT * inside) @ z)
        state = 0.9**size * state + y.mT @ (z * 0.9 ** (size - 1.0 - place[:, None]))
    return torch.cat(out, 2)


def test_values_by_a_projection_without_a_bias():
    """Beside a weight of its rows a projection is the tensor that it is; looked into, its two factors do not merge."""

    def run(q, k, x, w):
        return chunks(q, k, heads(F.linear(x, w)))

    q, k, _ = qkv(B, H, N, D)
    assert_rewritten(run, q, k, torch.randn(B, N, H * D), weight(H * D, H * D), compiled=False)


OUTPUTS = {
    "linear": lambda o, w: F.linear(merged(o), w),
    "matmul": lambda o, w: merged(o) @ w,
    "einsum": lambda o, w: torch.einsum("bhnd,hde->bne", o, w.unflatten(0, (H, D))),
    "mean": lambda o, w: o.mean(1),
    "sum": lambda o, w: o.sum(1),
}


@pytest.mark.parametrize("output", OUTPUTS)
def test_heads_of_their_own_decay_are_projected_together(output):
    """A sum over heads holds every head's rate; what it sums is the attention."""

    def run(q, k, v, w):
        return OUTPUTS[output](retention(q, k, v), w)

    assert_rewritten(run, *qkv(B, H, N, D), weight(H * D, H * D), compiled=False)


@pytest.mark.parametrize("take", ["split", "slices"])
def test_one_projection_whose_width_is_no_multiple_of_a_head(take):
    """q, k, v and a gate for each head in one tensor: each is narrowed before it is split into heads."""

    def run(x, w):
        p = F.linear(x, w)
        if take == "split":
            q, k, v, gate = p.split([H * D, H * D, H * D, H], -1)
        else:
            q, k, v, gate = (p[..., n * H * D : (n + 1) * H * D] for n in range(4))
        decay = F.logsigmoid(gate.transpose(1, 2)).cumsum(-1)
        return (heads(q) @ heads(k).mT * (decay[..., :, None] - decay[..., None, :]).exp().tril()) @ heads(v)

    assert_rewritten(run, torch.randn(B, N, 8), weight(3 * H * D + H, 8), compiled=False)


NORMS = {
    "normalize": lambda x: F.normalize(x, dim=-1),
    "rms_norm": lambda x: F.rms_norm(x, (D,)),
    "layer_norm": lambda x: F.layer_norm(x, (D,)),
    "clamped": lambda x: x / x.norm(dim=-1, keepdim=True).clamp_min(1e-6),
    "centred": lambda x: x - x.mean(-1, keepdim=True),
    "scaled": lambda x: (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True),
}


@pytest.mark.parametrize("norm", NORMS)
def test_queries_and_keys_that_are_normalised(norm):
    """Several operations in one function of PyTorch: what is inside is no value of the graph, the result is one."""

    def run(q, k, v):
        return retention(NORMS[norm](q), NORMS[norm](k), v)

    assert_rewritten(run, *qkv(B, H, N, D), compiled=False)


def biased(x, w, b):
    """PyTorch makes several operations of it where the tokens of ``x`` are not its second last dimension in memory."""
    return heads(F.linear(x.transpose(1, 2), w, b))


@pytest.mark.parametrize("form", [retention, chunks])
@pytest.mark.parametrize("which", ["q", "k", "v", "all"])
def test_projections_with_a_bias_behind_a_convolution(form, which):
    """The product inside is no value of the graph; with its bias it is one."""

    def run(x, q, k, v, w, b):
        y = biased(F.conv1d(F.pad(x, (3, 0)), w[:, None, :4], groups=H * D), w, b)
        return form(*(y if which in (name, "all") else t for name, t in zip("qkv", (q, k, v), strict=True)))

    args = torch.randn(B, H * D, N), *qkv(B, H, N, D), weight(H * D, H * D), weight(1, H * D)[0]
    assert_rewritten(run, *(a.detach().requires_grad_() for a in args), compiled=False)


def test_a_function_of_a_projection_with_a_bias_of_scores():
    def run(q, k, v, w, b):
        return F.linear((q @ k.mT).transpose(1, 2), w, b).transpose(1, 2).relu().tril() @ v

    assert_refused(run, *qkv(B, H, N, D), weight(N, N), weight(1, N)[0])


def test_a_layer_behind_a_norm():
    """A projection of as many features as tokens is no attention of its own that would have to be explained."""

    def run(x, *ws):
        y = F.rms_norm(x, (N,))
        q, k, v = (F.linear(y, w) for w in ws)
        return (q @ k.mT).tril() @ v

    report = assert_rewritten(run, torch.randn(B, N, N), *(weight(N, N) for _ in range(3)), compiled=False)
    assert not report.near_misses
