"""What a program is, where it is no decayed attention: the report names that, and not the obligation that fails first.

Beside each program stands a near twin, which is an attention and is rewritten.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lacompile import explain
from lacompile.testing import assert_refused, assert_rewritten

from .drawn import qkv

B, H, D = 1, 2, 4


def heads(n, *more):
    return [*qkv(B, H, n, D), *(torch.rand(B, H, n, *m, requires_grad=True) for m in more)]


def outer(k, v):
    return k[..., :, None] * v[..., None, :]


def read(x, state):
    return (x[..., :, None] * state).sum(-2)


def only_reason(program, *args):
    """The one near miss that is reported of a program which is left alone."""
    report = explain(program)(*args)
    assert not report.rewrites
    assert len(report.near_misses) == 1, report
    return report.near_misses[0]


# ---------------------------------------------------------------------------------- a state read back into its update


def delta(gated=False):
    """The delta rule, which subtracts what the keys read from the state; or from a matrix that never changes."""

    def run(q, k, v, b, g, fixed=None):
        state, out = q.new_zeros(B, H, D, D), []
        errors = v if fixed is None else v - k @ fixed
        for t in range(q.shape[2]):
            if gated:
                state = state * torch.exp(-g[:, :, t, None, None])
            new = v[:, :, t] - read(k[:, :, t], state) if fixed is None else errors[:, :, t]
            state = state + outer(k[:, :, t], new * b[:, :, t, None])
            out.append(read(q[:, :, t], state))
        return torch.stack(out, 2)

    return run


@pytest.mark.parametrize("n", [3, 4, 9])
@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
def test_a_state_that_its_own_update_reads(n, gated):
    miss = only_reason(delta(gated), *heads(n, (), ()))
    assert miss.obligation == "recurrence" and "read back" in miss.found


def test_the_delta_rule_is_left_alone():
    assert_refused(delta(gated=True), *heads(5, (), ()), obligation="recurrence")


def test_an_update_that_reads_what_never_changes():
    report = assert_rewritten(delta(), *heads(6, ()), torch.rand(B, H, 6), torch.randn(B, H, D, D), compiled=False)
    assert not report.near_misses


def other_keys(q, k, v, b, p):
    """The state is read with other keys than it is written with."""
    state, out = q.new_zeros(B, H, D, D), []
    for t in range(q.shape[2]):
        state = state + outer(k[:, :, t], (v[:, :, t] - read(p[:, :, t], state)) * b[:, :, t, None])
        out.append(read(q[:, :, t], state))
    return torch.stack(out, 2)


@pytest.mark.parametrize("n", [3, 7])
def test_keys_that_read_and_keys_that_write(n):
    assert only_reason(other_keys, *heads(n, (), (D,))).obligation == "recurrence"


def solved(gated):
    """A chunk of the delta rule: the new values are (1 + A)^-1 v; then comes a masked product as of an attention."""

    def run(q, k, v, b, g):
        n = q.shape[2]
        weight = torch.ones(n, n).tril()
        if gated:
            total = g.cumsum(-1)
            weight = (total[..., None, :] - total[..., :, None]).tril().exp().tril()
        mixing = (b[..., None] * (k @ k.mT) * weight).tril(-1)
        v = torch.linalg.solve_triangular(mixing + torch.eye(n), v * b[..., None], upper=False, unitriangular=True)
        return (q @ k.mT * weight) @ v

    return run


@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
def test_the_values_of_a_delta_rule_in_one_chunk(gated):
    """The masked product behind the solve is an attention, of the values that the solve made."""
    report = assert_rewritten(solved(gated), *heads(6, (), ()), compiled=False)
    assert not report.near_misses


def test_the_values_of_a_delta_rule_by_chunks():
    """What the state adds to each chunk was solved for; the chunks are no attention together."""

    def run(q, k, v, b, g):
        state, out, eye = q.new_zeros(B, H, D, D), [], torch.eye(4)
        for q, k, v, b in zip(*(x.split(4, 2) for x in (q, k, v, b)), strict=True):  # noqa: B020
            mixing = (b[..., None] * (k @ k.mT)).tril(-1) + eye
            right = (v - k @ state) * b[..., None]
            new = torch.linalg.solve_triangular(mixing, right, upper=False, unitriangular=True)
            out.append(q @ state + (q @ k.mT).tril() @ new)
            state = state + k.mT @ new
        return torch.cat(out, 2)

    assert_refused(run, *heads(12, (), ()), obligation="recurrence")


def test_residual_layers_read_no_state_back():
    """The second layer of a residual stream is computed from the first; that is not what is wrong with it."""

    def run(x, w):
        n = x.shape[2]
        for a in w.unbind():
            scores = (x @ a) @ x.mT
            x = x + scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(-1), 0) @ (x @ a.mT)
        return x

    report = explain(run)(torch.randn(B, H, 12, D), torch.randn(2, D, D))
    assert "causal-range" in {m.obligation for m in report.near_misses} <= {"causal-range", "single-term"}


# ------------------------------------------------------------------------------------------------- a running maximum


def mlstm(stabilised):
    def run(q, k, v, i, f):
        i, f = i if stabilised else F.logsigmoid(i), F.logsigmoid(f)
        state, m, out = q.new_zeros(B, H, D, D), q.new_zeros(B, H), []
        for t in range(q.shape[2]):
            forget, write = f[:, :, t], i[:, :, t]
            if stabilised:
                new = torch.maximum(forget + m, write)
                forget, write, m = forget + m - new, write - new, new
            state = state * forget.exp()[..., None, None] + outer(k[:, :, t] * write.exp()[..., None], v[:, :, t])
            out.append(read(q[:, :, t], state))
        return torch.stack(out, 2)

    return run


def test_a_gate_under_a_running_maximum():
    assert only_reason(mlstm(True), *heads(7, (), ())).obligation == "bounded-weights"


def capped(limit):
    """Of all pairs of positions, with a gate that is kept in range by itself, and under a maximum all the same."""

    def run(q, k, v, i, f):
        i, upto = limit * torch.tanh(i / limit), F.logsigmoid(f).cumsum(-1)
        exponents = upto[..., :, None] - upto[..., None, :] + i[..., None, :]
        exponents = exponents.masked_fill(torch.ones(2 * (q.shape[2],), dtype=torch.bool).triu(1), -torch.inf)
        scores = (q @ k.mT) * (exponents - exponents.amax(-1, keepdim=True)).exp()
        return scores @ v

    return run


def test_a_gate_in_range_under_a_maximum():
    assert_rewritten(capped(15.0), *heads(7, (), ()), compiled=False)


@pytest.mark.parametrize("limit, rewritten", [(15.0, 0), (5.0, 1)])
def test_what_is_in_range_in_half_precision(limit, rewritten):
    """exp(15) times a key is none of its numbers."""
    torch._dynamo.reset()  # else the limit is no number the second time
    report = explain(capped(limit))(*(x.detach().half() for x in heads(7, (), ())))
    assert len(report.rewrites) == rewritten
    assert rewritten or "bounded-weights" in {m.obligation for m in report.near_misses}


def test_a_gate_that_needs_none():
    assert_rewritten(mlstm(False), *heads(7, (), ()), compiled=False)


# ------------------------------------------------------------------------------------------------ decays by channel


def bonus(q, k, v, g, u):
    """Each token reads the state before it, and its own product with a weight apart, as in RWKV-6."""
    state, out = q.new_zeros(B, H, D, D), []
    for t in range(q.shape[2]):
        new = outer(k[:, :, t], v[:, :, t])
        out.append(read(q[:, :, t], state + u[:, :, None] * new))
        state = state * torch.exp(-g[:, :, t, :, None]) + new
    return torch.stack(out, 2)


def test_a_decay_behind_an_exclusive_sum():
    """With a decay of each head it is rewritten."""
    assert only_reason(bonus, *heads(6, (D,)), torch.rand(H, D)).obligation == "decay"
    assert_rewritten(bonus, *heads(6, (1,)), torch.rand(H, 1), compiled=False, grads=False)


@pytest.mark.parametrize("by_matmul", [False, True])
def test_a_fixed_decay_by_channel(by_matmul):
    """Of what reads it no more is known: the state itself shows it, and of a decay of each head there is nothing."""

    def run(q, k, v, rate):
        state, out = q.new_zeros(B, H, D, D), []
        for t in range(q.shape[2]):
            state = torch.sigmoid(rate)[..., None] * state + outer(k[:, :, t], v[:, :, t])
            out.append((q[:, :, t, None] @ state)[:, :, 0] if by_matmul else read(q[:, :, t], state))
        return torch.stack(out, 2)

    assert only_reason(run, *heads(6), torch.randn(H, D)).found == "a decay that differs by feature channel"
    assert_rewritten(run, *heads(6), torch.randn(H, 1), compiled=False)


def test_the_last_state_of_values_with_heads_of_their_own():
    """The decay is that of a head, which the keys have none of: no channel has one of its own."""

    def run(k, v, rate):
        state = v.new_zeros(B, H, D, D)
        for t in range(v.shape[2]):
            state = torch.sigmoid(rate)[:, None, None] * state + outer(k[:, :, t], v[:, :, t])
        return state

    _, k, v = heads(6)
    assert "state behind the last token" in only_reason(run, k[:, :1], v, torch.randn(H)).found


# ------------------------------------------------------------------------------------------- without queries and keys


def test_an_elementwise_recurrence():
    def run(x, g):
        h, out = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            h = g[:, t].exp() * h + x[:, t]
            out.append(h)
        return torch.stack(out, 1), h

    miss = only_reason(run, torch.randn(2, 6, 8), -torch.rand(2, 6, 8))
    assert miss.obligation == "separable" and "elementwise" in miss.found


def test_an_elementwise_prefix_sum():
    """As in the attention-free transformer: one of many keys and a value is rewritten, one of a channel is not."""

    def run(q, k, v):
        return torch.sigmoid(q) * (k.exp() * v).cumsum(1) / k.exp().cumsum(1)

    assert "elementwise" in only_reason(run, *(torch.randn(2, 12, 8) for _ in range(3))).found

    def contracted(q, k, v):
        return ((k.exp() * v).cumsum(1) * torch.sigmoid(q)).sum(-1)

    assert_rewritten(contracted, *(torch.randn(2, 12, 8) for _ in range(3)), compiled=False, grads=False)


def test_the_state_of_a_normaliser_is_not_one_apart():
    """It is an elementwise recurrence, and belongs to an attention that is rewritten."""

    def run(q, k, v, g):
        state, total, out, sums = q.new_zeros(B, H, D, D), q.new_zeros(B, H, D), [], []
        q, k = q.exp(), k.exp()
        for t in range(q.shape[2]):
            decay = torch.exp(-g[:, :, t])
            state = state * decay[..., None, None] + outer(k[:, :, t], v[:, :, t])
            total = total * decay[..., None] + k[:, :, t]
            out.append(read(q[:, :, t], state))
            sums.append((q[:, :, t] * total).sum(-1, keepdim=True))
        return torch.stack(out, 2) / torch.stack(sums, 2), total

    report = assert_rewritten(run, *heads(6, ()), compiled=False)
    assert not any("elementwise" in miss.found for miss in report.near_misses)


def test_a_state_that_is_detached():
    """The sums have one form, and for autograd other factors: no gradient reaches the tokens of chunks before."""

    def run(q, k, v):
        state, out = q.new_zeros(B, H, D, D), []
        for a in range(0, 12, 4):
            x, y, z = (t[:, :, a : a + 4] for t in (q, k, v))
            out.append((x @ y.mT).tril() @ z + x @ state)
            state = (state + y.mT @ z).detach()
        return torch.cat(out, 2)

    assert "detached" in only_reason(run, *heads(12)).found


# --------------------------------------------------------------------------------------------- weights of another kind


def updated(update):
    """A token loop whose state is made by this of the last one, of what the token adds, and of the token's number."""

    def run(q, k, v):
        state, out = q.new_zeros(B, H, D, D), []
        for t in range(q.shape[2]):
            state = update(state, outer(k[:, :, t], v[:, :, t]), t)
            out.append(read(q[:, :, t], state))
        return torch.stack(out, 2)

    return run


@pytest.mark.parametrize("n", [6, 9])
@pytest.mark.parametrize(
    "update",
    [
        lambda s, new, t: new - 0.5 * s,
        lambda s, new, t: torch.lerp(s, new, 1.5),
    ],
    ids=["negative", "beyond the new"],
)
def test_sums_that_do_not_merge(update, n):
    miss = only_reason(updated(update), *heads(n))
    assert miss.obligation == "single-term" and "of the same factors that do not merge" in miss.found


@pytest.mark.parametrize(
    "update", [lambda s, new, t: new + 0.5 * s, lambda s, new, t: torch.lerp(s, new, 0.5)], ids=["positive", "lerp"]
)
def test_sums_that_merge(update):
    assert_rewritten(updated(update), *heads(6), compiled=False)


# --------------------------------------------------------------------------------------- a bound on a product of decays


def divided(bound):
    """The states of all tokens at once: keys are divided by the product of the decays up to them."""

    def run(q, k, v, a):
        p = F.logsigmoid(a).cumsum(-1).exp()[..., None, None]
        return read(q, p * (outer(k, v) / bound(p)).cumsum(2))

    return run


BOUNDS = {
    "clamp": lambda p: p.clamp(min=1e-8),
    "clamp_min": lambda p: p.clamp_min(1e-8),
    "maximum": lambda p: torch.maximum(p, torch.full_like(p, 1e-8)),
}


@pytest.mark.parametrize("bound", BOUNDS)
def test_a_bound_on_the_product_of_decays(bound):
    miss = only_reason(divided(BOUNDS[bound]), *heads(12, ()))
    assert miss.obligation == "decay" and f"bounded ({bound})" in miss.found


def test_a_product_of_decays_without_a_bound():
    assert_rewritten(divided(lambda p: p), *heads(12, ()), compiled=False)


def test_a_key_that_misses_its_own_decay():
    """Where nothing is bounded, the prefix sums are what is told."""
    miss = only_reason(divided(lambda p: 1.0), *heads(12, ()))
    assert miss.obligation == "unit-diagonal"


# ------------------------------------------------------------------------------------------------------------ messages


def masked(seen):
    def f(q, k, v):
        i = torch.arange(q.shape[2])
        return (q @ k.mT * seen(i[:, None], i)) @ v

    return f


RANGES = {
    "blocks": (lambda i, j: i // 4 > j // 4, "j >= 0, (i // 4)-(j // 4)-1 >= 0"),
    "earlier ones": (lambda i, j: i >= j + 2, "j <= i-2, j >= 0"),
}


@pytest.mark.parametrize("name", RANGES)
def test_a_range_is_said_in_positions(name):
    seen, said = RANGES[name]
    assert said in only_reason(masked(seen), *heads(12)).found


def test_weights_in_an_exponent_that_is_not_looked_into_are_told():
    slopes = torch.tensor([0.1, -0.3])[:, None, None]

    def f(q, k, v):
        i = torch.arange(q.shape[2])
        d = slopes * (i[:, None] - i)
        return (q @ k.mT * torch.where(d >= 0, -d, float("-inf")).exp()) @ v

    assert only_reason(f, *heads(12)).obligation == "separable"
