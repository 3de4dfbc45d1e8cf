"""Work that grows with the graph and no faster: counted in lines of this package that run, never in seconds."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import lacompile
from lacompile import decision
from lacompile.options import Options

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import programs

ROOT = str(Path(lacompile.__file__).parent)
ABOUT_MATCHES = (
    *("decision.py", "report.py", "passes/graph/", "passes/check/", "passes/rewrite/"),
    *("passes/lift/match.py", "passes/lift/recipes/builder.py"),
    *("passes/lift/recipes/states.py", "passes/lift/recipes/assumptions.py", "passes/lift/recipes/emit/"),
)
"""What runs for each match, which is a small part of all: a walk over the graph for each of them would not be seen."""


def lines_of(run):
    """The lines of this package that ``run`` executes, by file; one that a loop comes back to counts again."""
    counts, counters = {}, {}

    def counter_for(path):
        if not path.startswith(ROOT):
            return None
        cell = counts.setdefault(Path(path).relative_to(ROOT).as_posix(), [0])

        def local(frame, event, arg):
            if event == "line":
                cell[0] += 1
            return local

        return local

    def entered(frame, event, arg):
        path = frame.f_code.co_filename
        if path not in counters:
            counters[path] = counter_for(path)
        return counters[path]

    before = sys.gettrace()
    sys.settrace(entered)
    try:
        run()
    finally:
        sys.settrace(before)
    return Counter({name: cell[0] for name, cell in counts.items()})


def work(program):
    """Nodes of the program's graph, rewrites, and lines: all, and those about matches."""
    found = {}

    def decide(gm, example_inputs):
        made = []
        lines = lines_of(lambda: made.append(decision.decide(gm, example_inputs, Options())))
        found["nodes"], found["rewrites"] = len(gm.graph.nodes), len(made[0].report.rewrites)
        found["all"] = sum(lines.values())
        found["matches"] = sum(n for file, n in lines.items() if file.startswith(ABOUT_MATCHES))

    programs.dynamo_graph(program, decide)
    return found


def written_in_place(tokens):
    """A recurrence whose outputs are written into an empty tensor."""

    def f(q, k, v, g):
        state, out = q.new_zeros(1, 2, 8, 8), torch.empty_like(v)
        for t in range(tokens):
            state = state * g[:, :, t, None, None].exp() + k[:, :, t, :, None] * v[:, :, t, None, :]
            out[:, :, t] = (q[:, :, t, None] @ state)[:, :, 0]
        return out

    return f, (*programs.sequences(tokens), -torch.rand(1, 2, tokens))


def delta_rule(tokens):
    """A state that its own update reads."""

    def f(q, k, v, b):
        state, out = q.new_zeros(1, 2, 8, 8), []
        for t in range(tokens):
            new = (v[:, :, t] - (k[:, :, t, :, None] * state).sum(-2)) * b[:, :, t, None]
            state = state + k[:, :, t, :, None] * new[:, :, None]
            out.append((q[:, :, t, None] @ state)[:, :, 0])
        return torch.stack(out, 2)

    return f, (*programs.sequences(tokens), torch.rand(1, 2, tokens))


FAMILIES = ("token loop", "chunk loop", "batched scans", "softmax transformer")
BUILD = {name: (f.build, f.matches, f.nodes) for name, f in programs.FAMILIES.items() if name in FAMILIES}
BUILD["written in place"] = (written_in_place, True, 12)
BUILD["delta rule"] = (delta_rule, False, 8)


@pytest.mark.parametrize("name", list(BUILD))
def test_work_is_linear_in_the_graph(name):
    build, matches, nodes = BUILD[name]
    count = max(2, round(40 / nodes))
    small, middle, large = (work(build(count * n)) for n in (1, 2, 4))
    assert bool(large["rewrites"]) is matches
    assert large["nodes"] > 3 * small["nodes"]
    for what in ("all", "matches"):
        first, second = ((b[what] - a[what]) / (b["nodes"] - a["nodes"]) for a, b in ((small, middle), (middle, large)))
        assert second <= 1.1 * first + 5, f"{what}: {first:.0f} lines for a node, then {second:.0f}"


def in_the_middle(attentions, layers):
    """Some attentions of one value, and layers of something else before them and behind."""

    def f(x):
        future = torch.ones(x.shape[2], x.shape[2], dtype=torch.bool).triu(1)
        for _ in range(layers):
            x = torch.relu(x) + 1
        out = x
        for n in range(attentions):
            out = out + (((x * (n + 2)).sin() @ x.cos().mT).masked_fill(future, 0) @ x.tanh()).tanh()
        for _ in range(layers):
            out = torch.relu(out) + 1
        return out

    return f, (torch.randn(1, 2, 12, 4),)  # one head each would be joined


def walks(attentions=(1, 5), layers=(4, 40)):
    """Lines that each further attention costs for each further node of the graph around it."""
    few, many = ([work(in_the_middle(a, n)) for a in attentions] for n in layers)
    assert [w["rewrites"] for w in (*few, *many)] == [*attentions, *attentions]
    more = [w[1]["matches"] - w[0]["matches"] for w in (few, many)]
    return (more[1] - more[0]) / (attentions[1] - attentions[0]) / (many[0]["nodes"] - few[0]["nodes"])


def test_no_match_costs_a_walk_over_the_graph_around_it():
    assert walks() < 0.1


def test_such_a_walk_would_be_seen(monkeypatch):
    def walking(schedule, match, settled=decision.settled):
        walk = compile("for _ in schedule.nodes: pass", f"{ROOT}/passes/check/legality.py", "exec")
        exec(walk, {"schedule": schedule})
        return settled(schedule, match)

    monkeypatch.setattr(decision, "settled", walking)
    assert walks() > 0.9
