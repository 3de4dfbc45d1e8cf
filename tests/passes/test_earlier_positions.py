"""Sums over earlier positions alone, a token's own weight beside them or not, and near twins."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lacompile import explain
from lacompile.testing import assert_refused, assert_rewritten

from .drawn import qkv, slopes
from .forms import B, D, E, H, distance

N = 12


def arguments(n=N):
    return [*qkv(B, H, n, D, E), slopes(), torch.randn(H, D, requires_grad=True)]


def state():
    torch.manual_seed(1)
    return torch.randn(B, H, D, E, requires_grad=True)


def earlier(slope, n, less=0):
    d = distance(n)
    return torch.where(d > 0, torch.exp(-slope[:, None, None] * (d - less)), 0.0)


# --------------------------------------------------------------------------------------------------------- as a square


def mask_alone(q, k, v, slope, bonus, less=0):
    return (q @ k.mT * earlier(slope, q.shape[2], less)) @ v * bonus.sum()


def tril_of_the_scores(q, k, v, slope, bonus):
    decay = torch.exp(-slope[:, None, None] * distance(q.shape[2]))
    return (q @ k.mT * decay).tril(-1) @ v + (q * bonus[:, None] * k).sum(-1, keepdim=True) * v


def own_weight_in_the_mask(q, k, v, slope, bonus):
    own = bonus[:, :1, None] * torch.eye(q.shape[2])
    return (q @ k.mT * (earlier(slope, q.shape[2], 1) + own)) @ v


def three_cases(q, k, v, slope, bonus):
    d = distance(q.shape[2])
    weight = torch.where(d > 0, torch.exp(-slope[:, None, None] * (d - 1)), torch.where(d == 0, bonus[:, :1, None], 0))
    return (q @ k.mT * weight) @ v


def gate_read_before_its_own(q, k, v, slope, bonus):
    gate = F.logsigmoid(k[..., 0] + slope[:, None])
    upto = gate.cumsum(-1)
    exponent = (upto - gate)[..., :, None] - upto[..., None, :]
    return (q @ k.mT * exponent.masked_fill(distance(q.shape[2]) <= 0, float("-inf")).exp()) @ v * bonus.sum()


def gate_read_after_its_own(q, k, v, slope, bonus):
    upto = F.logsigmoid(k[..., 0] + slope[:, None]).cumsum(-1)
    return (q @ k.mT * (upto[..., :, None] - upto[..., None, :]).exp().tril(-1)) @ v * bonus.sum()


def running_sum_less_its_own(q, k, v, slope, bonus):
    outer = k[..., :, None] * v[..., None, :]
    return torch.einsum("bhnd,bhnde->bhne", q, outer.cumsum(2) - outer) * slope.sum() * bonus.sum()


def toeplitz(row, n, period=0, begin=0):
    """Each row of the mask is the one before, moved by one: a line repeated, and cut into rows that are one shorter."""
    line = F.pad(row, (0, n + period)).tile([n])[:, : n * (2 * n - 1)]
    return line.reshape(-1, n, 2 * n - 1)[:, :, n - 1 - begin : 2 * n - 1 - begin]


def powers(slope, n):
    return torch.exp(-slope)[:, None].repeat(1, n) ** torch.arange(n - 1, -1, -1).repeat(len(slope), 1)


def repeated_line(q, k, v, slope, bonus):
    return (q @ k.mT * toeplitz(powers(slope, q.shape[2]), q.shape[2])) @ v * bonus.sum()


def repeated_line_with_its_own_weight(q, k, v, slope, bonus):
    line = torch.cat([powers(slope, q.shape[2])[:, 1:], bonus[:, :1]], 1)
    return (q @ k.mT * toeplitz(line, q.shape[2])) @ v


def repeated_line_cut_later(q, k, v, slope, bonus):
    weight = F.pad(toeplitz(powers(slope, q.shape[2]), q.shape[2], begin=-1), (0, 1))
    return (q @ k.mT * weight) @ v * bonus.sum()


SQUARES = [
    mask_alone,
    tril_of_the_scores,
    own_weight_in_the_mask,
    three_cases,
    gate_read_before_its_own,
    gate_read_after_its_own,
    running_sum_less_its_own,
    repeated_line,
    repeated_line_with_its_own_weight,
    repeated_line_cut_later,
]


@pytest.mark.parametrize("form", SQUARES)
def test_square(form):
    assert_rewritten(form, *arguments(), count=1, compiled=False)


@pytest.mark.parametrize("form", [mask_alone, tril_of_the_scores, own_weight_in_the_mask])
def test_symbolic_length(form):
    inputs = arguments()
    for x in inputs[:3]:
        torch._dynamo.mark_dynamic(x, 2)
    torch._dynamo.reset()
    report = explain(form)(*inputs)
    assert len(report.rewrites) == 1 and not report.rewrites[0].length.isdigit()


def test_inductor_compiles_them():
    assert_rewritten(tril_of_the_scores, *arguments(), count=1)


# ------------------------------------------------------------------------------------------------ as a loop over tokens


def tokens(read, gate=None, first=None):
    """``read(state, k v, decay, bonus)`` is what the queries are multiplied by; then the state decays."""

    def run(q, k, v, slope, bonus, *given):
        s = given[0] if given else torch.zeros(B, H, D, E)
        out = []
        for t in range(q.shape[2]):
            new = k[:, :, t, :, None] * v[:, :, t, None, :]
            decay = torch.exp(-slope)[:, None, None] if gate is None else gate(k, t)[..., None, None]
            seen = read(s, new, decay, bonus[..., None])
            out.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], seen if t or first is None else first(seen)))
            s = s * decay + new
        return (torch.stack(out, 2) * bonus.sum(), s) if given else torch.stack(out, 2) * bonus.sum()

    return run


READS = {
    "before": lambda s, new, decay, bonus: s,
    "before, decayed": lambda s, new, decay, bonus: s * decay,
    "before, and its own": lambda s, new, decay, bonus: s + new,
    "bonus": lambda s, new, decay, bonus: s + bonus * new,
    "decayed, bonus": lambda s, new, decay, bonus: decay * s + bonus * new,
}


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("gate", [None, lambda k, t: torch.sigmoid(k[:, :, t, 0])], ids=["slope", "gate"])
def test_loop(name, gate):
    assert_rewritten(tokens(READS[name], gate), *arguments(6), count=1, compiled=False)


@pytest.mark.parametrize("name", READS)
def test_keys_and_values_of_one_tensor(name):
    def run(q, kv, slope, bonus):
        return tokens(READS[name])(q, *kv.split([D, E], -1), slope, bonus)

    q, _, _, slope, bonus = arguments(6)
    kv = torch.randn(B, H, 6, D + E, requires_grad=True)
    assert_rewritten(run, q, kv, slope, bonus, count=1, compiled=False)


@pytest.mark.parametrize("name", READS)
def test_loop_with_states(name):
    """The first position reads what came in, and what goes out holds the last token."""
    if name == "before, and its own":
        pytest.skip("test_a_state_that_decays_late")
    report = assert_rewritten(tokens(READS[name]), *arguments(6), state(), count=1, compiled=False)
    assert report.rewrites[0].initial_state and report.rewrites[0].final_state


def test_chunks_with_a_bonus():
    def run(q, k, v, slope, bonus, s, size=4):
        w, i, d = torch.exp(-slope)[:, None, None], torch.arange(size)[:, None], distance(size)
        inner = torch.where(d > 0, w ** (d - 1).clamp(min=0), 0.0) + torch.eye(size) * bonus[:, :1, None]
        out = []
        for qc, kc, vc in zip(*(x.split(size, 2) for x in (q, k, v)), strict=True):
            out.append((qc @ kc.mT * inner) @ vc + (qc @ s) * w**i)
            s = w**size * s + (kc * w ** (size - 1 - i)).mT @ vc
        return torch.cat(out, 2), s

    report = assert_rewritten(run, *arguments(), state(), count=1, compiled=False)
    assert report.rewrites[0].initial_state and report.rewrites[0].final_state


def test_chunks_with_a_repeated_line():
    """RWKV-5 as it is trained: each chunk has its mask and its own weight, and its rows are written into the result."""

    def run(r, k, v, slope, bonus, size=4):
        w = powers(slope, size)
        inner = toeplitz(torch.cat([w[:, 1:], bonus[:, :1]], 1), size)
        s, out = torch.zeros(B, H, D, E), torch.zeros(B, H, N, E)
        for c in (slice(n, n + size) for n in range(0, N, size)):
            out[:, :, c] = (r[:, :, c] @ k[:, :, c].mT * inner) @ v[:, :, c] + (r[:, :, c] @ s) * w[..., None].flip(1)
            s = torch.exp(-slope)[:, None, None] ** size * s + (k[:, :, c].mT * w[:, None]) @ v[:, :, c]
        return out

    assert_rewritten(run, *arguments(), count=1, compiled=False)


# ----------------------------------------------------------------------------------------------------------- near twins


@pytest.mark.parametrize("moved", [{"begin": 1}, {"period": 1}, {"period": 2}], ids=str)
def test_a_line_that_is_repeated_or_cut_elsewhere(moved):
    """Rows that see the next token, or move by another number of places."""

    def run(q, k, v, slope, bonus):
        return (q @ k.mT * toeplitz(powers(slope, N), N, **moved)) @ v * bonus.sum()

    assert_refused(run, *arguments())


def test_the_first_row_of_another_kind():
    """It reads nothing of the sum: a program in which it does is something else."""
    assert_refused(tokens(READS["bonus"], first=lambda s: 2 * s), *arguments(6))


def test_a_bonus_of_the_token_before():
    def run(q, k, v, slope, bonus):
        shifted = torch.cat([k[:, :, :1], k[:, :, :-1]], 2)
        own = (q * bonus[:, None] * shifted)[..., None] * v[..., None, :]
        return (q @ k.mT * earlier(slope, N)) @ v + own.sum(-2)

    assert_rewritten(run, *arguments(), count=1, compiled=False)  # of the sum alone; what is added is the program's own


def test_an_initial_state_that_decays_once_more():
    def run(q, k, v, slope, bonus, s):
        out = []
        for t in range(6):
            out.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], s))
            s = s * torch.exp(-slope)[:, None, None] + k[:, :, t, :, None] * v[:, :, t, None, :]
            s = s * torch.exp(-slope)[:, None, None] if t == 0 else s
        return torch.stack(out, 2) * bonus.sum()

    torch._dynamo.reset()
    assert all(r.length == "1" for r in explain(run)(*arguments(6), state()).rewrites)


def test_a_bonus_of_unknown_sign_is_no_decay():
    """It needs no positive base, as the decay of a state would."""
    report = assert_rewritten(tokens(READS["bonus"]), *arguments(6), count=1, compiled=False)
    assert not report.rewrites[0].assumptions
