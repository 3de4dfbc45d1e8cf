"""What public code does and the analysis missed, cut down to what mattered; each has a twin that must be refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lacompile.testing import assert_refused, assert_rewritten

B, H, D, E = 2, 2, 4, 3
OFF = {"validate": "off"}


def qkv(length: int = 12) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, H, length, n, generator=generator).requires_grad_() for n in (D, D, E)]


def distance(n: int) -> torch.Tensor:
    i = torch.arange(n)
    return i[:, None] - i[None, :]


# ------------------------------------------------------------------------------------------------- quotients of decays


class TestARunningProductAndItsInverse:
    @staticmethod
    def gate():
        return torch.rand(B, H, 12, generator=torch.Generator().manual_seed(1)).requires_grad_()

    @pytest.mark.parametrize("squared", [False, True])
    def test_as_a_quotient(self, squared):
        def f(q, k, v, gate):
            run = torch.sigmoid(gate).cumprod(-1)
            below = run**2 if squared else run
            return (q @ k.mT * (run[..., :, None] / below[..., None, :]).tril()) @ v

        if squared:
            assert_refused(f, *qkv(), self.gate(), options=OFF)
        else:
            assert_rewritten(f, *qkv(), self.gate(), compiled=False)

    def test_on_the_queries_and_under_the_keys(self):
        def f(q, k, v, gate):
            run = torch.sigmoid(gate).cumprod(-1)[..., None]
            return ((q * run) @ (k / run).mT).tril() @ v

        assert_rewritten(f, *qkv(), self.gate(), compiled=False)


# ----------------------------------------------------------------------------------------------------- positions given


class Given(torch.nn.Module):
    """A retention whose positions, distances or slopes are buffers."""

    def __init__(self, positions: torch.Tensor, slopes: torch.Tensor):
        super().__init__()
        self.register_buffer("positions", positions)
        self.register_buffer("slopes", slopes)

    def forward(self, q, k, v):
        n = q.shape[2]
        if self.positions.dim() == 2:
            far = self.positions[:n, :n]
        else:
            far = self.positions[:n, None] - self.positions[None, :n]
        weight = torch.where(far >= 0, torch.exp(-far * self.slopes[:, None, None] / 8), 0.0)
        return (q @ k.mT * weight) @ v


class TestPositionsInABuffer:
    slopes = torch.tensor([0.3, 0.7])

    @pytest.mark.parametrize("start", [0.0, 1.0])
    def test_in_a_floating_format(self, start):
        assert_rewritten(Given(torch.arange(start, start + 20), self.slopes), *qkv(), compiled=False)

    def test_that_are_not_evenly_spaced(self):
        assert_refused(Given(torch.arange(20.0) ** 1.1, self.slopes), *qkv())

    @pytest.mark.parametrize("slopes", [slopes, torch.tensor([1.0, 2.0])])
    def test_as_the_distances_of_all_pairs(self, slopes):
        """Slopes on a line 1, 2, ... stay slopes."""
        assert_rewritten(Given(distance(20).float(), slopes), *qkv(), compiled=False)

    def test_as_distances_that_are_two_too_small(self):
        assert_refused(Given(distance(20).float() - 2, self.slopes), *qkv())

    def test_from_a_closure(self):
        positions = torch.arange(20.0)

        def f(q, k, v):
            far = positions[: q.shape[2], None] - positions[None, : q.shape[2]]
            return (q @ k.mT * torch.where(far >= 0, 0.9**far, 0.0)) @ v

        assert_rewritten(f, *qkv(), compiled=False)

    def test_that_change(self):
        layer = Given(torch.arange(20.0), self.slopes)
        compiled = torch.compile(layer, backend="lightning")
        args = [x.detach() for x in qkv()]
        torch.testing.assert_close(compiled(*args), layer(*args))
        layer.positions.mul_(1.5)
        torch.testing.assert_close(compiled(*args), layer(*args))


def test_a_buffer_of_eight_bits_is_not_read():
    """PyTorch does not even find its largest entry; the rest of the graph is analysed all the same."""
    scale = torch.ones(12).to(torch.float8_e4m3fn)

    def f(q, k, v):
        return (q @ k.mT).tril() @ v, scale.float()

    assert_rewritten(f, *qkv(), compiled=False)


def test_positions_of_unknown_length_in_a_floating_format():
    """A view computes nothing: how far the numbers are exact is what it was."""

    def f(q, k, v):
        i = torch.arange(q.shape[2]).float()
        weight = torch.exp(-0.1 * (i[:, None] - i[None, :]).abs()).tril()
        return (q @ k.mT * weight) @ v

    assert_rewritten(f, *qkv(), after=qkv(20), compiled=False)


# --------------------------------------------------------------------------------------------------------- feature maps


@pytest.mark.parametrize("shift", [0, 2])
def test_a_feature_map_that_holds_a_constant(shift):
    """Different data side by side is data."""

    def features(x):
        return torch.cat([torch.ones_like(x[..., :1]), x, (x[..., None] * x[..., None, :]).flatten(-2)], -1)

    def f(q, k, v):
        states = (v[..., None] * features(k)[..., None, :]).cumsum(2)
        states = F.pad(states, (0, 0, 0, 0, shift, 0))[:, :, : q.shape[2]]
        return (features(q)[..., None, :] * states).sum(-1)

    if shift:
        assert_refused(f, *qkv(), options=OFF)
    else:
        assert_rewritten(f, *qkv(), compiled=False)


def test_a_gate_that_is_one_at_first_stays_positive():
    def f(q, k, v):
        gate = torch.sigmoid(k[..., 0])
        gate = torch.cat([torch.ones_like(gate[..., :1]), gate[..., 1:]], -1)
        run = gate.log().cumsum(-1)
        return (q @ k.mT * (run[..., :, None] - run[..., None, :]).exp().tril()) @ v

    assert_rewritten(f, *qkv(), compiled=False)


# ---------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("hidden", [-1e9, torch.finfo(torch.float32).min, -2.0])
def test_a_number_that_stands_for_minus_infinity(hidden):
    """Where exp of it is 0 in every format; exp(-2) is a weight."""

    def f(q, k, v):
        run = F.logsigmoid(k[..., 0]).cumsum(-1)
        exponent = (run[..., :, None] - run[..., None, :]).masked_fill(distance(q.shape[2]) < 0, hidden)
        return (q @ k.mT * exponent.exp()) @ v

    assert_rewritten(f, *qkv(), count=2 if hidden == -2.0 else 1, compiled=False)  # of what comes later, too


# ---------------------------------------------------------------------------------------------------------- projections


@pytest.mark.parametrize("shift", [0, 2])
def test_projections_by_slices_of_one_parameter(shift):
    """One factor that is read at two places is no token: the products are taken as they are, with D features each."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, 12, 16, generator=generator)
    weight = torch.randn(H, 3, 16, D, generator=generator).requires_grad_()

    def f(x, weight):
        heads = []
        for h in range(H):
            q, k, v = (x @ weight[h, n] for n in range(3))
            heads.append((q @ k.mT * 0.5 ** distance(x.shape[1])).tril(-shift) @ v)
        return torch.cat(heads, -1)

    if shift:
        assert_refused(f, x, weight, options=OFF)
    else:
        report = assert_rewritten(f, x, weight, compiled=False)
        assert report.rewrites[0].dk == D


class Stacked(torch.nn.Module):
    """Retention over tokens, whose projections are parts of one parameter."""

    def __init__(self, heads: int = 1, keeps: float = 0.9):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(3, heads, 16, D, generator=generator) / 4)
        self.heads, self.keeps = heads, keeps

    def forward(self, x):
        heads = []
        for h in range(self.heads):
            state, out = x.new_zeros(B, D, D), []
            for t in range(x.shape[1]):
                q, k, v = (x[:, t : t + 1] @ w[h] for w in self.weight.unbind(0))
                state = self.keeps * state + k.mT @ v
                out.append(q @ state)
            heads.append(torch.cat(out, 1))
        return torch.cat(heads, -1)


@pytest.mark.parametrize(("heads", "length"), [(1, 4), (1, 12), (3, 12)])
def test_a_loop_that_projects_by_parts_of_one_parameter(heads, length):
    x = torch.randn(B, length, 16, generator=torch.Generator().manual_seed(1))
    report = assert_rewritten(Stacked(heads), x, compiled=False)
    assert not report.near_misses and f"H={heads} Dk={D}" in str(report)


def test_a_loop_that_projects_by_parts_of_one_parameter_and_grows():
    x = torch.randn(B, 12, 16, generator=torch.Generator().manual_seed(1))
    assert_refused(Stacked(keeps=1.1), x, options=OFF)


# --------------------------------------------------------------------------------------------------------------- chunks


class SplitBefore(torch.nn.Module):
    """Retention in chunks, which are made before the projections."""

    CHUNK = 4

    def __init__(self, order: str, keeps: float = 0.9**CHUNK, between: type[torch.nn.Module] = torch.nn.Identity):
        super().__init__()
        self.qkv, self.between, self.order, self.keeps = torch.nn.Linear(D, 3 * D), between(), order, keeps

    def forward(self, x):
        x = x.unflatten(1, (-1, self.CHUNK))
        x = x.transpose(0, 1) if self.order == "chunks first" else x
        qkv = self.between(self.qkv(x))
        q, k, v = (qkv.transpose(0, 1) if self.order == "chunks first" else qkv).chunk(3, -1)
        i = torch.arange(self.CHUNK)
        inner = (q @ k.mT * (0.9 ** distance(self.CHUNK)).tril()) @ v
        state, out = torch.zeros(B, D, D), []
        for c in range(q.shape[1]):
            out.append(inner[:, c] + q[:, c] @ state * (0.9 ** (i + 1))[:, None])
            state = self.keeps * state + k[:, c].mT @ (v[:, c] * (0.9 ** (self.CHUNK - 1 - i))[:, None])
        return torch.cat(out, 1)


@pytest.mark.parametrize("between", [torch.nn.Identity, torch.nn.SiLU, lambda: torch.nn.LayerNorm(3 * D)])
@pytest.mark.parametrize("order", ["as they are", "chunks first"])
def test_chunks_that_are_made_before_the_projections(order, between):
    x = torch.randn(B, 12, D, generator=torch.Generator().manual_seed(1))
    report = assert_rewritten(SplitBefore(order, between=between), x, compiled=False)
    assert not report.near_misses and "N=12 H=1" in str(report)


def test_chunks_that_are_made_before_the_projections_and_decay_otherwise():
    x = torch.randn(B, 12, D, generator=torch.Generator().manual_seed(1))
    assert_refused(SplitBefore("as they are", keeps=0.9**3), x, options=OFF)


@pytest.mark.parametrize("equation", ["bhte,rhem->bhtrm", "bhte,rhem->rbhtm", "bhte,rhem->brhtm"])
def test_chunks_that_each_head_projects_by_matrices_of_its_own(equation):
    """The heads' matrices are no window of the features, and the tokens may be in another dimension of the product."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, H, 12, 8, generator=generator).requires_grad_() for _ in range(3))
    weight = torch.nn.Parameter(torch.randn(3, H, 8, 6, generator=generator))
    of_matrices = equation.split(">")[1].index("r")

    def f(q, k, v, weight):
        state, out = torch.zeros(B, H, 6, 8), []
        for a, b, c in zip(*(x.split(4, 2) for x in (q, k, v)), strict=True):
            a, b = (torch.sigmoid(torch.einsum(equation, x, weight)).sum(of_matrices) for x in (a, b))
            out.append((a @ b.mT).tril() @ c + a @ state)
            state = state + b.mT @ c
        return torch.cat(out, 2)

    report = assert_rewritten(f, q, k, v, weight, compiled=False)
    assert not report.near_misses and "N=12 H=2 Dk=6" in str(report)


def in_place(keeps):
    """Chunks that are written into a tensor as long as the inputs."""

    def f(q, k, v):
        length, i = 4, torch.arange(4)
        state, out = torch.zeros(B, H, D, E), torch.zeros_like(v)
        own = (0.9 ** distance(length)).tril()
        for c in range(q.shape[2] // length):
            a, b, x = (t[:, :, c * length : (c + 1) * length] for t in (q, k, v))
            out[:, :, c * length : (c + 1) * length] = (a @ b.mT * own) @ x + a @ state * (0.9 ** (i + 1))[:, None]
            state = keeps * state + (b * (0.9 ** (length - 1 - i))[:, None]).mT @ x
        return out

    return f


def test_chunks_that_are_written_into_place_at_a_second_length():
    """How many chunks there are does not say how many tokens; the program is one of this length."""
    report = assert_rewritten(in_place(0.9**4), *qkv(16), after=qkv(12), compiled=False)
    assert "N=16" in str(report)


def test_chunks_that_are_written_into_place_where_the_last_is_not_whole():
    """What is behind the last whole chunk stays zero."""
    assert_rewritten(in_place(0.9**4), *qkv(18), after=qkv(12), count=0, compiled=False)


def test_chunks_that_are_written_into_place_and_decay_otherwise():
    assert_rewritten(in_place(0.9**3), *qkv(16), after=qkv(12), count=0, compiled=False)


@pytest.mark.parametrize("hidden", [float("-inf"), float("inf")])
def test_a_mask_that_is_compared_with_minus_infinity_at_any_length(hidden):
    def f(q, k, v):
        seen = (torch.triu(torch.ones(q.shape[2], q.shape[2])) == 1).transpose(0, 1)
        added = seen.float().masked_fill(seen == 0, float("-inf"))
        scores = (q.exp() @ k.exp().mT).masked_fill(added == hidden, 0)
        return scores / scores.sum(-1, keepdim=True).clamp(min=1e-6) @ v

    hides = hidden < 0  # else nothing is hidden
    assert_rewritten(f, *qkv(), after=qkv(16), count=2 if hides else 0, compiled=False)


# --------------------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("before", [1, 2])
def test_a_state_to_which_the_token_before_is_added_too(before):
    """The trapezoidal rule: what the token before brings decays once, and is weighed by numbers of the later one."""

    def f(q, k, v, gates):
        decay, early, own = torch.sigmoid(gates).unbind(0)
        state, added, out = torch.zeros(B, H, D, E), [torch.zeros(B, H, D, E)] * before, []
        for t in range(q.shape[2]):
            update = k[:, :, t, :, None] * v[:, :, t, None, :]
            keep, share, now = (x[:, :, t, None, None] for x in (decay, early, own))
            state = keep * state + share * added[-before] + now * update
            added.append(update)
            out.append((q[:, :, t, :, None] * state).sum(-2))
        return torch.stack(out, 2)

    gates = torch.randn(3, B, H, 12, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert_rewritten(f, *qkv(), gates, compiled=False, count=before == 1)


@pytest.mark.parametrize("decay", ["a number", "gates"])
@pytest.mark.parametrize(
    "weight",
    [torch.exp, lambda i: (i / 2).exp(), lambda i: (-0.3 * i).exp(), torch.exp2, lambda i: (-i.square() / 2).exp()],
)
def test_an_exponential_input_gate(weight, decay):
    def f(q, k, v, i, g):
        state, out = torch.zeros(B, H, D, E), []
        for t in range(q.shape[2]):
            keep = 0.9 if decay == "a number" else torch.sigmoid(g[:, :, t])[..., None, None]
            own = weight(i[:, :, t])[..., None, None]
            state = keep * state + own * (k[:, :, t, :, None] * v[:, :, t, None, :])
            out.append((q[:, :, t, :, None] * state).sum(-2))
        return torch.stack(out, 2)

    i, g = torch.randn(2, B, H, 12, generator=torch.Generator().manual_seed(1)).requires_grad_().unbind(0)
    assert_rewritten(f, *qkv(), i.detach().requires_grad_(), g.detach().requires_grad_(), compiled=False)


class Step(torch.nn.Module):
    """Projections without a bias in a loop over tokens, some of them scaled."""

    def __init__(self, scale, keeps=0.9):
        super().__init__()
        self.q, self.k, self.v = (torch.nn.Linear(16, D, bias=False) for _ in range(3))
        self.scale, self.keeps = scale, keeps

    def forward(self, x):
        state, out = x.new_zeros(B, D, D), []
        for t in range(x.shape[1]):
            q, k, v = self.scale(self.q(x[:, t]), self.k(x[:, t]), self.v(x[:, t]))
            state = self.keeps * state + k[:, :, None] * v[:, None]
            out.append((q[:, None] @ state)[:, 0])
        return torch.stack(out, 1)


SCALES = {
    "queries": lambda q, k, v: (q * D**-0.5, k, v),
    "keys": lambda q, k, v: (q, k * D**-0.5, v),
    "values": lambda q, k, v: (q, k, v / 3),
    "all": lambda q, k, v: (-q / 2, k * 0.7, -v * 1.5),
}


@pytest.mark.parametrize("name", SCALES)
def test_projections_that_a_step_scales(name):
    x = torch.randn(B, 12, 16, generator=torch.Generator().manual_seed(1))
    report = assert_rewritten(Step(SCALES[name]), x, compiled=False)
    assert not report.near_misses and f"N=12 H=1 Dk={D}" in str(report)


def test_projections_that_a_step_scales_and_a_state_that_grows():
    x = torch.randn(B, 12, 16, generator=torch.Generator().manual_seed(1))
    assert_refused(Step(SCALES["keys"], keeps=1.1), x, options=OFF)


# -------------------------------------------------------------------------------------------------------------- reports


def test_nothing_is_told_of_what_is_computed_no_more():
    """Each chunk divides by a sum of its own, written into place: behind the rewrite none of these is left."""

    def f(q, k, v):
        q, k = (x.exp().unflatten(2, (-1, 4)) for x in (q, k))
        v, total, state = v.unflatten(2, (-1, 4)), torch.zeros(B, H, 4, D), torch.zeros(B, H, D, E)
        out = torch.zeros_like(v)
        for n in range(v.shape[2]):
            a, b, c = q[:, :, n], k[:, :, n], v[:, :, n]
            total = total[:, :, -1:] + b.cumsum(2)
            out[:, :, n] = ((a @ b.mT).tril() @ c + a @ state) / (a * total).sum(-1, keepdim=True)
            state = state + b.mT @ c
        return out.flatten(2, 3)

    report = assert_rewritten(f, *qkv(), count=2, compiled=False)
    assert not report.near_misses


def test_a_length_that_is_a_quotient_by_another_one():
    def f(q):
        b, h, n, d = q.shape
        x = q.view(b, h, n // 16, 16, d).transpose(1, 2).reshape(b * (n // 16), h, 16, -1)
        x = x.view(x.shape[0], h, x.shape[2] // 4, 4, -1) * 2
        return x.view(b, n // 16, h, 16, -1).transpose(1, 2).reshape(b, h, n, -1)

    long, short = (torch.randn(2, 4, n, 8).requires_grad_() for n in (48, 32))
    report = assert_rewritten(f, long, after=[short], count=0, compiled=False)
    assert "internal-error" not in str(report)


# ------------------------------------------------------------------------------------------------------------ features


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_chunks_of_exponential_features(scale):
    """Queries and keys are weights there, and the state has one factor; what it decays by is a weight too."""

    def f(q, k, v):
        i = torch.arange(4)
        own = (0.9 ** distance(4)).tril()
        q, k, state, out = (q * scale).exp(), k.exp(), torch.zeros(B, H, D, E), []
        for a, b, c in zip(*(x.split(4, 2) for x in (q, k, v)), strict=True):
            out.append((a @ b.mT * own) @ c + a @ state * (0.9 ** (i + 1))[:, None])
            state = 0.9**4 * state + (b * (0.9 ** (3 - i))[:, None]).mT @ c
        return torch.cat(out, 2)

    assert_rewritten(f, *qkv(), compiled=False)


def in_pairs(x, start=0):
    """Each pair of features turned by its position, and put beside each other again."""
    angle = torch.arange(start, start + x.shape[-2])[:, None] * 0.1 ** torch.arange(D // 2)
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1).flatten(-2)


def all_at_once(q, k, v, state):
    q, k = in_pairs(q), in_pairs(k)
    states = (k[..., None] * v[..., None, :]).cumsum(2) + state[:, :, None]
    return torch.einsum("bhnd,bhnde->bhne", q, states)


def before_the_loop(q, k, v, state):
    q, k, out = in_pairs(q), in_pairs(k), []
    for t in range(q.shape[2]):
        state = 0.9 * state + k[:, :, t, :, None] * v[:, :, t, None]
        out.append((q[:, :, t, None] @ state)[:, :, 0])
    return torch.stack(out, 2)


def in_the_step(q, k, v, state):
    out = []
    for t in range(q.shape[2]):
        a, b = (in_pairs(x[:, :, t : t + 1], t)[:, :, 0] for x in (q, k))
        state = 0.9 * state + b[..., None] * v[:, :, t, None]
        out.append((a[:, :, None] @ state)[:, :, 0])
    return torch.stack(out, 2)


@pytest.mark.parametrize("form", [all_at_once, before_the_loop, in_the_step])
def test_turned_pairs_of_features_and_a_given_state(form):
    """What a state is read by is a feature, and not the quotient and the remainder of one."""
    state = torch.randn(B, H, D, E, generator=torch.Generator().manual_seed(1)).requires_grad_()
    report = assert_rewritten(form, *qkv(), state, compiled=False)
    assert not report.near_misses and f"N=12 H={H} Dk={D}" in str(report)


def test_turned_pairs_in_a_step_and_a_state_that_grows_once():
    """Whichever angles a step turns by, its keys are those of the token: it is the decay that is none."""

    def f(q, k, v):
        state, out = torch.zeros(B, H, D, E), []
        for t in range(q.shape[2]):
            a, b = (in_pairs(x[:, :, t : t + 1], t * t)[:, :, 0] for x in (q, k))
            state = (0.9 if t != 5 else 1.1) * state + b[..., None] * v[:, :, t, None]
            out.append((a[:, :, None] @ state)[:, :, 0])
        return torch.stack(out, 2)

    assert_refused(f, *qkv(), options=OFF)


class Turned(torch.nn.Module):
    """Chunks whose projections are made and turned in the step."""

    def __init__(self, masked: str):
        super().__init__()
        self.project, self.masked = torch.nn.ModuleList(torch.nn.Linear(8, H * D) for _ in range(3)), masked

    def forward(self, x):
        state, out = torch.zeros(B, H, D, D), []
        total = torch.zeros(H, 4).cumsum(-1)
        weights = (total[:, :, None] - total[:, None]).masked_fill(distance(4) < 0, float("-inf")).exp()
        for n in range(0, x.shape[1], 4):
            q, k, v = (p(x[:, n : n + 4]).view(B, 4, H, D).transpose(1, 2) for p in self.project)
            q, k = in_pairs(q, n), in_pairs(k, n)
            scores = q @ k.mT
            out.append((scores.tril() if self.masked == "tril" else scores * weights) @ v + q @ state)
            state = state + k.mT @ v
        return torch.cat(out, 2)


@pytest.mark.parametrize("masked", ["tril", "weights"])
def test_turned_pairs_in_a_step_of_chunks(masked):
    """A mask of ones, as wide as a chunk is long, is no table of angles."""
    torch.manual_seed(0)
    x = torch.randn(B, 12, 8, generator=torch.Generator().manual_seed(1))
    report = assert_rewritten(Turned(masked), x, compiled=False)
    assert not report.near_misses and f"N=12 H={H}" in str(report)


@pytest.mark.parametrize("length", [12, 13, 14])
def test_a_last_chunk_of_one_token(length):
    """A layer's own projections of the last chunk have one token, in the dimension that others have four in."""
    torch.manual_seed(0)
    project = torch.nn.ModuleList(torch.nn.Linear(8, H * D) for _ in range(3))

    class Chunks(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.project, self.rate = project, torch.nn.Parameter(torch.rand(H))

        def forward(self, x):
            state, out = torch.zeros(B, H, D, D), []
            for c in x.split(4, 1):
                q, k, v = (p(c).view(B, -1, H, D).transpose(1, 2).softmax(-1) for p in self.project)
                total = F.logsigmoid(self.rate)[:, None].expand(H, c.shape[1]).cumsum(-1)
                own = (total[:, :, None] - total[:, None]).exp().tril()
                out.append((q @ k.mT * own) @ v + q * total.exp()[..., None] @ state)
                left = (total[:, -1:] - total).exp()[..., None]
                state = total[:, -1].exp()[:, None, None] * state + (k * left).mT @ v
            return torch.cat(out, 2)

    x = torch.randn(B, length, 8, generator=torch.Generator().manual_seed(1))
    report = assert_rewritten(Chunks(), x, compiled=False)
    assert f"N={length} H={H}" in str(report)
