"""Rows that are divided by their sums, without an epsilon: in the square itself, and token by token."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lacompile import explain
from lacompile.backend import decide
from lacompile.options import Options
from lacompile.testing import assert_refused, assert_rewritten

from .drawn import qkv

B, H, N, D = 2, 3, 12, 4
FEATURES = {
    "none": lambda x: x,
    "elu": lambda x: F.elu(x) + 1,
    "sigmoid": torch.sigmoid,
    "softmax": lambda x: x.softmax(-1),
}


def positive(q, k, v):
    """Features of which no row sum is near 0, whatever they are mapped by."""
    return [q.detach().abs().requires_grad_(), k.detach().abs().requires_grad_(), v]


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("how", ["kept", "squeezed", "einsum"])
def test_scores_divided_by_their_row_sums(features, how):
    phi = FEATURES[features]

    def run(q, k, v):
        a = (phi(q) @ phi(k).mT).tril()
        total = {
            "kept": lambda: a.sum(-1, keepdim=True),
            "squeezed": lambda: a.sum(-1)[..., None],
            "einsum": lambda: torch.einsum("bhij->bhi", a)[..., None],
        }[how]()
        return (a / total) @ v

    report = assert_rewritten(run, *positive(*qkv(B, H, N, D)), count=2, compiled=False)
    assert not report.near_misses


SPLITS = {
    "parts": lambda y: (z.unflatten(-1, (H, D)).transpose(1, 2) for z in y.chunk(3, -1)),
    "before heads": lambda y: y.unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4),
    "inside heads": lambda y: y.unflatten(-1, (H, 3 * D)).transpose(1, 2).split(D, -1),
}


@pytest.mark.parametrize("split", SPLITS)
def test_of_one_projection(split):
    """q is the tensor that k is, at another place: what is divided by is a sum of both all the same."""

    def run(x, w, b):
        q, k, v = SPLITS[split](F.linear(x, w, b))
        a = (FEATURES["elu"](q) @ FEATURES["elu"](k).mT).tril()
        return ((a / a.sum(-1, keepdim=True)) @ v).transpose(1, 2).flatten(2)

    shapes = (B, N, 8), (3 * H * D, 8), (3 * H * D,)
    args = [torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_() for shape in shapes]
    assert_rewritten(run, *args, count=2, compiled=False)


def test_decayed_scores_divided_by_their_row_sums():
    def run(q, k, v):
        i = torch.arange(N)
        a = F.elu(q).add(1) @ F.elu(k).add(1).mT * (0.9 ** (i[:, None] - i)).tril()
        return (a / a.sum(-1, keepdim=True)) @ v

    assert_rewritten(run, *qkv(B, H, N, D), count=2, compiled=False)


def test_one_head_without_a_batch():
    def run(q, k, v):
        a = (q.sigmoid() @ k.sigmoid().mT).tril()
        return (a / a.sum(-1, keepdim=True)) @ v

    assert_rewritten(run, *(x[0, 0].detach().requires_grad_() for x in qkv(B, H, N, D)), count=2, compiled=False)


def test_small_scores_in_fp16():
    """One over the sum of small scores is infinite there, and the quotient is not."""

    def run(q, k, v):
        a = (q @ k.mT).tril()
        return (a / a.sum(-1, keepdim=True)) @ v

    q, k, v = (x.detach() for x in positive(*qkv(B, H, N, D)))
    small = (1e-3 * q).half(), (1e-3 * k).half(), v.half()
    assert run(*small).isfinite().all()
    assert_refused(run, *small)
    assert_rewritten(run, *(x.bfloat16() for x in (1e-3 * q, 1e-3 * k, v)), count=2, grads=False, compiled=False)


OTHERS = {
    "absolute values": lambda a: a.abs().sum(-1, keepdim=True),
    "the largest": lambda a: a.abs().amax(-1, keepdim=True),
}


@pytest.mark.parametrize("other", OTHERS)
def test_scores_divided_by_another_number_of_the_row(other):
    def run(q, k, v):
        a = (q @ k.mT).tril()
        return (a / OTHERS[other](a)) @ v

    assert_rewritten(run, *positive(*qkv(B, H, N, D)), compiled=False)


def test_scores_divided_by_the_sums_of_columns():
    """Each is a factor of its key: of what becomes small with the rows the last columns have next to nothing."""

    def run(q, k, v):
        a = (q @ k.mT).tril()
        return (a / a.sum(-2, keepdim=True)) @ v

    assert_refused(run, *positive(*qkv(B, H, N, D)))


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("decay", [1.0, 0.95])
def test_tokens_divided_by_their_normaliser(features, decay):
    phi = FEATURES[features]

    def run(q, k, v):
        q, k = phi(q), phi(k)
        state, z, out = q.new_zeros(B, H, D, D), q.new_zeros(B, H, D), []
        for t in range(N):
            state = decay * state + k[:, :, t, :, None] * v[:, :, t, None, :]
            z = decay * z + k[:, :, t]
            over = (q[:, :, t] * z).sum(-1, keepdim=True)
            out.append((q[:, :, t, None] @ state)[:, :, 0] / over)
        return torch.stack(out, 2)

    report = assert_rewritten(run, *positive(*qkv(B, H, N, D)), count=2, compiled=False)
    assert not report.near_misses


def test_tokens_divided_by_the_normaliser_of_another_loop():
    """Its keys are others, and both sums are right."""

    def run(q, k, v):
        q, k = q.sigmoid(), k.sigmoid()
        state, z, out = q.new_zeros(B, H, D, D), q.new_zeros(B, H, D), []
        for t in range(N):
            state = state + k[:, :, t, :, None] * v[:, :, t, None, :]
            z = z + k[:, :, t].square()
            out.append((q[:, :, t, None] @ state)[:, :, 0] / (q[:, :, t] * z).sum(-1, keepdim=True))
        return torch.stack(out, 2)

    assert_rewritten(run, *qkv(B, H, N, D), count=2, compiled=False)


# ------------------------------------------------------------------------------------- a square that is there anyway


def left_of(run, *args):
    """The names of what the rewritten graph calls, where there is one."""
    left = []

    def backend(gm, example_inputs):
        made = decide(gm, example_inputs, Options()).rewritten
        left.extend(str(n.target) for n in (made or gm).graph.nodes)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(run, backend=backend)(*args)
    return left


def test_the_row_sums_of_scores_that_stay():
    """Scores that a function is read of stay, and one sum of what is there is less than an operator."""

    def run(q, k, v):
        a = (q @ k.mT).tril()
        return (a / (1 + a.sum(-1, keepdim=True).abs())).tanh() @ v

    args = qkv(B, H, N, D)
    assert_refused(run, *args)
    assert not any("decayed_attention" in name for name in left_of(run, *args))


def divided(by):
    """Scores that are summed by row, and ``by`` makes of them the least that a sum is."""

    def run(q, k, v):
        a = (q @ k.mT).tril()
        return (a @ v) / torch.maximum(a.sum(-1, keepdim=True).abs(), by(a))

    return run


LENT = {
    "ones like a column": lambda a: torch.ones_like(a[..., :1]),
    "one of their format": lambda a: a.new_ones(()),
    "cast to their format": lambda a: torch.ones(()).to(a),
    "cast as they are": lambda a: torch.ones(()).type_as(a),
    "as many as they are": lambda a: torch.ones(()).expand_as(a)[..., :1],
}


@pytest.mark.parametrize("name", LENT)
def test_scores_that_lend_their_format(name):
    assert_rewritten(divided(LENT[name]), *qkv(B, H, N, D), count=2, compiled=False)


READ = {
    "their first column": lambda a: a[..., :1].abs(),
    "their largest, for each row": lambda a: a.amax().abs().expand_as(a[..., :1]),
    "cast to themselves": lambda a: a.to(a)[..., -1:].abs(),
}


@pytest.mark.parametrize("name", READ)
def test_scores_that_are_read_stay_with_their_sums(name):
    assert_rewritten(divided(READ[name]), *qkv(B, H, N, D), count=1, compiled=False)


def test_scores_that_are_a_result_too():
    """The attention is one, its row sums stay beside the scores that are there for the result."""

    def run(q, k, v):
        a = (q.sigmoid() @ k.sigmoid().mT).tril()
        return (a / a.sum(-1, keepdim=True)) @ v, a

    report = assert_rewritten(run, *qkv(B, H, N, D), compiled=False)
    assert [r.dv for r in report.rewrites] == [D]
    torch._dynamo.reset()
    assert len(explain(run, dry_run=True)(*qkv(B, H, N, D)).rewrites) == 1


def test_row_sums_that_a_result_is():
    """Nothing else reads the scores: the sums need no square."""

    def run(q, k):
        return (q @ k.mT).tril().sum(-1)

    args = qkv(B, H, N, D)[:2]
    assert_rewritten(run, *args, compiled=False)
    assert not any("tril" in name for name in left_of(run, *args))


def test_the_final_sum_of_keys_beside_scores_that_stay():
    """No operator is left for the state alone."""

    def run(q, k, v):
        a = (q @ k.mT).tril()
        return (a / (1 + a.sum(-1, keepdim=True).abs())).tanh() @ v, k.sum(-2)

    assert_refused(run, *qkv(B, H, N, D))


def over(total):
    """The whole row: ``[B, H, N]`` as ``[B, H, N, 1]``."""
    return total[..., None]


SUMS_OF_DATA = {
    "positive": lambda a, w: a / over((1 + w.abs()).cumsum(-1)),
    "of any sign": lambda a, w: a / over(w.cumsum(-1)),
    "and a number": lambda a, w: a / over(w.sigmoid().cumsum(-1) + 1e-6),
    "its root": lambda a, w: a / over(w.sigmoid().cumsum(-1).sqrt()),
    "bounded": lambda a, w: a / over(w.abs().cumsum(-1).clamp(min=1.0)),
    "keys that are its summands": lambda a, w: a * w.sigmoid()[..., None, :] / over(w.sigmoid().cumsum(-1)),
    "exponentials": lambda a, w: a * w.tanh().exp()[..., None, :] / over(w.tanh().exp().cumsum(-1)),
    "of later tokens": lambda a, w: a / over(w.sigmoid().flip(-1).cumsum(-1).flip(-1)),
    "of all tokens": lambda a, w: a / w.sigmoid().sum(-1)[..., None, None],
    "of the tokens before": lambda a, w: a / over(w.sigmoid().cumsum(-1) - w.sigmoid() + 1),
    "of known numbers": lambda a, w: a / over(torch.tensor([0.3, 0.7] * (N // 2)).cumsum(-1).sqrt()),
    "of each column": lambda a, w: a / (1 + w.abs()).cumsum(-1)[..., None, :],
}


@pytest.mark.parametrize("name", SUMS_OF_DATA)
def test_scores_divided_by_sums_of_data(name):
    def run(q, k, v, w):
        return SUMS_OF_DATA[name]((q @ k.mT).tril(), w) @ v

    assert_rewritten(run, *qkv(B, H, N, D), torch.randn(B, H, N, requires_grad=True), compiled=False)


def from_each_on(w):
    return w.flip(-1).cumsum(-1).flip(-1)


QUOTIENTS = {
    "up to each of two tokens": lambda w: [w.cumsum(-1)] * 2,
    "from each of two tokens on": lambda w: [from_each_on(w)] * 2,
    "twice": lambda w: [w.cumsum(-1), w.cumsum(-1)],
}


@pytest.mark.parametrize("name", QUOTIENTS)
def test_a_quotient_of_sums_of_what_may_be_next_to_nothing(name):
    """Apart, one over the sum of the key would be infinite where the quotient is a number."""

    def run(q, k, v, w):
        row, key = QUOTIENTS[name](w)
        return ((q @ k.mT).tril() * (row[..., None] / key[..., None, :])) @ v

    w = torch.logspace(0, -44, N).expand(B, H, N).clone().requires_grad_()
    assert_refused(run, *qkv(B, H, N, D), w)


def test_a_quotient_of_a_part_of_the_tensor_that_the_keys_are():
    def run(q, kc, v):
        k, c = kc[..., :D], kc[..., D]
        return ((q @ k.mT).tril() * c[..., :, None] / c[..., None, :]) @ v

    q, k, v = qkv(B, H, N, D)
    c = torch.logspace(0, -44, N).expand(B, H, N)[..., None]
    assert_refused(run, q, torch.cat([k.detach(), c], -1).requires_grad_(), v)


def test_a_sum_of_both_positions_is_no_row_factor():
    def run(q, k, v, w):
        s = w.cumsum(-1)
        return ((q @ k.mT).tril() / (1 + s[..., None] - s[..., None, :])) @ v

    assert_refused(run, *qkv(B, H, N, D), torch.rand(B, H, N, requires_grad=True))
