"""Symbolic sizes: what is rewritten once is right for every length, and no guard is added.

Each program is compiled for one length and called with others: shorter than a chunk, around one, and a single token,
for which Dynamo compiles anew. Outputs and gradients are compared with fp64. Validation is off: it sees one length.
"""

from __future__ import annotations

import pytest
import torch

import lacompile
from lacompile.backend import decide
from lacompile.options import Options
from lacompile.passes.lift.domain.affine import Aff
from lacompile.passes.lift.domain.evaluate import Evaluator
from lacompile.passes.lift.domain.space import Space
from lacompile.testing.budgets import check_error, relative_error

from . import loops, twins  # noqa: F401  (they register their programs)
from .forms import LOOPS, PARALLEL, TWINS, B, D, E, H

OPTIONS = Options.split({"validate": "off"})[0]
SPLIT = [D, D, E]
MANY = "batch, heads and length"
FORMS = [
    ("where_exp", "all"),
    ("merged_heads", MANY),
    ("cumsum_exponent", "length"),
    ("undecayed", "length"),
    ("cumulative_outer_products", "all"),
    ("batched_chunks", MANY),
    ("chunked_prefix_ragged", "length"),
]
"""A part of what is rewritten, since symbolic sizes are slow in PyTorch itself."""
EVENLY = ("batched_chunks",)  # chunks of eight tokens, and no padding
UNROLLED = ("wrong_block_decay", "state_before_two_updates", "decay_per_channel")  # each length is a program of its own


def arguments(length, batch=B, heads=H):
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(batch, heads, length, sum(SPLIT), generator=generator)
    return [x.requires_grad_(), torch.linspace(0.02, 0.4, heads).requires_grad_()]


def of_one_input(form):
    """Queries, keys and values of one length, as they come from one projection."""

    def program(x, slope):
        return form(*x.split(SPLIT, -1), slope)

    return program


def run(f, args, dtype=torch.float32, symbolic="all"):
    leaves = marked([x.detach().to(dtype).requires_grad_() for x in args], symbolic)
    out = f(*leaves)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True, materialize_grads=True)]


def compiled(f, symbolic):
    """The rewritten program, run as it is, and the report of each graph."""
    reports = []

    def backend(gm, example_inputs):
        decision = decide(gm, example_inputs, OPTIONS)
        reports.append(decision.report)
        return (decision.rewritten or gm).forward

    torch._dynamo.reset()
    return torch.compile(f, backend=backend, fullgraph=True, dynamic=True if symbolic == "all" else None), reports


def marked(args, symbolic):
    for d in {"length": [2], MANY: [0, 1, 2], "all": []}[symbolic]:
        torch._dynamo.maybe_mark_dynamic(args[0], d)
    return args


def compilations(f, symbolic, sizes):
    """How often Dynamo compiles the program by itself."""
    count = []
    torch._dynamo.reset()
    made = torch.compile(
        f,
        backend=lambda gm, _: count.append(1) or gm.forward,
        fullgraph=True,
        dynamic=True if symbolic == "all" else None,
    )
    for n in sizes:
        made(*marked(arguments(*n), symbolic))
    return len(count)


def check(form, symbolic, sizes):
    f = of_one_input(form)
    made, reports = compiled(f, symbolic)
    for n in sizes:
        args = arguments(*n)
        got, eager, exact = run(made, args, symbolic=symbolic), run(f, args), run(f, args, torch.float64)
        of_eager = max(relative_error(x, y) for x, y in zip(eager, exact, strict=True))
        for kind, x, y in zip(("output", "gradient", "gradient"), got, exact, strict=True):
            check_error(f"{kind} at {n}", x, y, eager=of_eager, kind=kind, dtype=torch.float32)
    # one token has no sum over earlier ones: Dynamo compiles for it apart, and there may be nothing to rewrite
    assert [len(r.rewrites) for r in reports[:1]] == [1], "\n".join(map(str, reports))
    assert len(reports) == compilations(f, symbolic, sizes)


OTHERS = {"length": [(13,), (7,)], MANY: [(29, 4, 5), (12,)], "all": [(29, 3, 4), (1,)]}


@pytest.mark.parametrize(("name", "symbolic"), FORMS)
def test_form(name, symbolic):
    sizes = [(40,), (16,)] if name in EVENLY else [(40,), *OTHERS[symbolic]]
    check((PARALLEL | LOOPS)[name], symbolic, sizes)


def test_one_head():
    """Attentions of one head are looked at for joining, their symbolic features too."""
    check(PARALLEL["where_exp"], "all", [(40, B, 1), (13, B, 1)])


@pytest.mark.parametrize("name", [n for n in TWINS if n not in UNROLLED])
def test_twin(name):
    made, reports = compiled(of_one_input(TWINS[name][0]), MANY)
    made(*marked(arguments(24), MANY))
    assert not any(r.rewrites for r in reports), "\n".join(map(str, reports))


def test_a_view_of_symbolic_sizes_and_its_inverse_cancel():
    space = Space()
    h, k = (Aff.var(space.symbol(1, 9)) for _ in range(2))
    i, j = Aff.var(0), Aff.var(1)
    whole = space.join(i, j, h)
    assert (space.quotient(whole, h), space.remainder(whole, h)) == (i, j)
    assert space.join(space.quotient(i, h), space.remainder(i, h), h) == i
    both = space.times(h, k)
    assert space.divided(both, h) == k and space.divided(both, h + 1) is None
    for n in range(200):
        sizes = {h.terms[0][0]: 1 + n % 7, k.terms[0][0]: 1 + n % 5, both.terms[0][0]: (1 + n % 7) * (1 + n % 5)}
        evaluator = Evaluator(space, lambda leaf, idx: 0.0, sizes)
        env = {0: n % 11, 1: n % sizes[both.terms[0][0]]}
        x, y = space.join(i, j, both), space.join(i, space.remainder(j, h), h)
        for form, by in ((x, h), (y, both)):
            number, size = evaluator.index(form, env), evaluator.index(by, env)
            assert evaluator.index(space.quotient(form, by), env) == number // size
            assert evaluator.index(space.remainder(form, by), env) == number % size
        assert evaluator.index(x, env) == env[0] * sizes[both.terms[0][0]] + env[1]


# ------------------------------------------------------------------------------------ numbers that are arguments

DISTANCES = torch.arange(7)[:, None] - torch.arange(7)
DECAY = torch.exp(-0.1 * DISTANCES.double()).tril()


def weights_of(make):
    """The scores times what is made of a number, and of the scores' dtype."""
    return lambda q, k, v, n: (q @ k.mT * make(n)) @ v


NUMBERS = {
    "window": weights_of(lambda n: DECAY.triu(1 - n)),
    "diagonal": weights_of(lambda n: torch.ones(7, 7, dtype=torch.float64).tril(n - 9)),
    "slope": weights_of(lambda n: torch.exp(-torch.tensor(1.0 / n, dtype=torch.float64) * DISTANCES).tril()),
    "power": weights_of(lambda n: (torch.tensor(n / 16, dtype=torch.float64) ** DISTANCES.clamp(min=0)).tril()),
    "alpha": weights_of(lambda n: torch.add(DECAY, DECAY, alpha=n - 8)),
    "value": weights_of(lambda n: torch.addcmul(torch.zeros_like(DECAY), DECAY, DECAY, value=n)),
    "full": weights_of(lambda n: DECAY * torch.full((), n - 8.0, dtype=torch.float64)),
    "bounded": weights_of(lambda n: torch.exp(-0.1 * DISTANCES.clamp(max=n).double()).tril()),
    "where": weights_of(lambda n: torch.where(DISTANCES >= 0, n, 0).double()),
    "line": weights_of(lambda n: torch.exp(-_gaps(torch.linspace(0, n, 7, dtype=torch.float64))).tril()),
    "baddbmm": lambda q, k, v, n: torch.baddbmm(v, q @ k.mT * DECAY, v, beta=n, alpha=n),
    "gate": lambda q, k, v, n: _gated(q, k, v, v[..., 0].clamp(n - 8.5, 1.0)),
}


def _gaps(at):
    return at[:, None] - at


def _gated(q, k, v, gate):
    state, out = q.new_zeros(2, 3, 3), []
    for t in range(q.shape[1]):
        state = gate[:, t, None, None] * state + k[:, t, :, None] * v[:, t, None]
        out.append((q[:, t, None] @ state)[:, 0])
    return torch.stack(out, 1)


@pytest.mark.parametrize("symbolic", ["length", "all"], ids=["from the second call on", "at once"])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_is_not_that_of_the_first_call(name, symbolic):
    program = NUMBERS[name]
    made, _ = compiled(program, symbolic)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 7, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    for n in (8, 9, 3, 5, 2):
        assert relative_error(made(q, k, v, n), program(q, k, v, n)) < 1e-12, n


def scaled_by_data(q, k, v, x):
    return (q @ k.mT).tril() @ v * x.sum().item()


def beside_as_many_zeros_as_data_says(q, k, v, x):
    n = x.max().int().item()
    torch._check(n >= 0)
    return (q @ k.mT).tril() @ v, torch.zeros(n)


def nothing_to_rewrite(q, k, v, x):
    return (q @ k.mT).softmax(-1) @ v * x.sum().item()


@pytest.mark.parametrize("program", [scaled_by_data, beside_as_many_zeros_as_data_says, nothing_to_rewrite])
@torch._dynamo.config.patch(capture_scalar_outputs=True)
def test_numbers_that_data_says(program):
    """The analysis makes symbols of its own for them, which no result of the program has."""
    q, k, v = torch.randn(3, 1, 2, 8, 4, generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    made = torch.compile(program, backend="lightning", fullgraph=True)
    for x in (torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])):
        torch.testing.assert_close(made(q, k, v, x), program(q, k, v, x))
    report = lacompile.last_report()
    assert report is not None and len(report.rewrites) == (program is not nothing_to_rewrite)
    assert "internal" not in str(report)
