"""The normal form of a tensor has the tensor's values: every rule, checked by numbers at sampled indices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lacompile.passes.lift.domain.evaluate import Evaluator
from lacompile.passes.lift.domain.kinds import Argument, Extended, Opaque, Positions, Symbol, Table
from lacompile.passes.lift.interpret import Interpreter

B, H, N, D = 2, 3, 24, 4
CHUNK = 8


def weights(slope, positions):
    distance = positions[:, None] - positions[None, :]
    return torch.where(distance >= 0, torch.exp(-slope[:, None, None] * distance), 0.0)


def parallel(q, k, v, slope):
    return (q @ k.transpose(-1, -2) * weights(slope, torch.arange(N))) @ v


def three_operands(q, k, v, slope):
    return torch.einsum("bhid,bhjd,hij,bhje->bhie", q, k, weights(slope, torch.arange(N)), v)


def masked_exponent(q, k, v, slope):
    distance = torch.arange(N)[:, None] - torch.arange(N)[None, :]
    mask = (-slope[:, None, None] * distance).masked_fill(distance < 0, float("-inf")).exp()
    return (q @ k.transpose(-1, -2) * mask) @ v


def recurrent(q, k, v, slope):
    state, out = q.new_zeros(B, H, D, D), []
    for t in range(N):
        state = state * torch.exp(-slope)[:, None, None] + k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append((q[:, :, t, :, None] * state).sum(-2))
    return torch.stack(out, 2)


def recurrent_by_number(q, k, v, slope):
    state, out = q.new_zeros(B, H, D, D), []
    for t in range(N):
        state = 0.9 * state + k[:, :, t, :, None] @ v[:, :, t, None, :]
        out.append((q[:, :, t, None, :] @ state)[:, :, 0])
    return torch.stack(out, 2)


def chunkwise(q, k, v, slope):
    s, i = slope[:, None, None], torch.arange(CHUNK)
    inner = weights(slope, i)
    q_decay, k_decay = torch.exp(-s * (i[:, None] + 1)), torch.exp(-s * (CHUNK - 1 - i[:, None]))
    state, out = q.new_zeros(B, H, D, D), []
    for c in range(N // CHUNK):
        qc, kc, vc = (x[:, :, c * CHUNK : (c + 1) * CHUNK] for x in (q, k, v))
        out.append((qc @ kc.transpose(-1, -2) * inner) @ vc + (qc * q_decay) @ state)
        state = state * torch.exp(-s * CHUNK) + (kc * k_decay).transpose(-1, -2) @ vc
    return torch.cat(out, 2)


def normalised(q, k, v, slope):
    state, total, out = 0, 0, []
    for t in range(N):
        s, k_t = torch.exp(-slope)[:, None], k[:, :, t].exp()
        state = state * s[..., None] + k_t[..., None] * v[:, :, t, None, :]
        total = total * s + k_t
        out.append((q[:, :, t, None, :] @ state)[:, :, 0] / (q[:, :, t] * total).sum(-1, keepdim=True).square().add(1))
    return torch.stack(out, 2)


def per_token(q, k, v, slope):
    run = -(slope[None, :, None] * v[..., 0].abs()).cumsum(-1)
    mask = (run[..., :, None] - run[..., None, :]).tril().exp().tril()
    return (q @ k.transpose(-1, -2) * mask) @ v


def undecayed(q, k, v, slope):
    return (q @ k.transpose(-1, -2)).tril() @ v


def shifted_by_one(q, k, v, slope):
    distance = torch.arange(N)[:, None] - torch.arange(N)[None, :]
    mask = torch.where(distance > 0, torch.exp(-slope[:, None, None] * distance), 0.0)
    return (q @ k.transpose(-1, -2) * mask) @ v


def symmetric(q, k, v, slope):
    distance = (torch.arange(N)[:, None] - torch.arange(N)[None, :]).abs()
    return (q @ k.transpose(-1, -2) * torch.exp(-slope[:, None, None] * distance)) @ v


def windowed(q, k, v, slope):
    distance = torch.arange(N)[:, None] - torch.arange(N)[None, :]
    inside = (distance >= 0) & (distance < 5)
    return (q @ k.transpose(-1, -2) * torch.exp(-slope[:, None, None] * distance) * inside) @ v


def padded_gates(q, k, v, slope):
    """Some tokens of the last chunk are not there: their decay is 1, whose logarithm is 0."""
    gates = torch.nn.functional.pad(v[:, :, 3:, 0].sigmoid(), (0, 3), value=1.0)
    run = gates.reshape(B, H, -1, CHUNK).log().cumsum(-1)
    return (run[..., :, None] - run[..., None, :]).tril().exp().tril()


def divided_by_row_sums(q, k, v, slope):
    scores = (q.sigmoid() @ k.sigmoid().transpose(-1, -2) * weights(slope, torch.arange(N))).tril()
    return (scores / scores.sum(-1, keepdim=True)) @ v


def weights_divided_by_row_sums(q, k, v, slope):
    weight = weights(slope, torch.arange(N))
    return (q @ k.transpose(-1, -2) * torch.nan_to_num(weight / weight.sum(-1, keepdim=True).sqrt())) @ v


ONE_TERM = [
    parallel,
    three_operands,
    masked_exponent,
    recurrent,
    recurrent_by_number,
    normalised,
    chunkwise,
    per_token,
    undecayed,
]
TWINS = [shifted_by_one, symmetric, windowed]
OTHERS = [padded_gates, divided_by_row_sums, weights_divided_by_row_sums]


def lifted(fn, inputs):
    found = []

    def backend(gm, example_inputs):
        interpreter = Interpreter()
        interpreter.run(gm, example_inputs)
        found.append((gm, interpreter))
        return gm.forward

    torch._dynamo.reset()
    out = torch.compile(fn, backend=backend, fullgraph=True)(*inputs)
    return out, *found[0]


class Values:
    """Numbers of the leaves, read from an ordinary run of the graph."""

    def __init__(self, gm, interpreter, inputs):
        recorder = _Recorder(gm)
        recorder.run(*inputs)
        self.held, self.leaves = recorder.held, interpreter.engine.leaves
        self.evaluator = Evaluator(interpreter.engine.space, self.read)

    def read(self, leaf, idx):
        kind = self.leaves[leaf].kind
        if isinstance(kind, Table):
            return float(kind.array[idx])
        if isinstance(kind, Positions):
            return float(idx[0])
        if isinstance(kind, Extended):
            inside = all(0 <= i < n.const for i, n in zip(idx, self.leaves[kind.of].shape, strict=True))
            return self.read(kind.of, idx) if inside else 0.0
        if isinstance(kind, Symbol):
            args, start = [], 0
            for a in kind.args:
                if isinstance(a, Argument):
                    args.append(torch.tensor(self.read(a.leaf, idx[start : start + a.rank]), dtype=torch.float64))
                    start += a.rank
                else:
                    args.append(a)
            return float(kind.op(*args, **dict(kind.kwargs)))
        assert isinstance(kind, Opaque)
        if kind.node is None and kind.reading is not None:
            return self.evaluator.value(kind.reading, idx)
        assert kind.node is not None
        return float(self.held[kind.node][idx])


class _Recorder(torch.fx.Interpreter):
    def __init__(self, gm):
        super().__init__(gm, garbage_collect_values=False)
        self.held = {}

    def run_node(self, n):
        self.held[n] = super().run_node(n)
        return self.held[n]


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, H, N, D, dtype=torch.float64) for _ in range(3))
    return q, k, v, torch.rand(H, dtype=torch.float64) * 0.3 + 0.01


@pytest.mark.parametrize("fn", [*ONE_TERM, *TWINS, *OTHERS], ids=lambda f: f.__name__)
def test_every_value_is_what_the_program_computes(fn, inputs):
    _, gm, interpreter = lifted(fn, inputs)
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    by_name = dict(zip(("q", "k", "v", "slope"), inputs, strict=True))
    ordered = [by_name[n.name.removeprefix("l_").rstrip("_")] for n in placeholders]
    values = Values(gm, interpreter, ordered)
    evaluator = values.evaluator
    rng, checked = np.random.default_rng(1), 0
    structured = [f for f in interpreter.known.values() if interpreter.engine.structured(f.value)]
    for fact in structured[-12:]:
        actual = values.held[fact.node]
        for _ in range(4):
            at = tuple(int(rng.integers(n)) for n in actual.shape)
            assert evaluator.value(fact.value, at) == pytest.approx(float(actual[at]), rel=1e-9, abs=1e-12), fact.node
            checked += 1
    assert checked >= 4


def test_functions_of_more_positions_than_a_table_holds(inputs, monkeypatch):
    def mean(q, k, v, slope):
        rows, keys = torch.arange(1, N + 1)[:, None], torch.arange(N).double().add(0.5).sqrt()
        return ((q @ k.transpose(-1, -2)).tril() / rows * keys * slope[:, None, None]) @ v

    for module in ("tables", "symbols"):
        monkeypatch.setattr(f"lacompile.passes.lift.engine.{module}.MAX_TABLE", 2)
    test_every_value_is_what_the_program_computes(mean, inputs)
    _, _, interpreter = lifted(mean, inputs)
    leaves = interpreter.engine.leaves
    assert any(isinstance(leaves[n].kind, Positions) for n in range(len(leaves)))


@pytest.mark.parametrize("fn", ONE_TERM, ids=lambda f: f.__name__)
def test_one_computation_is_one_term_however_it_is_written(fn, inputs):
    _, _, interpreter = lifted(fn, inputs)
    fact = interpreter.known[[*interpreter.demanded][-1]]
    assert len(fact.value.terms) == 1
    (term,) = fact.value.terms
    assert len(term.guards) == 4  # 0 <= j <= i and the feature range


@pytest.mark.parametrize("fn", TWINS, ids=lambda f: f.__name__)
def test_a_near_twin_has_another_form(fn, inputs):
    _, _, interpreter = lifted(parallel, inputs)
    wanted = interpreter.known[[*interpreter.demanded][-1]].value
    _, _, other = lifted(fn, inputs)
    assert repr(other.known[[*other.demanded][-1]].value.cases) != repr(wanted.cases)


def test_the_form_of_a_chunk_loop_does_not_grow_with_the_loop(inputs):
    _, _, interpreter = lifted(chunkwise, inputs)
    assert max(len(c.terms) for f in interpreter.known.values() for c in f.value.cases) <= 3
