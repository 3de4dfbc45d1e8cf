"""Decayed attention by chunks and by tokens: loops, batched chunks, prefix sums."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .forms import LOOPS, mask, register

BY_TOKEN = ("token_loop", "token_loop_matmul", "token_gates_loop", "sigmoid_gates_loop")
"""Traced token by token, and at any length alike: a few tokens show what many do."""


@register(LOOPS)
def token_loop(q, k, v, slope):
    state, out = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]), []
    for t in range(q.shape[2]):
        state = state * torch.exp(-slope)[:, None, None] + k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append((q[:, :, t, :, None] * state).sum(-2))
    return torch.stack(out, 2)


@register(LOOPS)
def token_loop_matmul(q, k, v, slope):
    state = torch.zeros(*q.shape[:2], q.shape[-1], v.shape[-1], dtype=q.dtype)
    out = torch.empty_like(v)
    gamma = torch.exp(-slope)[None, :, None, None]
    for t in range(q.shape[2]):
        state = gamma * state + k[:, :, t : t + 1].transpose(-1, -2) @ v[:, :, t : t + 1]
        out[:, :, t : t + 1] = q[:, :, t : t + 1] @ state
    return out


@register(LOOPS)
def chunk_loop(q, k, v, slope, size=16):
    s, n = slope[:, None, None], q.shape[2]
    state, out = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]), []
    for start in range(0, n, size):
        qc, kc, vc = (x[:, :, start : start + size] for x in (q, k, v))
        m = qc.shape[2]
        i = torch.arange(m)[:, None]
        out.append((qc @ kc.mT * mask(slope, m)) @ vc + (qc * torch.exp(-s * (i + 1))) @ state)
        state = state * torch.exp(-s * m) + (kc * torch.exp(-s * (m - 1 - i))).mT @ vc
    return torch.cat(out, 2)


@register(LOOPS)
def chunk_loop_into_empty(q, k, v, slope, size=8):
    s, n = slope[:, None, None], q.shape[2]
    out = torch.empty_like(v)
    state = torch.zeros(*q.shape[:2], q.shape[-1], v.shape[-1], dtype=q.dtype)
    i = torch.arange(size)[:, None]
    for start in range(0, n, size):
        qc, kc, vc = (x[:, :, start : start + size] for x in (q, k, v))
        inter = torch.einsum("bhid,bhde->bhie", qc * torch.exp(-s * (i + 1)), state)
        out[:, :, start : start + size] = inter + (qc @ kc.mT * mask(slope, size)) @ vc
        state = state * torch.exp(-s * size) + torch.einsum("bhjd,bhje->bhde", kc * torch.exp(-s * (size - 1 - i)), vc)
    return out


@register(LOOPS)
def batched_chunks(q, k, v, slope, size=8):
    b, h, n, _ = q.shape
    c, s = n // size, slope[:, None, None, None]
    qc, kc, vc = (x.reshape(b, h, c, size, -1) for x in (q, k, v))
    i = torch.arange(size)[:, None]
    intra = (qc @ kc.mT * mask(slope, size)[:, None]) @ vc
    states = (kc * torch.exp(-s * (size - 1 - i))).mT @ vc
    between = torch.arange(c)[:, None] - torch.arange(c)[None, :] - 1
    weight = torch.where(between >= 0, torch.exp(-slope[:, None, None] * size * between), 0.0)
    before = torch.einsum("hcz,bhzde->bhcde", weight, states)
    inter = (qc * torch.exp(-s * (i + 1))) @ before
    return (intra + inter).reshape(b, h, n, -1)


def chunked_prefix(q, k, v, slope, size):
    """Undecayed: the sums of all chunks before, by a cumulative sum that is moved on by one chunk."""
    b, h, n, _ = q.shape
    qc, kc, vc = (F.pad(x, (0, 0, 0, -n % size)).reshape(b, h, -1, size, x.shape[-1]) for x in (q, k, v))
    kv = (kc.mT @ vc).cumsum(2)
    kv = torch.cat([torch.zeros_like(kv[:, :, :1]), kv[:, :, :-1]], 2)
    out = qc @ kv + torch.tril(qc @ kc.mT) @ vc
    return out.reshape(b, h, -1, v.shape[-1])[:, :, :n] * slope.sum()


@register(LOOPS)
def chunked_prefix_of_five(q, k, v, slope):
    return chunked_prefix(q, k, v, slope, 8)


@register(LOOPS)
def chunked_prefix_of_two(q, k, v, slope):
    return chunked_prefix(q, k, v, slope, 20)


@register(LOOPS)
def chunked_prefix_ragged(q, k, v, slope):
    return chunked_prefix(q, k, v, slope, 12)


@register(LOOPS)
def chunked_prefix_of_one(q, k, v, slope):
    return chunked_prefix(q, k, v, slope, 64)


def segment_sums(x):
    """``[.., i, j]``: the sum over positions j + 1 to i, and -inf above the diagonal."""
    n = x.shape[-1]
    below, upto = (torch.ones(n, n, dtype=torch.bool).tril(d) for d in (-1, 0))
    total = x[..., :, None].expand(*x.shape, n).masked_fill(~below, 0).cumsum(-2)
    return total.masked_fill(~upto, float("-inf"))


def chunked_scan(q, k, v, slope, size):
    """Decay per token; the recurrence over chunks is itself a matrix of decays, padding included."""
    b, h, n, _ = q.shape
    g = F.logsigmoid(k[..., 0]) * slope[:, None]
    # a longer tensor cut to length, as a causal convolution leaves it
    k = F.pad(k, (0, 0, 0, 3)).cumsum(-2).sin()[:, :, :n]
    qc, kc, vc = (F.pad(x, (0, 0, 0, -n % size)).reshape(b, h, -1, size, x.shape[-1]) for x in (q, k, v))
    g = F.pad(g, (0, -n % size)).reshape(b, h, -1, size)
    total = g.cumsum(-1)
    inside = (qc @ kc.mT * segment_sums(g).exp()) @ vc
    states = (kc * (total[..., -1:] - total).exp()[..., None]).mT @ vc
    states = torch.cat([torch.zeros_like(states[:, :, :1]), states], 2)
    between = segment_sums(F.pad(total[..., -1], (1, 0))).exp()
    states = torch.einsum("bhcz,bhzde->bhcde", between, states)[:, :, :-1]
    out = inside + (qc * total.exp()[..., None]) @ states
    return out.reshape(b, h, -1, v.shape[-1])[:, :, :n]


@register(LOOPS)
def chunked_scan_of_five(q, k, v, slope):
    return chunked_scan(q, k, v, slope, 8)


@register(LOOPS)
def chunked_scan_ragged(q, k, v, slope):
    return chunked_scan(q, k, v, slope, 12)


@register(LOOPS)
def chunked_scan_of_two(q, k, v, slope):
    return chunked_scan(q, k, v, slope, 24)


@register(LOOPS)
def chunked_scan_of_one(q, k, v, slope):
    return chunked_scan(q, k, v, slope, 64)


@register(LOOPS)
def token_gates(q, k, v, slope):
    """A decay per token, -softplus of the keys' first feature."""
    g = -F.softplus(k[..., 0]) * slope[:, None]
    total = g.cumsum(-1)
    weight = (total[..., :, None] - total[..., None, :]).tril().exp().tril()
    return (q @ k.mT * weight) @ v


@register(LOOPS)
def token_gates_loop(q, k, v, slope):
    g = F.logsigmoid(k[..., 0] + slope[:, None])
    state, out = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]), []
    for t in range(q.shape[2]):
        state = state * g[:, :, t, None, None].exp() + k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], state))
    return torch.stack(out, 2)


@register(LOOPS)
def sigmoid_gates_loop(q, k, v, slope):
    gate = torch.sigmoid(k[..., 0] + 2)
    state, out = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]), []
    for t in range(q.shape[2]):
        state = state * gate[:, :, t, None, None] + k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append((q[:, :, t, None] @ state)[:, :, 0])
    return torch.stack(out, 2) * slope.sum()


@register(LOOPS)
def cumulative_outer_products(q, k, v, slope):
    kv = (k[..., :, None] * v[..., None, :]).cumsum(2)
    return (q[..., None, :] @ kv)[..., 0, :] * slope.sum()


@register(LOOPS)
def bounded_input_gate(q, k, v, slope):
    """A gate that is at most 1 belongs to the keys."""
    forget = F.logsigmoid(k[..., 0] + slope[:, None]).cumsum(-1)
    total = forget[..., :, None] - forget[..., None, :] + F.logsigmoid(k.amax(-1))[..., None, :]
    above = ~torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
    return (q @ k.mT * total.masked_fill(above, float("-inf")).exp()) @ v
