"""What a loop computes for each token or chunk by itself: projections with a bias, norms, whole networks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import lacompile
from lacompile.testing import assert_refused, assert_rewritten

B, H, N, D = 2, 2, 6, 4
WIDTH = H * D


def layer(rows=WIDTH, columns=WIDTH):
    """A weight and a bias."""
    weight = torch.randn(rows, columns) / columns**0.5
    return [weight.requires_grad_(), torch.randn(rows, requires_grad=True)]


def tokens(n=N):
    torch.manual_seed(0)
    return torch.randn(B, n, WIDTH, requires_grad=True)


def heads(x):
    return x.unflatten(-1, (H, D))


def step(state, q, k, v, decay):
    """The state after one token, and what the token reads, for ``[B, H * D]`` each."""
    state = decay * state + heads(k)[..., :, None] * heads(v)[..., None, :]
    return state, (heads(q)[..., None, :] @ state).flatten(1)


def loop(x, q, k, v, decay=lambda x_t: 0.9):
    state, out = x.new_zeros(B, H, D, D), []
    for x_t in x.unbind(1):
        state, o = step(state, q(x_t), k(x_t), v(x_t), decay(x_t))
        out.append(o)
    return torch.stack(out, 1)


MAPS = {
    "linear": lambda x, w, b: F.linear(x, w, b),
    "linear without a bias": lambda x, w, b: F.linear(x, w),
    "linear of a norm": lambda x, w, b: F.linear(F.layer_norm(x, (WIDTH,)), w, b),
    "two layers": lambda x, w, b: F.linear(F.silu(F.linear(x, w, b)), w),
    "softmax": lambda x, w, b: heads(F.linear(x, w, b)).softmax(-1).flatten(1),
    "normalize": lambda x, w, b: F.normalize(heads(x @ w + b), dim=-1).flatten(1),
}


@pytest.mark.parametrize("name", MAPS)
def test_queries_keys_and_values_of_each_token(name):
    def run(x, q, k, v):
        return loop(x, *(lambda x_t, p=p: MAPS[name](x_t, *p) for p in (q, k, v)))

    report = assert_rewritten(run, tokens(), layer(), layer(), layer(), compiled=False)
    assert report.rewrites[0].length == str(N)


@pytest.mark.parametrize("gate", [torch.sigmoid, lambda a: torch.exp(-F.softplus(a))])
def test_a_gate_of_each_token(gate):
    def run(x, q, g):
        return loop(
            x,
            lambda x_t: F.linear(x_t, *q),
            torch.tanh,
            torch.cos,
            lambda x_t: gate(F.linear(x_t, *g))[..., None, None],
        )

    assert_rewritten(run, tokens(), layer(), layer(H), compiled=False)


CUTS = {"even": 4, "ragged": 5}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("norm", [False, True])
def test_one_projection_of_each_chunk(cut, norm):
    def run(x, p):
        state, out = x.new_zeros(B, H, D, D), []
        for part in x.split(CUTS[cut], 1):
            part = F.layer_norm(part, (WIDTH,)) if norm else part
            q, k, v = (heads(y).transpose(1, 2) for y in F.linear(part, *p).chunk(3, -1))
            place = torch.arange(part.shape[1], dtype=x.dtype)
            inside = (0.9 ** (place[:, None] - place)).tril()
            out.append((q @ k.mT * inside) @ v + 0.9 ** (place[:, None] + 1) * (q @ state))
            state = 0.9 ** part.shape[1] * state + (k * 0.9 ** (part.shape[1] - 1 - place[:, None])).mT @ v
        return torch.cat(out, 2)

    assert_rewritten(run, tokens(12), layer(3 * WIDTH), compiled=False)


def test_a_projection_of_all_tokens_is_one_call():
    """What is not known to work on rows stays, one call for each token."""

    def nodes(key):
        report = lacompile.explain(lambda x, k: loop(x, torch.sin, lambda x_t: key(x_t, *k), torch.cos))(
            tokens().detach(), layer()
        )
        assert len(report.rewrites) == 1
        return report.nodes_after

    assert nodes(lambda x, w, b: torch.addmm(b, x, w)) - nodes(MAPS["linear"]) >= N - 1


def test_heads_and_features_in_one_dimension_are_told_apart():
    """Joined before the tokens are, each feature would be a head of its own."""

    def run(x):
        return loop(x, torch.sin, torch.tanh, torch.cos)

    report = assert_rewritten(run, tokens(), compiled=False)
    assert "Dk=4 Dv=4" in str(report)


OF_ROWS = {
    "normalize": lambda y, w: F.normalize(y, dim=-1),
    "layer norm": lambda y, w: F.layer_norm(y, (y.shape[-1],)),
    "centred": lambda y, w: y - y.mean(-1, keepdim=True),
    "linear": lambda y, w: F.linear(y, w),
}


@pytest.mark.parametrize("name", OF_ROWS)
@pytest.mark.parametrize("first", [0, 2, D])
def test_a_function_of_a_part_of_the_features(name, first):
    """It is not that of all features, where it would go on with another count of them, and nothing else tell."""
    own = slice(first, first + D)

    def run(q, k, v, w):
        state, out = v.new_zeros(B, D, D), []
        for t in range(N):
            q_t, k_t = (OF_ROWS[name](y[:, t, own], w) for y in (q, k))
            state = 0.9 * state + k_t[:, :, None] * v[:, t, None]
            out.append((q_t[:, None] @ state)[:, 0])
        return torch.stack(out, 1)

    q, k, v = tokens(), torch.randn(B, N, WIDTH), torch.randn(B, N, D)
    count = 2 if name == "centred" else 1  # q and k less their means: a sum of two attentions
    assert_rewritten(run, q, k, v, torch.randn(D, D), count=count, compiled=False, options={"validate": "off"})


# -------------------------------------------------------------------------------------------------------------- twins


def test_a_layer_of_its_own_for_each_token():
    """No tensor of the program is their sequence; each is what it is."""
    x, layers = tokens(), [layer() for _ in range(N)]

    def run(x, layers):
        it = iter(layers)
        return loop(x, lambda x_t: F.linear(x_t, *next(it)), torch.tanh, torch.cos)

    assert_refused(run, x, layers)


def test_noise_is_drawn_for_each_use():
    """One call made twice is two tensors where it draws numbers; the second is not the first."""

    def run(x):
        return loop(x, lambda x_t: F.dropout(x_t, 0.5), lambda x_t: F.dropout(x_t, 0.5).softmax(-1), torch.tanh)

    assert_refused(run, tokens(), options={"validate": "off"})


ZEROS = {
    "numbers": lambda x: (0.0, -0.0),
    "tensors": lambda x: (torch.tensor(0.0), torch.tensor(-0.0)),
    "of data": lambda x: (x * 0, -(x * 0)),
}


@pytest.mark.parametrize("name", ZEROS)
def test_zeros_of_two_signs(name):
    """The same number, and of a function that tells them apart not the same call."""

    def signed(x_t, n):
        return torch.copysign(x_t.cos(), ZEROS[name](x_t.detach())[n])

    def run(x):
        return loop(x, lambda x_t: signed(x_t, 0), lambda x_t: signed(x_t, 1), torch.tanh)

    assert_rewritten(run, tokens(), count=None, compiled=False, options={"validate": "off"})


def test_the_order_of_the_places():
    """A series says nothing of the order in which the program goes through it, a join of its values does."""

    def last_first(x, k):
        return loop(x.flip(1), torch.sin, lambda x_t: F.linear(x_t, *k), torch.cos).flip(1)

    def keys_last_first(x, k):
        keys = [F.linear(x_t, *k) for x_t in reversed(x.unbind(1))]
        return loop(x, torch.sin, lambda x_t: keys.pop(0), torch.cos)

    assert_rewritten(last_first, tokens(), layer(), compiled=False)
    assert_rewritten(keys_last_first, tokens(), layer(), compiled=False)


def written_before(x, w, b):
    b.add_(1.0)
    return loop(x, torch.sin, lambda x_t: F.linear(x_t, w, b), torch.tanh)


def rows_written_before(x, w, b):
    rows = [x_t * 2 for x_t in x.unbind(1)]
    for row in rows:
        row.tanh_()
    return loop(x, torch.sin, lambda x_t: F.linear(rows.pop(0), w, b), torch.tanh)


def of_a_batch(x, w, b):
    inside = torch.stack([F.linear(x_t, w, b) for x_t in x.unbind(1)], 1)
    keys = torch.stack([F.linear(y, w, b) for y in inside]).unbind(1)
    return loop(x, torch.sin, lambda x_t, left=list(keys): left.pop(0), torch.tanh)


def other_shapes(x, w, b):
    def summed(x_t, n):
        return torch.logsumexp(x_t[:, None].expand(B, n, WIDTH), 1)

    return loop(x, torch.sin, lambda x_t: summed(x_t, 3), lambda x_t: summed(x_t, 5))


def spread(x, w, b):
    return loop(x, torch.sin, lambda x_t: F.linear(x_t[:, :, None].expand(B, WIDTH, WIDTH), w, b)[:, 1], torch.tanh)


CALLS = [written_before, rows_written_before, of_a_batch, other_shapes, spread]


@pytest.mark.parametrize("run", CALLS)
def test_what_a_call_is_given(run):
    """Its arguments are those of that time, in their shapes; places of a batch are none of tokens."""
    w, b = layer()
    assert_rewritten(run, tokens(), w, b.detach(), compiled=False)


def test_a_cast_of_each_token():
    """Rows of the wider format are computed in it."""

    def run(x):
        rows = list(x.unbind(1))
        return loop(x.float(), lambda x_t: F.layer_norm(rows.pop(0).float(), (WIDTH,)), torch.tanh, torch.cos)

    assert_rewritten(run, tokens().detach().bfloat16().requires_grad_(), compiled=False)


def test_one_gate_for_all_heads():
    """Its width is one, as the length of a place is."""

    def run(x, g):
        return loop(x, torch.sin, torch.tanh, torch.cos, lambda x_t: F.linear(x_t, *g).sigmoid()[..., None, None])

    assert_rewritten(run, tokens(), layer(1), compiled=False)


def test_a_checkpoint_for_each_token():
    """Each is handed a graph of its own; the result of the operator is a tuple."""

    def run(x, w, b):
        def key(x_t):
            return checkpoint(lambda y: F.linear(y, w, b).softmax(-1), x_t, use_reentrant=False)

        return loop(x, torch.sin, key, torch.tanh)

    assert_refused(run, tokens(), *layer(), obligation="separable")


def test_a_bias_that_is_written_between_the_steps():
    def run(x, w, b):
        def key(x_t):
            out = F.linear(x_t, w, b)
            b.add_(1.0)
            return out

        return loop(x, torch.sin, key, torch.tanh)

    w, b = layer()
    assert_refused(run, tokens(), w.detach(), b.detach(), options={"validate": "off"})


# ---------------------------------------------------------------------------------- what is done to each result


def attention_of(x, after):
    """``after`` each step's result, of which the heads are apart."""
    state, out = x.new_zeros(B, H, D, D), []
    for x_t in x.unbind(1):
        state = 0.9 * state + heads(torch.tanh(x_t))[..., :, None] * heads(torch.cos(x_t))[..., None, :]
        out.append(after((heads(torch.sin(x_t))[..., :, None] * state).sum(-2), x_t))
    return out


AFTER = {
    "projected": lambda o, x_t, w, b: F.linear(o.flatten(1), w, b),
    "normalised": lambda o, x_t, w, b: F.linear(F.layer_norm(o, (D,)).reshape(B, WIDTH), w, b),
    "normalised by hand": lambda o, x_t, w, b: F.linear(
        (o * (o.pow(2).mean(-1, keepdim=True) + 1).rsqrt()).flatten(1), w
    ),
    "gated": lambda o, x_t, w, b: F.linear(o.flatten(1) * torch.sigmoid(x_t), w, b),
    "group norm": lambda o, x_t, w, b: F.linear(F.group_norm(o.flatten(1), H), w, b),
    "group norm of heads": lambda o, x_t, w, b: F.linear(F.group_norm(o, H).flatten(1), w, b),
    "added": lambda o, x_t, w, b: x_t + F.linear(F.rms_norm(o.flatten(1), (WIDTH,)), w, b),
}


@pytest.mark.parametrize("after", AFTER)
def test_the_output_of_each_token_is_projected(after):
    def run(x, w, b):
        return torch.stack(attention_of(x, lambda o, x_t: AFTER[after](o, x_t, w, b)), 1)

    report = assert_rewritten(run, tokens(), *layer(), compiled=False)
    assert report.nodes_after < report.nodes_before / 2


@pytest.mark.parametrize("add", [lambda y: y.unsqueeze(1), lambda y: y[:, None], lambda y: y.unsqueeze(-2)])
def test_results_that_are_given_a_dimension_to_be_joined_along(add):
    def run(x, w, b):
        return torch.cat(attention_of(x, lambda o, x_t: add(F.linear(o.flatten(1), w, b))), 1)

    report = assert_rewritten(run, tokens(), *layer(), compiled=False)
    assert report.nodes_after < report.nodes_before / 2


@pytest.mark.parametrize("dim", [0, 1])
def test_a_group_norm_of_any_place(dim):
    """It has one dimension for all its rows: that of the tokens joins it, in front or behind."""

    def run(x, w, b):
        return torch.stack(attention_of(x, lambda o, x_t: F.group_norm(o.flatten(1), H, b, b)), dim)

    assert_rewritten(run, tokens(), *layer(), compiled=False)


def test_groups_of_what_is_joined():
    """Along the channels nothing can be joined."""

    def run(x, w, b):
        outs = attention_of(x, lambda o, x_t: F.group_norm(o.flatten(1), H))
        return torch.cat(outs, 1), torch.stack(outs, 2)

    assert_refused(run, tokens(), *layer(), options={"validate": "off"})


LAYERS = {
    "alone": lambda x, o, w, b: o,
    "projected": lambda x, o, w, b: F.linear(o, w, b),
    "added": lambda x, o, w, b: x + F.linear(o, w, b),
    "scaled and added": lambda x, o, w, b: x * 0.5 + 2 * o,
    "normalised": lambda x, o, w, b: F.layer_norm(x + o, (WIDTH,)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_one_layer_after_the_other(name):
    """What the second one's tokens are parts of is a value of the graph, whatever it is made of."""

    def run(x, w, b, *projections):
        for _ in range(2):
            o = loop(x, *(lambda x_t, p=p: F.linear(x_t, *p) for p in projections))
            x = LAYERS[name](x, o, w, b)
        return x

    report = assert_rewritten(run, tokens(), *layer(), layer(), layer(), layer(), count=2, compiled=False)
    assert report.nodes_after < report.nodes_before / 2


def test_a_layer_whose_tokens_are_written_into():
    """The keys of later tokens are made of what is there by then."""

    def run(x, w, b):
        y = 0.5 * x + loop(x, torch.sin, torch.tanh, torch.cos)
        state, out = x.new_zeros(B, H, D, D), []
        for t in range(N):
            y_t = y[:, t]
            state, o = step(state, torch.sin(y_t), F.linear(y_t, w, b), torch.cos(y_t), 0.9)
            y[:, t + 1 :] *= 0.5
            out.append(o)
        return torch.stack(out, 1)

    assert_rewritten(run, tokens(), *layer(), grads=False, compiled=False)


JOINS = {
    "axis": lambda y: torch.stack([torch.relu(y[:, t]) for t in range(N)], axis=1),
    "numbers of two types": lambda y: torch.stack([F.linear(y[:, t] * (1.0 if t else 1), y[0]) for t in range(N)], 1),
    "formats": lambda y: torch.stack(
        [(y[:, t].double() if t % 2 else y[:, t].half()).softmax(-1) for t in range(N)], 1
    ),
    "a join of joins": lambda y: torch.stack(
        [F.linear(torch.stack([F.linear(y[b, t], y[0]).relu() for t in range(N)], 0), y[0].T) for b in range(B)],
        0,
    ),
    "written into": lambda y: torch.stack([torch.softmax(y[:, t], -1) for t in range(N)], 1).mul_(2),
    "strides": lambda y: torch.stack([torch.softmax(y[:, t].t(), -1) for t in range(N)], 1).view(-1),
}


@pytest.mark.parametrize("join", JOINS)
def test_what_else_is_joined_in_the_program(join):
    def run(x, w, b):
        o = torch.stack(attention_of(x, lambda o, x_t: F.linear(o.flatten(1), w, b)), 1)
        return o, JOINS[join](o)

    assert_rewritten(run, tokens(), *layer(), compiled=False)
