"""How one token updates the state: moving averages, states that are kept, gates that decay what they add; and twins."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lacompile.testing import assert_refused, assert_rewritten

from .drawn import qkv

B, H, N, D = 1, 2, 6, 4


def arguments():
    return [*qkv(B, H, N, D), torch.randn(B, H, N, requires_grad=True), torch.rand(B, N) < 0.7]


def over_tokens(update):
    """``update(state, outer product, gate, whether the token counts, index)`` makes the next state."""

    def run(q, k, v, x, counts):
        state, out = q.new_zeros(B, H, D, D), []
        for t in range(N):
            new = k[:, :, t, :, None] * v[:, :, t, None]
            state = update(state, new, x[..., None, None], counts[:, None, :, None, None], t)
            out.append((q[:, :, t, :, None] * state).sum(-2))
        return torch.stack(out, 2)

    return run


ORDER = torch.ones(N, N, dtype=torch.bool).tril()


def gate(x, t):
    return torch.sigmoid(x[:, :, t])


UPDATES = {
    "mixed": lambda s, new, x, m, t: (1 - gate(x, t)) * s + gate(x, t) * new,
    "moved": lambda s, new, x, m, t: s + gate(x, t) * (new - s),
    "moved by what is left": lambda s, new, x, m, t: s + (1 - gate(x, t)) * (new - s),
    "moved back by what is left": lambda s, new, x, m, t: s - (1 - gate(x, t)) * (s - new),
    "moved by an exponential": lambda s, new, x, m, t: s + (1 - torch.exp(-x[:, :, t].abs())) * (new - s),
    "moved where it counts": lambda s, new, x, m, t: s + (1 - torch.where(m[:, :, t], gate(x, t), 1.0)) * (new - s),
    "moved by less": lambda s, new, x, m, t: s + (0.9 - 0.5 * gate(x, t)) * (new - s),
    "moved by a number": lambda s, new, x, m, t: s + 0.1 * (new - s),
    "moved back by a number": lambda s, new, x, m, t: s - (s - new) * 0.1,
    "a running mean": lambda s, new, x, m, t: s + (new - s) / (t + 1),
    "a running mean from ones on": lambda s, new, x, m, t: s + (new - s) / (t + 2) if t else new / 2,
    "lerp": lambda s, new, x, m, t: torch.lerp(s, new, gate(x, t)),
    "less a part": lambda s, new, x, m, t: s - 0.1 * s + new,
    "less a part by a gate": lambda s, new, x, m, t: s - 0.5 * gate(x, t) * s + new,
    "added, then decayed": lambda s, new, x, m, t: (s + new) * gate(x, t),
    "decayed by an exponential": lambda s, new, x, m, t: (s + new) * torch.exp(-F.softplus(x[:, :, t])),
    "decayed alike": lambda s, new, x, m, t: s * gate(x, t) + new * gate(x, t),
    "decayed twice": lambda s, new, x, m, t: s * gate(x, t) + new * gate(x, t) ** 2,
    "decayed by a bounded gate": lambda s, new, x, m, t: s * gate(x, t).clamp(min=0.1) + new,
    "decayed by the larger": lambda s, new, x, m, t: s * torch.maximum(gate(x, t), x.new_tensor(0.1)) + new,
    "kept": lambda s, new, x, m, t: torch.where(m[:, :, t], 0.9 * s + new, s),
    "kept by a gate": lambda s, new, x, m, t: torch.where(m[:, :, t], gate(x, t) * s + new, s),
    "kept by an exponential": lambda s, new, x, m, t: torch.where(
        m[:, :, t], torch.exp(-x[:, :, t].abs()) * s + new, s
    ),
    "kept by a softplus": lambda s, new, x, m, t: torch.where(
        m[:, :, t], s, 0.9 * torch.exp(-F.softplus(x[:, :, t])) * s + new
    ),
    "kept by an exponential and numbers": lambda s, new, x, m, t: (
        m[:, :, t].to(s) * (torch.exp(-x[:, :, t].abs()) * s + new) + (1 - m[:, :, t].to(s)) * s
    ),
    "kept by numbers": lambda s, new, x, m, t: m[:, :, t].to(s) * (0.9 * s + new) + (1 - m[:, :, t].to(s)) * s,
    "kept where not": lambda s, new, x, m, t: torch.where(~m[:, :, t], s, 0.9 * s + new),
    "begun anew": lambda s, new, x, m, t: torch.where(m[:, :, t], s, torch.zeros_like(s)) * 0.9 + new,
    "filled": lambda s, new, x, m, t: s.masked_fill(~m[:, :, t], 0.0) * 0.9 + new,
    "a decay where it counts": lambda s, new, x, m, t: s * torch.where(m[:, :, t], gate(x, t), 1.0) + new,
}


@pytest.mark.parametrize("name", UPDATES)
def test_updates(name):
    assert_rewritten(over_tokens(UPDATES[name]), *arguments(), compiled=False)


OTHERS = {
    "moved by feature": lambda s, new, x, m, t: s + torch.sigmoid(s) * (new - s),
    "a gate of unknown sign": lambda s, new, x, m, t: s - x[:, :, t] * s + new,
    "moved further than to the new": lambda s, new, x, m, t: s + (1 + gate(x, t)) * (new - s),
    "moved by more than is left": lambda s, new, x, m, t: s + (1.5 - gate(x, t)) * (new - s),
    "moved away from the new by a number": lambda s, new, x, m, t: s - 0.1 * (new - s),
    "moved further by a number": lambda s, new, x, m, t: s + 1.5 * (new - s),
    "moved away": lambda s, new, x, m, t: s - (1 - x[:, :, t].tanh()) * (s - new),
    "a bound that is not positive": lambda s, new, x, m, t: s * x[:, :, t].clamp(min=-0.1) + new,
    "kept and negated": lambda s, new, x, m, t: torch.where(m[:, :, t], 0.9 * s + new, -s),
}


READS = {
    "a gate": lambda x, m, t: gate(x, t),
    "an exponential": lambda x, m, t: torch.exp(-F.softplus(x[:, :, t])),
    "where it counts": lambda x, m, t: torch.where(m[:, None, t], gate(x, t), 1.0),
}


def read_first(decay, *, given=False, final=None):
    """Tokens that read the state before it decays by their own gate."""

    def run(q, k, v, x, counts, *states):
        state, out = states[0] if given else q.new_zeros(B, H, D, D), []
        for t in range(N):
            state = state + k[:, :, t, :, None] * v[:, :, t, None]
            out.append((q[:, :, t, :, None] * state).sum(-2))
            read, state = state, decay(x, counts, t)[..., None, None] * state
        o = torch.stack(out, 2)
        return o if final is None else (o, {"read": read, "decayed": state}[final])

    return run


@pytest.mark.parametrize(
    ("name", "given", "final"),
    [
        ("a gate", False, None),
        ("a gate", True, "read"),
        ("a gate", False, "decayed"),
        ("an exponential", True, None),
        ("an exponential", False, "read"),
        ("an exponential", True, "decayed"),
        ("where it counts", False, None),
        ("where it counts", False, "read"),
        ("where it counts", True, "decayed"),
    ],
)
def test_a_decay_behind_the_read(name, given, final):
    """Any two of them together in one case at least."""
    state = [torch.randn(B, H, D, D, requires_grad=True)] if given else []
    assert_rewritten(read_first(READS[name], given=given, final=final), *arguments(), *state, compiled=False)


def test_prefix_sums_that_leave_the_last_out():
    def run(q, k, v, x):
        g = F.logsigmoid(x)
        before = g.cumsum(-1) - g
        weights = torch.exp((before[..., :, None] - before[..., None, :]).masked_fill(~ORDER, float("-inf")))
        return (q @ k.mT * weights) @ v

    assert_rewritten(run, *arguments()[:4], compiled=False)


def test_a_decay_on_both_sides_of_the_read(without_inductor):
    """What a row decays by before it reads, and what it decays by after that, would be two decays."""

    def run(q, k, v, x):
        g = F.logsigmoid(x)
        before = g.cumsum(-1) - g
        distance = torch.arange(N)[:, None] - torch.arange(N)
        apart = before[..., :, None] - before[..., None, :] - 0.1 * distance
        return (q @ k.mT * torch.exp(apart.masked_fill(~ORDER, float("-inf")))) @ v

    args = arguments()[:4]
    made = torch.compile(run, backend="lightning", options={"validate": "off"})
    torch.testing.assert_close(made(*args), run(*args), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OTHERS)
def test_other_updates(name):
    assert_refused(over_tokens(OTHERS[name]), *arguments())


def of_pairs(off):
    """A square of decays, its exponent off by something of the row or of the key."""

    def run(q, k, v, x, counts):
        g = F.logsigmoid(x)
        sums = g.cumsum(-1)
        return (q @ k.mT * (sums[..., :, None] - sums[..., None, :] + off(g)).exp().tril()) @ v

    return run


@pytest.mark.parametrize("steps", [1, 2, -1])
def test_an_exponent_off_by_the_own_decay_of_the_key(steps):
    assert_rewritten(of_pairs(lambda g: steps * g[..., None, :]), *arguments(), compiled=False)


def test_an_exponent_short_of_the_own_decay_of_the_row():
    """The last decay that the sum has seen is not the row's own: no prefix sum of these rates ends there."""
    assert_refused(of_pairs(lambda g: -g[..., :, None]), *arguments())


@pytest.mark.parametrize("steps", [1, -1, 0.5])
def test_a_decay_of_each_head_off_by_steps(steps):
    def run(q, k, v, x, counts):
        distance = torch.arange(N)[:, None] - torch.arange(N) + steps
        return (q @ k.mT * (-F.softplus(x.mean((0, 2))[:, None, None]) * distance).exp().tril()) @ v

    assert_rewritten(run, *arguments(), compiled=False)


def test_numbers_that_a_loop_writes():
    """PyTorch rounds each to the format of the tensor; the program means the powers of one number."""
    size, gamma = 3, 0.9

    def run(q, k, v, x, counts):
        i = torch.arange(size)
        mask = (gamma ** (i[:, None] - i)).tril()
        state, out = q.new_zeros(B, H, D, D), []
        for a in range(0, N, size):
            row = torch.zeros(size, 1)
            for t in range(size):
                row[t, :] = gamma ** (t + 1)
            x, y, z = (c[:, :, a : a + size] for c in (q, k, v))
            out.append((x @ y.mT * mask) @ z + (x @ state) * row)
            state = state * gamma**size + y.mT @ (z * mask[-1][:, None])
        return torch.cat(out, 2)

    assert_rewritten(run, *arguments(), compiled=False)


UNDERFLOW = {
    "chosen": lambda s, new, x, m, t: s * torch.where(m[:, :, t], gate(x, t), 1.0) + new,
    "kept": lambda s, new, x, m, t: torch.where(m[:, :, t], gate(x, t) * s + new, s),
    "bounded": lambda s, new, x, m, t: s * gate(x, t).clamp(max=0.9) + new,
    "the smaller": lambda s, new, x, m, t: s * torch.minimum(gate(x, t), gate(2 * x, t)) + new,
    "the opposite": lambda s, new, x, m, t: s * (1 - gate(-x, t)) + new,
}


@pytest.mark.parametrize("name", UNDERFLOW)
def test_a_gate_that_is_nothing_at_some_token(name):
    """A sigmoid that has underflowed has no gradient, and leaves none that is not finite."""
    q, k, v, x, counts = arguments()
    x, counts = x.detach().clone(), counts.clone()
    x[0, 0, 3], counts[0, 3] = -1e4, True
    assert_rewritten(over_tokens(UNDERFLOW[name]), q, k, v, x.requires_grad_(), counts, compiled=False)


def test_a_choice_between_numbers_in_double_precision():
    """No node holds the choice, and a decay of single precision would show."""
    tensors = [a.detach().double().requires_grad_() if a.is_floating_point() else a for a in arguments()]
    update = over_tokens(lambda s, new, x, m, t: torch.where(m[:, :, t], 0.9 * s + new, 0.5 * s + new))
    assert_rewritten(update, *tensors, compiled=False)


def test_a_mask_times_a_gate_is_no_truth():
    """1 - m b may be 0, and its gradient there is not that of a condition."""
    update = over_tokens(lambda s, new, x, m, t: s + m[:, :, t] * gate(x, t) * (new - s))
    assert_refused(update, *arguments())


def test_a_number_in_a_format_of_its_own():
    """A tensor that the program makes holds what its format has left of the number."""

    def run(q, k, v, x, counts):
        decay = torch.tensor(0.9, dtype=torch.bfloat16)
        return over_tokens(lambda s, new, x, m, t: decay * s + new)(q, k, v, x, counts)

    assert_rewritten(run, *arguments(), compiled=False)


def test_a_decay_that_is_an_input_where_it_counts():
    """Positive if the input is, which is asked before each call."""

    def given(rates):
        q, k, v, _, counts = arguments()
        return [q, k, v, rates.requires_grad_(), counts]

    run = over_tokens(lambda s, new, x, m, t: s * torch.where(m[:, :, t], x[:, :, t], 1.0) + new)
    report = assert_rewritten(run, *given(torch.rand(B, H, N) * 0.5 + 0.4), compiled=False)
    assert any("> 0" in assumed for assumed in report.rewrites[0].assumptions)
    assert_refused(run, *given(torch.rand(B, H, N) - 0.5), obligation="decay")


@pytest.mark.parametrize("number", [0.0, 0.5])
def test_a_state_that_is_filled_in_place(number):
    """``fill_`` has the number as an argument beside the tensor."""

    def run(q, k, v, x, counts):
        state, out = torch.empty(B, H, D, D).fill_(0.0), []
        decay = torch.ones(()).fill_(number) if number else torch.sigmoid(x.mean())
        for t in range(N):
            state = decay * state + k[:, :, t, :, None] * v[:, :, t, None]
            out.append((q[:, :, t, :, None] * state).sum(-2))
        return torch.stack(out, 2)

    assert_rewritten(run, *arguments(), compiled=False)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", READS)
def test_a_read_before_the_token_counts_and_decays(name, given):
    def run(q, k, v, x, counts, *states):
        state, out = states[0] if given else q.new_zeros(B, H, D, D), []
        for t in range(N):
            out.append((q[:, :, t, :, None] * state).sum(-2))
            new = state + k[:, :, t, :, None] * v[:, :, t, None]
            state = READS[name](x, counts, t)[..., None, None] * new
        return torch.stack(out, 2)

    state = [torch.randn(B, H, D, D, requires_grad=True)] if given else []
    assert_rewritten(run, *arguments(), *state, compiled=False)


ONTO = {
    "addr": lambda s, k, v, g: torch.addr(s, k, v, beta=0.9),
    "addr, in place": lambda s, k, v, g: (s * g).addr_(k, v),
    "addmm": lambda s, k, v, g: torch.addmm(s * g, k[:, None], v[None]),
    "addmm, with numbers": lambda s, k, v, g: torch.addmm(s, k[:, None], v[None], beta=0.9, alpha=0.5),
}


@pytest.mark.parametrize("name", ONTO)
def test_an_update_by_one_operation(name):
    """One head of one sequence."""

    def run(q, k, v, x):
        state, out = q.new_zeros(D, D), []
        for t in range(N):
            state = ONTO[name](state, k[t], v[t], torch.sigmoid(x[t]))
            out.append(q[t] @ state)
        return torch.stack(out)

    q, k, v, x = (a.detach()[0, 0].requires_grad_() for a in arguments()[:4])
    assert_rewritten(run, q, k, v, x, compiled=False)


def test_a_projection_with_a_bias_stays_one():
    def run(q, k, v, x):
        weight, bias = k[0, 0, :D], v[0, 0, 0]
        return torch.addmm(bias, q[0, 0], weight)

    assert_refused(run, *arguments()[:4])


@pytest.mark.parametrize("length", [8, 9])
def test_as_many_tokens_as_features(length):
    """The last token is read at the number that the last feature has."""

    def run(x, weight):
        state, out = x.new_zeros(2, D, D), []
        for t in range(length):
            q, k, v = (x[:, t : t + 1] @ weight).chunk(3, -1)
            state = 0.9 * state + k.mT @ v
            out.append(q @ state)
        return torch.cat(out, 1)

    x, weight = (torch.randn(*s, requires_grad=True) for s in [(2, length, 8), (8, 3 * D)])
    assert_rewritten(run, x, weight, compiled=False)


def test_a_gate_of_the_key_that_is_a_projection_without_a_bias():
    def run(q, k, v, x, weight):
        upto = F.logsigmoid(x).cumsum(-1)
        apart = upto[..., :, None] - upto[..., None, :] + (k @ weight)[..., 0][..., None, :]
        return (q @ k.mT * apart.masked_fill(~ORDER, float("-inf")).exp()) @ v

    assert_rewritten(run, *arguments()[:4], torch.randn(D, 2, requires_grad=True), compiled=False)
