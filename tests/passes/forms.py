"""Decayed attention in many spellings. Each is a function of (q, k, v, decay); what they share is the mathematics."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

B, H, N, D, E = 2, 3, 40, 8, 6

Form = Callable[..., torch.Tensor]
PARALLEL: dict[str, Form] = {}
LOOPS: dict[str, Form] = {}
TWINS: dict[str, tuple[Form, str]] = {}


def register(into: dict[str, Any], *extra: Any) -> Callable[[Form], Form]:
    def add(f: Form) -> Form:
        into[f.__name__] = (f, *extra) if extra else f
        return f

    return add


def distance(n: int) -> torch.Tensor:
    i = torch.arange(n)
    return i[:, None] - i[None, :]


def mask(slope: torch.Tensor, n: int) -> torch.Tensor:
    d = distance(n)
    return torch.where(d >= 0, torch.exp(-slope[:, None, None] * d), 0.0)


# ------------------------------------------------------------------------------------------------- parallel: the mask


@register(PARALLEL)
def where_exp(q, k, v, slope):
    return (q @ k.transpose(-1, -2) * mask(slope, q.shape[2])) @ v


@register(PARALLEL)
def exp_tril(q, k, v, slope):
    return (q @ k.mT * torch.exp(-slope[:, None, None] * distance(q.shape[2])).tril()) @ v


@register(PARALLEL)
def tril_scores(q, k, v, slope):
    return torch.tril(q @ k.mT * torch.exp(-slope[:, None, None] * distance(q.shape[2]).abs())) @ v


@register(PARALLEL)
def masked_fill_then_exp(q, k, v, slope):
    d = distance(q.shape[2])
    return (q @ k.mT * (-slope[:, None, None] * d).masked_fill(d < 0, float("-inf")).exp()) @ v


@register(PARALLEL)
def added_triu(q, k, v, slope):
    n = q.shape[2]
    d = -slope[:, None, None] * distance(n) + torch.full((n, n), float("-inf")).triu(1)
    return (q @ k.mT * d.exp()) @ v


@register(PARALLEL)
def power_clamped(q, k, v, slope):
    d = distance(q.shape[2])
    gamma = torch.exp(-slope)
    return (q @ k.mT * (gamma[:, None, None] ** d.clamp(min=0) * (d >= 0))) @ v


@register(PARALLEL)
def power_relu(q, k, v, slope):
    d = distance(q.shape[2]).float()
    return (q @ k.mT * torch.pow(torch.sigmoid(slope)[:, None, None], F.relu(d)).tril()) @ v


@register(PARALLEL)
def power_float(q, k, v, slope):
    d = distance(q.shape[2])
    return (q @ k.mT * torch.where(d >= 0, 0.9**d, 0.0)) @ v * slope.sum()


@register(PARALLEL)
def cumsum_exponent(q, k, v, slope):
    n = q.shape[2]
    g = (-slope[:, None].expand(-1, n)).cumsum(-1)
    d = g[:, :, None] - g[:, None, :]
    return (q @ k.mT * d.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), float("-inf")).exp()) @ v


@register(PARALLEL)
def separate_exponentials(q, k, v, slope):
    i = torch.arange(q.shape[2], dtype=torch.float32)
    s = slope[:, None, None]
    return torch.tril((q * torch.exp(-s * i[:, None])) @ (k * torch.exp(s * i[:, None])).mT) @ v


@register(PARALLEL)
def infinite_fill(q, k, v, slope):
    n = q.shape[2]
    d = distance(n).float().masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), float("inf"))
    weight = torch.nan_to_num(torch.exp(d * F.logsigmoid(slope.detach())[:, None, None]))
    return (q @ k.mT * weight) @ v * slope.sum()


@register(PARALLEL)
def list_of_decays(q, k, v, slope):
    gamma = torch.tensor([1 - 2.0 ** (-5 - h) for h in range(q.shape[1])])
    return (q @ k.mT * torch.tril(gamma[:, None, None] ** distance(q.shape[2]).clamp(min=0))) @ v * slope.sum()


@register(PARALLEL)
def undecayed(q, k, v, slope):
    return torch.tril(q @ k.mT) @ v * slope.sum()


@register(PARALLEL)
def in_place_mask(q, k, v, slope):
    d = distance(q.shape[2])
    weight = torch.exp(-slope[:, None, None] * d.clamp(min=0))
    scores = q @ k.mT
    scores = scores * weight
    scores.masked_fill_(d < 0, 0.0)
    return scores @ v


@register(PARALLEL)
def log2_weights(q, k, v, slope):
    d = distance(q.shape[2])
    return (q @ k.mT * torch.where(d >= 0, torch.exp2(-slope[:, None, None] * d), 0)) @ v


# ------------------------------------------------------------------------------------------ parallel: the contractions


@register(PARALLEL)
def einsum_two(q, k, v, slope):
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * mask(slope, q.shape[2])
    return torch.einsum("bhij,bhje->bhie", scores, v)


@register(PARALLEL)
def einsum_three(q, k, v, slope):
    return torch.einsum("bhij,hij,bhje->bhie", q @ k.mT, mask(slope, q.shape[2]), v)


@register(PARALLEL)
def einsum_four(q, k, v, slope):
    return torch.einsum("bhid,bhjd,hij,bhje->bhie", q, k, mask(slope, q.shape[2]), v)


@register(PARALLEL)
def batched_matmul(q, k, v, slope):
    b, h, n, d = q.shape
    scores = torch.bmm(q.reshape(b * h, n, d), k.reshape(b * h, n, d).transpose(1, 2))
    weights = mask(slope, n).expand(b, h, n, n).reshape(b * h, n, n)
    return torch.bmm(scores * weights, v.reshape(b * h, n, -1)).view(b, h, n, -1)


@register(PARALLEL)
def multiply_sum(q, k, v, slope):
    scores = (q[:, :, :, None, :] * k[:, :, None, :, :]).sum(-1) * mask(slope, q.shape[2])
    return (scores[..., None] * v[:, :, None]).sum(-2)


@register(PARALLEL)
def tokens_before_heads(q, k, v, slope):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * mask(slope, q.shape[1])
    return torch.einsum("bhij,bjhe->bihe", scores, v)


@register(PARALLEL)
def merged_heads(q, k, v, slope):
    out = (q @ k.mT * mask(slope, q.shape[2])) @ v
    return out.transpose(1, 2).reshape(q.shape[0], q.shape[2], -1)


# -------------------------------------------------------------------------------------------------- parallel: the scale


@register(PARALLEL)
def scale_on_q(q, k, v, slope):
    return ((q * D**-0.5) @ k.mT * mask(slope, q.shape[2])) @ v


@register(PARALLEL)
def scale_on_scores(q, k, v, slope):
    return (q @ k.mT / math.sqrt(D) * mask(slope, q.shape[2])) @ v


@register(PARALLEL)
def scale_on_output(q, k, v, slope):
    return ((q @ k.mT * mask(slope, q.shape[2])) @ v) * 0.25


@register(PARALLEL)
def scale_learned(q, k, v, slope):
    return ((q @ k.mT * mask(slope, q.shape[2])) @ v) * slope[:, None, None]


# -------------------------------------------------------------------------------------------------- parallel: the decay


@register(PARALLEL)
def decay_by_exp_of_exp(q, k, v, slope):
    rate = -torch.exp(slope)[:, None, None]
    d = distance(q.shape[2])
    return (q @ k.mT * torch.where(d >= 0, torch.exp(rate * d), 0.0)) @ v


@register(PARALLEL)
def decay_as_factor(q, k, v, slope):
    d = distance(q.shape[2])
    return (q @ k.mT * torch.where(d >= 0, slope[:, None, None] ** d.clamp(min=0), 0.0)) @ v


@register(PARALLEL)
def feature_map(q, k, v, slope):
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return (q @ k.mT * mask(slope, q.shape[2])) @ v


@register(PARALLEL)
def with_residual(q, k, v, slope):
    return (q @ k.mT * mask(slope, q.shape[2])) @ v + 0.5 * v


@register(PARALLEL)
def gated(q, k, v, slope):
    return ((q @ k.mT * mask(slope, q.shape[2])) @ v) * torch.sigmoid(v)


# ---------------------------------------------------------------------------------------------------------------- loops


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


# ---------------------------------------------------------------------------------------------------------------- twins


@register(TWINS, "causal-range")
def strictly_lower(q, k, v, slope):
    d = distance(q.shape[2])
    return (q @ k.mT * torch.where(d > 0, torch.exp(-slope[:, None, None] * d), 0.0)) @ v


@register(TWINS, None)
def absolute_distance(q, k, v, slope):
    return (q @ k.mT * torch.exp(-slope[:, None, None] * distance(q.shape[2]).abs())) @ v


@register(TWINS, "causal-range")
def windowed(q, k, v, slope):
    d = distance(q.shape[2])
    return (q @ k.mT * torch.where((d >= 0) & (d < 8), torch.exp(-slope[:, None, None] * d), 0.0)) @ v


@register(TWINS, "unit-diagonal")
def off_by_one(q, k, v, slope):
    d = distance(q.shape[2])
    return (q @ k.mT * torch.where(d >= 0, torch.exp(-slope[:, None, None] * (d + 1)), 0.0)) @ v


@register(TWINS, "causal-range")
def anti_causal(q, k, v, slope):
    d = distance(q.shape[2])
    return (q @ k.mT * torch.where(d <= 0, torch.exp(slope[:, None, None] * d), 0.0)) @ v


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
def state_before_update(q, k, v, slope):
    state, out = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]), []
    for t in range(q.shape[2]):
        out.append((q[:, :, t, :, None] * state).sum(-2))
        state = state * torch.exp(-slope)[:, None, None] + k[:, :, t, :, None] * v[:, :, t, None, :]
    return torch.stack(out, 2)


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
