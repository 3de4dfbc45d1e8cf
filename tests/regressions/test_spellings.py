"""Spellings that a generator found to be missed, cut down to what mattered; each has a twin that must be refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lacompile.testing import assert_refused, assert_rewritten

B, H, N, D, E = 2, 2, 8, 4, 3
OFF = {"validate": "off"}


def arguments(length: int = N):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, H, length, n, generator=generator).requires_grad_() for n in (D, D, E))
    return q, k, v, torch.tensor([0.9, 0.7])


def distance(n: int = N) -> torch.Tensor:
    i = torch.arange(n)
    return i[:, None] - i[None, :]


def rewritten(f, length: int = N, count: int = 1):
    assert_rewritten(f, *arguments(length), count=count, compiled=False, options=OFF)


def refused(f, length: int = N):
    assert_refused(f, *arguments(length), options=OFF)


# ------------------------------------------------------------------------------------------------------ two chunks only


def two_chunks(q, k, v, gamma, first=0.0, size=4):
    """The state before the second chunk has a constant range, where that of more chunks grows with the chunk."""
    qc, kc, vc = (x.unflatten(2, (-1, size)) for x in (q, k, v))
    inner = (qc @ kc.mT).tril() @ vc
    states = kc.mT @ vc
    before = torch.stack([first * states[:, :, 0], states[:, :, 0]], 2)
    return (inner + qc @ before).flatten(2, 3)


def test_two_chunks():
    rewritten(two_chunks)


def test_two_chunks_of_which_the_first_sees_itself_as_past():
    refused(lambda q, k, v, gamma: two_chunks(q, k, v, gamma, first=1.0))


# --------------------------------------------------------------------------------------------------- writes into a mask


@pytest.mark.parametrize("shift", [0, 2])
def test_a_mask_written_by_a_condition(shift):
    def f(q, k, v, gamma):
        weight = gamma[:, None, None] ** distance()
        weight[..., distance() < shift] = 0
        return (q @ k.mT * weight) @ v

    (refused if shift else rewritten)(f)


@pytest.mark.parametrize("shift", [0, 2])
def test_a_mask_written_row_by_row(shift):
    def f(q, k, v, gamma):
        weight = gamma[:, None, None] ** distance()
        for row in range(N):
            weight[..., row, max(row + 1 - shift, 0) :] = 0
        return (q @ k.mT * weight) @ v

    (refused if shift else rewritten)(f)


def test_a_write_at_positions_is_none_by_a_condition():
    def f(q, k, v, gamma):
        weight = (gamma[:, None, None] ** distance()).tril()
        weight[..., torch.arange(N)] = 0
        return (q @ k.mT * weight) @ v

    refused(f)


# -------------------------------------------------------------------------------------------------------------- padding


@pytest.mark.parametrize("front", [0, 2])
def test_padding_by_concatenation(front):
    def f(q, k, v, gamma):
        zeros = v.new_zeros(B, H, 2, E)
        v = torch.cat([zeros, v] if front else [v, zeros], 2)
        q, k = (F.pad(x, (0, 0, 0, 2)) for x in (q, k))
        return ((q @ k.mT).tril() @ v)[:, :, :N]

    (refused if front else rewritten)(f)


# ----------------------------------------------------------------------------------------------------------- arithmetic


def test_a_difference_that_is_nothing():
    """The last of the chunks holds one token: its key's decay to the end of the chunk is exp(g - g)."""

    def f(q, k, v, gamma):
        g = F.logsigmoid(k[..., 0])
        k = k * torch.exp(g - g)[..., None]
        run = g.cumsum(-1)
        return (q @ k.mT * (run[..., :, None] - run[..., None, :]).tril().exp().tril()) @ v

    rewritten(f)


@pytest.mark.parametrize("length", [9, 10])
def test_a_factor_raised_by_a_number(length):
    """gamma ** 4 between the chunks is four times log(gamma), as gamma ** (i + 1) inside them is i + 1 times."""

    def f(q, k, v, gamma, size=4):
        out, state = [], q.new_zeros(B, H, D, E)
        for start in range(0, length, size):
            qc, kc, vc = (x[:, :, start : start + size] for x in (q, k, v))
            m = qc.shape[2]
            i = torch.arange(m)
            weight = torch.where(distance(m) >= 0, gamma[:, None, None] ** distance(m), 0.0)
            inner = (qc @ kc.mT * weight) @ vc
            out.append(inner + (qc * gamma[:, None, None] ** (i + 1)[:, None]) @ state)
            kd = kc * gamma[:, None, None] ** (m - 1 - i)[:, None]
            state = state * (gamma**m)[:, None, None] + kd.mT @ vc
        return torch.cat(out, 2)

    rewritten(f, length)


@pytest.mark.parametrize("late", [False, True])
def test_a_decay_that_is_a_positive_number_times_minus_one(late):
    """The end of a prefix sum is its later position, whatever the sign of its coefficient."""

    def f(q, k, v, gamma):
        g = -torch.exp(gamma)[:, None] * F.softplus(k[..., 0])
        state, out = q.new_zeros(B, H, D, E), []
        for t in range(N):
            update = k[:, :, t, :, None] * v[:, :, t, None, :]
            state = (state + update if late else state) * g[:, :, t, None, None].exp()
            state = state if late else state + update
            out.append((q[:, :, t, None] @ state)[:, :, 0])
        return torch.stack(out, 2)

    rewritten(f)


@pytest.mark.parametrize("causal", [True, False])
def test_a_weight_multiplied_by_a_matrix_product_over_one(causal):
    def f(q, k, v, gamma):
        weight = gamma[:, None, None] ** distance().abs()
        weight = weight.tril() if causal else weight
        scores = (q @ k.mT).permute(1, 2, 3, 0)[..., None] @ weight[..., None, None]
        return scores[..., 0].permute(3, 0, 1, 2) @ v

    rewritten(f, count=1 if causal else 2)  # one for each direction


# ------------------------------------------------------------------------------------------------- a state that came in


@pytest.mark.parametrize("moved", [False, True])
def test_the_factor_of_a_state_that_came_in(moved):
    """In gate * S + k v the gate is a weight, at the first token too, where S is an input."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(B, H, D, E, generator=generator)

    def f(q, k, v, gamma, start):
        gate, out, state = torch.sigmoid(v[..., 0]), [], start
        for t in range(N):
            factor = gate[:, :, t, None, None]
            factor = torch.tanh(k[:, :, t, :, None]) if moved and not t else factor  # a gate per feature
            state = state * factor + k[:, :, t, :, None] * v[:, :, t, None, :]
            out.append((q[:, :, t, None] @ state)[:, :, 0])
        return torch.stack(out, 2)

    if moved:
        assert_refused(f, *arguments(), start, options=OFF)
    else:
        assert_rewritten(f, *arguments(), start, compiled=False, options=OFF)


def test_shared_heads_of_flattened_outputs():
    """The head of a feature is floor(x / E), and its keys' head floor(floor(x / E) / 2)."""

    def f(q, k, v, gamma):
        q = torch.cat([q, q.flip(1)], 1)
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        state, out = q.new_zeros(B, 2 * H, D, E), []
        for t in range(N):
            state = state + k[:, :, t, :, None] * v[:, :, t, None, :]
            out.append((q[:, :, t, None] @ state)[:, :, 0].flatten(1))
        return torch.stack(out, 1)

    rewritten(f)


# ------------------------------------------------------------------------------------------- chunks, in more spellings


@pytest.mark.parametrize("early", [0, 1])
def test_the_sum_of_earlier_chunks_as_a_running_sum_less_the_chunk_itself(early):
    def f(q, k, v, gamma):
        qc, kc, vc = (x.unflatten(2, (-1, 2)) for x in (q, k, v))
        states = kc.mT @ vc
        before = states.cumsum(2) - (states.roll(1, 2) if early else states)
        return ((qc @ kc.mT).tril() @ vc + qc @ before).flatten(2, 3)

    refused(f) if early else rewritten(f)


def test_twice_the_chunk_itself_is_not_its_past():
    def f(q, k, v, gamma):
        qc, kc, vc = (x.unflatten(2, (-1, 2)) for x in (q, k, v))
        states = kc.mT @ vc
        return ((qc @ kc.mT).tril() @ vc + qc @ (states.cumsum(2) - 2 * states)).flatten(2, 3)

    refused(f)


@pytest.mark.parametrize("twice", [0, 1])
def test_keys_of_fewer_heads_in_a_batched_product(twice):
    """The head of the keys is floor((h N + j) / 2 N), in which the position j decides nothing."""

    def f(q, k, v, gamma):
        k, v = k[:, :1].expand(-1, 2, -1, -1), v.repeat_interleave(2, 1)[:, :2]
        kv = torch.bmm(k.reshape(B * H * N, D, 1), v.reshape(B * H * N, 1, E)).unflatten(0, (B, H, N))
        total = kv.cumsum(2) + kv if twice else kv.cumsum(2)
        return torch.bmm(q.flatten(0, 2)[:, None], total.flatten(0, 2)).view(B, H, N, E)

    rewritten(f)


@pytest.mark.parametrize("past", [0, 1])
def test_the_second_of_two_chunks_in_a_batched_product(past):
    """Of the flattened index 2 c + b, 2 c + b >= 2 says that c >= 1."""

    def f(q, k, v, gamma):
        qc, kc, vc = (x.unflatten(2, (-1, 4)).transpose(0, 2).transpose(1, 2) for x in (q, k, v))  # [c, b, h, r, d]
        states = kc.mT @ vc
        before = torch.cat([past * states[:1], states[:1]])
        inter = torch.bmm(qc.flatten(0, 2), before.flatten(0, 2)).view(2, B, H, 4, E)
        out = (qc @ kc.mT).tril() @ vc + inter
        return out.permute(1, 2, 0, 3, 4).flatten(2, 3)

    refused(f) if past else rewritten(f)


def chunks_of_two(q, k, v, gate, off=0):
    """One decay between the two tokens of a chunk, from a masked running sum."""
    g = F.logsigmoid(gate)
    state, out = q.new_zeros(B, H, D, E), []
    below = torch.ones(2, 2, dtype=torch.bool).tril(-1)
    for start in range(0, N, 2):
        qc, kc, vc = (x[:, :, start : start + 2] for x in (q, k, v))
        gc = g[:, :, start : start + 2]
        run = gc.cumsum(-1)
        segment = gc[..., None].expand(-1, -1, -1, 2).masked_fill(~below, 0).cumsum(-2)
        weight = (segment * 2 if off else segment).exp().clone()
        weight[..., 0, 1] = 0
        out.append((qc @ kc.mT * weight) @ vc + (qc * run.exp()[..., None]) @ state)
        left = (run[..., -1:] - run).exp()
        state = state * run[..., -1, None, None].exp() + (kc * left[..., None]).mT @ vc
    return torch.cat(out, 2)


@pytest.mark.parametrize("off", [0, 1])
def test_a_decay_between_two_tokens(off):
    q, k, v, _ = arguments()
    gate = torch.randn(B, H, N, generator=torch.Generator().manual_seed(2)).requires_grad_()
    if off:
        assert_refused(lambda *x: chunks_of_two(*x, off=1), q, k, v, gate, options=OFF)
    else:
        assert_rewritten(chunks_of_two, q, k, v, gate, compiled=False, options=OFF)


@pytest.mark.parametrize("power", [2, 3])
def test_rates_of_known_numbers_that_are_proportional(power):
    """log(gamma^2) is 2 log(gamma), for numbers as for tensors."""

    def f(q, k, v, gamma):
        gamma = torch.tensor([0.875, 0.5])
        block = gamma**power
        i = torch.arange(2)
        weight = torch.tril(gamma[:, None, None] ** distance(2))
        state, out = q.new_zeros(B, H, D, E), []
        for start in range(0, N, 2):
            qc, kc, vc = (x[:, :, start : start + 2] for x in (q, k, v))
            grown, left = gamma[:, None] ** (i + 1), gamma[:, None] ** (1 - i)
            out.append((qc @ kc.mT * weight) @ vc + (qc * grown[..., None]) @ state)
            state = state * block[:, None, None] + (kc * left[..., None]).mT @ vc
        return torch.cat(out, 2)

    rewritten(f) if power == 2 else refused(f)


@pytest.mark.parametrize("other", [0, 1])
def test_a_state_of_heads_that_came_in_beside_keys_of_one_head(other):
    start = torch.randn(B, H, D, E, generator=torch.Generator().manual_seed(1))

    def f(q, k, v, gamma, start):
        state, out = start, []
        for t in range(N):
            decay = gamma.flip(0) if other and not t else gamma
            state = state * decay[:, None, None] + k[:, :1, t, :, None] * v[:, :1, t, None, :]
            out.append((q[:, :, t, None] @ state)[:, :, 0])
        return torch.stack(out, 2)

    # with other rates at first, that is a step of its own
    report = assert_rewritten(f, *arguments(), start, compiled=False, options=OFF)
    assert report.rewrites[0].length == ("1" if other else str(N))


@pytest.mark.parametrize("other", [0, 1])
def test_the_rate_of_one_head_is_no_token(other):
    """In a loop over heads slope[1] is read at a constant place, as a token's decay is in a loop over tokens."""
    slopes = torch.tensor([0.25, 0.5])
    start = torch.randn(B, H, D, E, generator=torch.Generator().manual_seed(1))

    def f(q, k, v, gamma, start):
        outs = []
        for h in range(H):
            state, out = start[:, h], []
            for t in range(5):
                rate = slopes[1 - h] if other and not t else slopes[h]
                state = state * torch.exp(-rate) + k[:, h, t, :, None] * v[:, h, t, None, :]
                out.append((q[:, h, t, None] @ state)[:, 0])
            outs.append(torch.stack(out, 1))
        return torch.stack(outs, 1)

    if other:
        assert_refused(f, *arguments(5), start, options=OFF)
    else:
        assert_rewritten(f, *arguments(5), start, compiled=False, options=OFF)


@pytest.mark.parametrize("other", [0, 1])
def test_heads_apart_of_which_each_is_written_chunk_by_chunk(other):
    """The decays of three heads lie on a line, as their other factors do; the state of one may be too large."""
    heads = 3
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(B, 6, heads * D, generator=generator).requires_grad_() for _ in range(3))
    gate = torch.randn(B, heads, 6, generator=generator).requires_grad_()

    def f(q, k, v, gate):
        gamma, outs = torch.sigmoid(gate), []
        for h in range(heads):
            qh, kh, vh = (x.unflatten(-1, (heads, D))[:, :, h] for x in (q, k, v))
            state, out = q.new_zeros(B, D, D), torch.zeros(B, 6, D)
            for start in range(0, 6, 4):
                qc, kc, vc = (x[:, start : start + 4] for x in (qh, kh, vh))
                run = gamma[:, h, start : start + 4].log().cumsum(-1)
                weight = (run[:, :, None] - run[:, None, :]).exp().tril()
                inter = (qc * run.exp()[..., None]) @ state
                out[:, start : start + 4] = (qc @ kc.mT * weight) @ vc + inter
                left = (run[:, -1:] - run).exp() * (1 + other * (h == 1))
                state = state * run[:, -1].exp()[:, None, None] + (kc * left[..., None]).mT @ vc
            outs.append(out)
        return torch.stack(outs, 1)

    # one attention of three heads, or the two heads that are attentions by themselves
    assert_rewritten(f, q, k, v, gate, count=1 + other, compiled=False, options=OFF)


def leaves(length, dtype=torch.float32):
    return [torch.randn(1, 2, length, 8, dtype=dtype, requires_grad=True) for _ in range(3)]


class TestPositionsGiven:
    """Whole numbers that come in as a buffer are read by value."""

    @staticmethod
    def attend(q, k, v, i):
        d = i[:, None] - i[None, :]
        return (q @ k.mT * torch.where(d >= 0, 0.9 ** d.clamp(min=0), 0.0)) @ v

    def test_in_a_buffer(self):
        class Layer(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("i", torch.arange(40))

            def forward(self, q, k, v):
                return TestPositionsGiven.attend(q, k, v, self.i)

        assert_rewritten(Layer(), *leaves(40), compiled=False)

    def test_that_stand_still(self):
        i = torch.arange(40) // 2
        assert_refused(lambda q, k, v: self.attend(q, k, v, i), *leaves(40))


@pytest.mark.parametrize("decay", ["given", "a number"])
def test_fp64_stays_fp64(decay):
    """States and log-decays too: in fp32 they would cost half of the digits."""

    def run(q, k, v, state, g):
        out = []
        for t in range(q.shape[2]):
            factor = torch.exp(g)[:, None, None] if decay == "given" else 0.9
            state = state * factor + k[:, :, t, :, None] * v[:, :, t, None, :]
            out.append((q[:, :, t, :, None] * state).sum(-2))
        return torch.stack(out, 2)

    state = torch.randn(1, 2, 8, 8, dtype=torch.float64, requires_grad=True)
    g = torch.tensor([-0.3, -0.1], dtype=torch.float64, requires_grad=decay == "given")
    assert_rewritten(run, *leaves(12, torch.float64), state, g, compiled=False)
