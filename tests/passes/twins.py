"""Near twins: each differs from a decayed attention in one thing, and must be left alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .forms import TWINS, distance, mask, powers, register


@register(TWINS, "causal-range")
def two_tokens_left_out(q, k, v, slope):
    d = distance(q.shape[2])
    return (q @ k.mT * torch.where(d > 1, torch.exp(-slope[:, None, None] * d), 0.0)) @ v


@register(TWINS, "causal-range")
def windowed(q, k, v, slope):
    d = distance(q.shape[2])
    return (q @ k.mT * torch.where((d >= 0) & (d < 8), torch.exp(-slope[:, None, None] * d), 0.0)) @ v


@register(TWINS, "decay")
def quotient_of_other_powers(q, k, v, slope):
    n = q.shape[2]
    return ((q * powers(slope, n)) @ (k / powers(2 * slope, n)).mT).tril() @ v


@register(TWINS, "decay")
def quotient_of_the_powers_of_another_head(q, k, v, slope):
    p = powers(slope, q.shape[2])
    return ((q * p) @ (k / p.flip(0)).mT).tril() @ v


@register(TWINS, None)
def quotient_of_powers_and_a_constant(q, k, v, slope):
    p = powers(slope, q.shape[2])
    return (q @ k.mT * (p / (p.mT + 1e-3)).tril()) @ v


@register(TWINS, None)
def quadratic_distance(q, k, v, slope):
    d = distance(q.shape[2])
    return (q @ k.mT * torch.where(d >= 0, torch.exp(-slope[:, None, None] * d * d), 0.0)) @ v


@register(TWINS, "separable")
def softmax(q, k, v, slope):
    return torch.softmax((q @ k.mT).masked_fill(distance(q.shape[2]) < 0, float("-inf")), -1) @ v * slope.sum()


@register(TWINS, "separable")
def alibi(q, k, v, slope):
    d = distance(q.shape[2])
    bias = (-slope[:, None, None] * d).masked_fill(d < 0, float("-inf"))
    return torch.softmax(q @ k.mT + bias, -1) @ v


@register(TWINS, "separable")
def opaque_weights(q, k, v, slope):
    n = q.shape[2]
    weight = torch.sin(torch.arange(n * n, dtype=torch.float32).reshape(n, n)).cumsum(0).softmax(0)
    return torch.tril(q @ k.mT * weight) @ v * slope.sum()


@register(TWINS, None)
def growing_decay(q, k, v, slope):
    n = q.shape[2]
    rate = slope[:, None, None] * torch.arange(n)[None, :, None]
    d = distance(n)
    return (q @ k.mT * torch.where(d >= 0, torch.exp(-rate * d), 0.0)) @ v


@register(TWINS, None)
def full_square(q, k, v, slope):
    return (q @ k.mT * torch.exp(-slope[:, None, None])) @ v


@register(TWINS, "single-term")
def wrong_block_decay(q, k, v, slope, size=8):
    s, n = slope[:, None, None], q.shape[2]
    state, out = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]), []
    for start in range(0, n, size):
        qc, kc, vc = (x[:, :, start : start + size] for x in (q, k, v))
        i = torch.arange(size)[:, None]
        out.append((qc @ kc.mT * mask(slope, size)) @ vc + (qc * torch.exp(-s * (i + 1))) @ state)
        state = state * torch.exp(-s * (size - 1)) + (kc * torch.exp(-s * (size - 1 - i))).mT @ vc
    return torch.cat(out, 2)


@register(TWINS, None)
def state_before_two_updates(q, k, v, slope):
    state = before = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    out = []
    for t in range(q.shape[2]):
        out.append((q[:, :, t, :, None] * before).sum(-2))
        before = state
        state = state * torch.exp(-slope)[:, None, None] + k[:, :, t, :, None] * v[:, :, t, None, :]
    return torch.stack(out, 2)


@register(TWINS, None)
def earlier_chunks_only(q, k, v, slope):
    b, h, n, _ = q.shape
    qc, kc, vc = (x.reshape(b, h, 2, n // 2, -1) for x in (q, k, v))
    kv = (kc.mT @ vc).cumsum(2)
    kv = torch.cat([torch.zeros_like(kv[:, :, :1]), kv[:, :, :-1]], 2)
    return (qc @ kv).reshape(b, h, n, -1) * slope.sum()


@register(TWINS, None)
def chunk_before_counted_twice(q, k, v, slope):
    b, h, n, _ = q.shape
    qc, kc, vc = (x.reshape(b, h, 2, n // 2, -1) for x in (q, k, v))
    kv = (kc.mT @ vc).cumsum(2)
    kv = torch.cat([torch.zeros_like(kv[:, :, :1]), kv[:, :, :-1]], 2)
    return (2 * (qc @ kv) + torch.tril(qc @ kc.mT) @ vc).reshape(b, h, n, -1) * slope.sum()


@register(TWINS, None)
def chunks_that_overlap(q, k, v, slope):
    b, h, n, _ = q.shape
    qc, kc, vc = (x.reshape(b, h, 2, n // 2, -1) for x in (q, k, v))
    kv = (kc.mT @ vc).cumsum(2)
    return (qc @ kv + torch.tril(qc @ kc.mT) @ vc).reshape(b, h, n, -1) * slope.sum()


@register(TWINS, None)
def chunks_that_leave_a_token_out(q, k, v, slope):
    b, h, n, _ = q.shape
    qc, kc, vc = (x.reshape(b, h, 2, n // 2, -1) for x in (q, k, v))
    kv = (kc[..., :-1, :].mT @ vc[..., :-1, :]).cumsum(2)
    kv = torch.cat([torch.zeros_like(kv[:, :, :1]), kv[:, :, :-1]], 2)
    return (qc @ kv + torch.tril(qc @ kc.mT) @ vc).reshape(b, h, n, -1) * slope.sum()


@register(TWINS, "decay")
def decay_per_channel(q, k, v, slope):
    state, out = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]), []
    gamma = torch.sigmoid(k * slope[:, None, None])
    for t in range(q.shape[2]):
        state = state * gamma[:, :, t, :, None] + k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append((q[:, :, t, :, None] * state).sum(-2))
    return torch.stack(out, 2)


@register(TWINS, None)
def cross_lengths(q, k, v, slope):
    k, v = k[:, :, :-4], v[:, :, :-4]
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None, :]
    return (q @ k.mT * torch.where(i >= j, torch.exp(-slope[:, None, None] * (i - j)), 0.0)) @ v


@register(TWINS, "bounded-weights")
def stabilised_input_gate(q, k, v, slope):
    """An exponential gate under a row maximum is the same sum, but its own exponential may overflow."""
    forget = F.logsigmoid(k[..., 0] + slope[:, None]).cumsum(-1)
    total = forget[..., :, None] - forget[..., None, :] + 100 * k.amax(-1)[..., None, :]
    total = total.masked_fill(distance(q.shape[2]) < 0, float("-inf"))
    weight = (total - total.amax(-1, keepdim=True)).exp()
    return (q @ k.mT * weight) @ v


@register(TWINS, None)
def looked_up_from_the_end(q, k, v, slope):
    n = q.shape[2]
    table = torch.exp(-slope[:, None] * torch.arange(n))
    return (q @ k.mT * table[:, distance(n)]) @ v


@register(TWINS, None)
def listed_mask_with_another_entry(q, k, v, slope):
    n = q.shape[2]
    weight = [[0.9 ** (i - j) if i >= j else 0.0 for j in range(n)] for i in range(n)]
    weight[7][2] *= 1.001
    return (q @ k.mT * torch.tensor(weight)) @ v * slope.sum()


@register(TWINS, None)
def looked_up_squares(q, k, v, slope):
    n = q.shape[2]
    table = torch.exp(-slope[:, None] * torch.arange(n) ** 2)
    return (q @ k.mT * table[:, distance(n).clamp(min=0)].tril()) @ v


@register(TWINS, None)
def looked_up_in_a_changed_table(q, k, v, slope):
    n = q.shape[2]
    table = torch.tensor([0.9, 0.8, 0.7])[:, None] ** torch.arange(n)
    table[:, 5] = 0.5
    return (q @ k.mT * table[:, distance(n).clamp(min=0)].tril()) @ v * slope.sum()


@register(TWINS, None)
def looked_up_no_further_than_eight(q, k, v, slope):
    n = q.shape[2]
    table = torch.exp(-slope[:, None] * torch.arange(n))
    return (q @ k.mT * table[:, distance(n).clamp(0, 8)].tril()) @ v


@register(TWINS, None)
def sums_over_later_tokens_and_its_own(q, k, v, slope):
    rate = F.logsigmoid(k[..., 0] + slope[:, None])
    state, out = torch.zeros(q.shape[0], q.shape[1], q.shape[3], v.shape[3]), []
    for start in range(0, q.shape[2], 8):
        qc, kc, vc, rc = (x[:, :, start : start + 8] for x in (q, k, v, rate))
        upto = rc.cumsum(-1)
        mask = (upto[..., :, None] - upto[..., None, :]).exp().tril()
        out.append((qc @ kc.mT * mask) @ vc + (qc * upto.exp()[..., None]) @ state)
        later = rc.flip(-1).cumsum(-1).flip(-1)
        state = state * rc.sum(-1).exp()[..., None, None] + (kc * later.exp()[..., None]).mT @ vc
    return torch.cat(out, 2)
