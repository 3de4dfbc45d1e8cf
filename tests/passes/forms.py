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
def a_step_more(q, k, v, slope):
    d = distance(q.shape[2])
    return (q @ k.mT * torch.where(d >= 0, torch.exp(-slope[:, None, None] * (d + 1)), 0.0)) @ v


@register(PARALLEL)
def tril_scores(q, k, v, slope):
    return torch.tril(q @ k.mT * torch.exp(-slope[:, None, None] * distance(q.shape[2]).abs())) @ v


@register(PARALLEL)
def looked_up_mask(q, k, v, slope):
    n = q.shape[2]
    table = torch.exp(-slope[:, None] * torch.arange(n))
    return (q @ k.mT * table[:, distance(n).clamp(min=0)].tril()) @ v


@register(PARALLEL)
def looked_up_by_head_and_distance(q, k, v, slope):
    n = q.shape[2]
    table = torch.exp(-slope) ** torch.arange(n)[:, None]
    heads = torch.arange(slope.shape[0])[:, None, None]
    return (q @ k.mT * table[distance(n).clamp(min=0), heads] * (distance(n) >= 0)) @ v


@register(PARALLEL)
def looked_up_bias(q, k, v, slope):
    n = q.shape[2]
    table = -slope[:, None] * torch.arange(1 - n, n)
    bias = table.index_select(1, (distance(n) + n - 1).flatten()).view(-1, n, n)
    return (q @ k.mT * bias.masked_fill(distance(n) < 0, float("-inf")).exp()) @ v


@register(PARALLEL)
def gathered_mask(q, k, v, slope):
    n, heads = q.shape[2], slope.shape[0]
    table = torch.exp(-slope[:, None] * torch.arange(n))
    at = distance(n).clamp(min=0).reshape(1, -1).expand(heads, -1)
    return (q @ k.mT * table.gather(1, at).view(heads, n, n).tril()) @ v


@register(PARALLEL)
def gathered_from_the_first_head(q, k, v, slope):
    n = q.shape[2]
    table = torch.exp(-slope[:, None] * torch.arange(n))
    at = distance(n).clamp(min=0).reshape(1, -1)
    return (q @ k.mT * table.gather(1, at).view(1, n, n).tril()) @ v


@register(PARALLEL)
def embedded_mask(q, k, v, slope):
    n = q.shape[2]
    table = torch.exp(-torch.arange(n)[:, None] * slope)
    return (q @ k.mT * F.embedding(distance(n).relu(), table).permute(2, 0, 1).tril()) @ v


@register(PARALLEL)
def sums_over_later_tokens(q, k, v, slope):
    rate = F.logsigmoid(k[..., 0] + slope[:, None])
    later = rate.flip(-1).cumsum(-1).flip(-1) - rate
    exponent = later[..., None, :] - later[..., :, None]
    return (q @ k.mT * exponent.masked_fill(distance(q.shape[2]) < 0, float("-inf")).exp()) @ v


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


def powers(slope, n):
    """Of a decay of each head, for rows."""
    return (torch.exp(-slope)[:, None] ** torch.arange(n, dtype=slope.dtype))[..., None]


@register(PARALLEL)
def quotient_of_powers(q, k, v, slope):
    p = powers(slope, q.shape[2])
    return ((q * p) @ (k / p).mT).tril() @ v


@register(PARALLEL)
def quotient_of_powers_in_the_mask(q, k, v, slope):
    p = powers(slope, q.shape[2])
    return (q @ k.mT * (p / p.mT).tril()) @ v


@register(PARALLEL)
def quotient_of_powers_in_a_running_sum(q, k, v, slope):
    p = powers(slope, q.shape[2])[..., None]
    return torch.einsum("bhnd,bhnde->bhne", q, (k[..., :, None] * v[..., None, :] / p).cumsum(2) * p)


@register(PARALLEL)
def quotient_of_powers_and_data(q, k, v, slope):
    p = powers(slope, q.shape[2]) * F.softplus(v[..., :1])
    return ((q * p) @ (k * p.reciprocal()).mT).tril() @ v / p


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
def listed_mask(q, k, v, slope):
    n = q.shape[2]
    weight = torch.tensor([[0.9 ** (i - j) if i >= j else 0.0 for j in range(n)] for i in range(n)])
    return (q @ k.mT * weight) @ v * slope.sum()


@register(PARALLEL)
def listed_ones(q, k, v, slope):
    n = q.shape[2]
    weight = torch.tensor([[1.0 if i >= j else 0.0 for j in range(n)] for i in range(n)])
    return (q @ k.mT * weight) @ v * slope.sum()


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
