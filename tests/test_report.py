"""Reports name the place, say what was done and why not, add up, and go to the log."""

from __future__ import annotations

import inspect
import json
import logging
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import fx

import lacompile
from lacompile import _compat, explain, report
from lacompile.passes.facts import Refusal
from lacompile.report import NearMiss, Report, Rewrite, Source
from lacompile.testing import qkv

REWRITE = Rewrite(
    source=Source("model.py", 12, "return scores @ v", "layers.0.attention"),
    formulation="chunkwise",
    length="512",
    heads="4",
    dk=16,
    dv=32,
    dtype="bfloat16",
    decay="-slope",
    decay_per_token=False,
    initial_state=False,
    final_state=False,
    assumptions=("mask holds exp(-s (i - j))",),
    validation="fp64 difference 1.0e-16, gradients 2.0e-16",
)
MISS = NearMiss(
    source=Source("model.py", 30),
    stage="match",
    obligation="causal-range",
    node="add_3",
    expected="j <= i",
    found="all j",
    hint="is a mask missing?",
)


@pytest.fixture(autouse=True)
def no_report_of_before():
    report.clear()
    yield
    report.clear()


def node_with(**meta):
    node = fx.Graph().placeholder("x")
    node.meta.update(meta)
    return node


class TestSource:
    TRACE = (
        '  File "/home/me/model.py", line 12, in forward\n    return self.attend(q, k, v)\n'
        '  File "/home/me/attention.py", line 34, in attend\n    return scores @ v\n'
        '  File "/env/site-packages/torch/functional.py", line 5, in einsum\n    return _VF.einsum(...)\n'
    )

    def test_the_innermost_frame_that_is_not_pytorchs(self):
        found = Source.of(node_with(stack_trace=self.TRACE))
        assert (found.file, found.line, found.code) == ("/home/me/attention.py", 34, "return scores @ v")

    LIBRARY = (
        TRACE + '  File "/env/lib/site-packages/einops/_backends.py", line 291, in einsum\n    return torch.einsum()\n'
    )

    def test_no_frame_of_a_library(self):
        found = Source.of(node_with(stack_trace=self.LIBRARY))
        assert (found.file, found.line) == ("/home/me/attention.py", 34)

    @pytest.mark.parametrize("cls", [type("Layer", (), {"__module__": "einops.layers"}), "einops.layers.Layer"])
    def test_a_library_that_the_model_is_from(self, cls):
        found = Source.of(node_with(stack_trace=self.LIBRARY, nn_module_stack={"a": ("L['self'].layer", cls)}))
        assert (found.line, found.module) == (291, "layer")

    def test_nothing_but_libraries(self):
        last = self.LIBRARY.splitlines(keepends=True)[-2:]
        assert Source.of(node_with(stack_trace="".join(last))).line == 291

    def test_the_module_path(self):
        stack = {"a": ("L['self']", object), "b": ("L['self'].layers.0.attention", object)}
        found = Source.of(node_with(stack_trace=self.TRACE, nn_module_stack=stack))
        assert found.module == "layers.0.attention"
        assert str(found) == "/home/me/attention.py:34 in layers.0.attention"

    def test_nothing_known(self):
        assert str(Source.of(None)) == str(Source.of(node_with())) == "unknown place"


class TestText:
    def test_a_rewrite(self):
        assert str(REWRITE) == (
            "model.py:12 in layers.0.attention: chunkwise form, N=512 H=4 Dk=16 Dv=32 bfloat16, "
            "decay per head from -slope"
        )

    @pytest.mark.parametrize(
        ("initial", "final", "text"),
        [(True, False, "state in"), (False, True, "state out"), (True, True, "state in and out")],
    )
    def test_a_rewrite_with_states(self, initial, final, text):
        assert str(replace(REWRITE, initial_state=initial, final_state=final)).endswith(f"from -slope, {text}")

    def test_a_decay_per_token(self):
        assert "decay per token from" in str(replace(REWRITE, decay_per_token=True))

    def test_a_near_miss(self):
        assert str(MISS) == (
            "model.py:30: not rewritten at match/causal-range: expected j <= i, found all j (is a mask missing?)"
        )
        assert str(replace(MISS, hint="")).endswith("found all j")

    def test_a_near_miss_from_a_refusal(self):
        trace = '  File "model.py", line 30, in f\n    x + y\n'
        refusal = Refusal("match", "causal-range", node_with(stack_trace=trace), "j <= i", "all j", "hint")
        miss = NearMiss.of(refusal)
        assert (miss.source.line, miss.stage, miss.obligation, miss.node) == (30, "match", "causal-range", "x")
        assert (miss.expected, miss.found, miss.hint) == ("j <= i", "all j", "hint")
        assert NearMiss.of(replace(refusal, node=None)).node == ""

    def test_a_report(self):
        whole = Report((REWRITE,), (MISS,), 2, {"lift": 0.25, "match": 0.5}, ("a note",), 40, 7)
        assert str(whole).splitlines() == [
            "rewrote 1 decayed attention in 2 graphs; 1 near miss",
            f"  + {REWRITE}",
            "      assumed: mask holds exp(-s (i - j))",
            "      validated: fp64 difference 1.0e-16, gradients 2.0e-16",
            f"  - {MISS}",
            "  note: a note",
            "  graph nodes: 40 -> 7",
            "  seconds: lift 0.250, match 0.500",
        ]

    @pytest.mark.parametrize(
        ("counts", "text"),
        [
            ((0, 0, 0), "rewrote 0 decayed attentions in 0 graphs; 0 near misses"),
            ((2, 2, 1), "rewrote 2 decayed attentions in 1 graph; 2 near misses"),
        ],
    )
    def test_plurals(self, counts, text):
        rewrites, misses, graphs = counts
        assert str(Report((REWRITE,) * rewrites, (MISS,) * misses, graphs)).splitlines()[0] == text


def test_reports_add_up():
    a = Report((REWRITE,), (), 1, {"lift": 1.0}, ("same", "a"), 40, 7)
    b = Report((), (MISS,), 2, {"lift": 0.5, "match": 2.0}, ("same", "b"), 10, 10)
    assert a + b == Report((REWRITE,), (MISS,), 3, {"lift": 1.5, "match": 2.0}, ("same", "a", "b"), 50, 17)


def test_json_holds_every_field():
    whole = Report((REWRITE,), (MISS,), 1, {"lift": 0.25}, ("a note",))
    data = json.loads(whole.to_json())
    assert data == json.loads(json.dumps(whole.to_dict()))
    assert data["rewrites"][0]["source"] == {
        "file": "model.py",
        "line": 12,
        "code": "return scores @ v",
        "module": "layers.0.attention",
    }
    assert data["near_misses"][0]["obligation"] == "causal-range"
    assert (data["graphs"], data["seconds"], data["notes"]) == (1, {"lift": 0.25}, ["a note"])


class TestPublish:
    def test_the_last_one_is_kept_until_dynamo_is_reset(self):
        assert lacompile.last_report() is None
        report.publish(Report((REWRITE,)))
        report.publish(Report((), (MISS,)))
        assert lacompile.last_report() == Report((), (MISS,))
        report.clear()
        assert lacompile.last_report() is None

    def test_dynamo_counts_them(self):
        before = dict(_compat.counters())
        report.publish(Report((REWRITE, REWRITE), (MISS,), 1))
        after = _compat.counters()
        assert {k: after[k] - before.get(k, 0) for k in ("graphs", "rewrites", "near_misses")} == {
            "graphs": 1,
            "rewrites": 2,
            "near_misses": 1,
        }

    def test_rewrites_and_notes_are_news_and_near_misses_are_details(self, caplog):
        with caplog.at_level(logging.DEBUG, logger="lacompile"):
            report.publish(Report((REWRITE,), (MISS,), notes=("a note",)))
        ours = [(r.levelname, r.getMessage()) for r in caplog.records if r.name == "lacompile"]
        assert ours == [("INFO", f"rewrote {REWRITE}"), ("DEBUG", str(MISS)), ("INFO", "a note")]

    @pytest.mark.parametrize(("setting", "misses_shown"), [("lacompile", False), ("+lacompile", True)])
    def test_torch_logs_shows_them(self, setting, misses_shown):
        code = (
            "import torch\nfrom lacompile import report\n"
            "from lacompile.report import *\n"
            "report.publish(Report((), (NearMiss(Source(), 's', 'o', 'n', 'e', 'f'),), notes=('a note',)))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "TORCH_LOGS": setting}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "a note" in done.stderr
        assert ("not rewritten at s/o" in done.stderr) is misses_shown


# ------------------------------------------------------------------------------------------------- through the backend


def undecayed(q, k, v):
    return (q @ k.transpose(-1, -2)).tril() @ v


class TestThroughTheBackend:
    def test_a_compiled_function(self):
        torch._dynamo.reset()
        torch.compile(undecayed, backend="lightning")(*qkv(2, 3, 8, 4, 6))
        found = lacompile.last_report()
        assert found is not None and found.graphs == 1 and not found.near_misses
        (rewrite,) = found.rewrites
        line = inspect.getsourcelines(undecayed)[1] + 1
        assert (rewrite.source.file, rewrite.source.line) == (__file__, line)
        assert rewrite.source.code == "return (q @ k.transpose(-1, -2)).tril() @ v"
        assert (rewrite.length, rewrite.heads, rewrite.dk, rewrite.dv, rewrite.dtype) == ("8", "3", 4, 6, "float32")
        assert "fp64 difference" in rewrite.validation
        assert {"lift", "match", "total"} <= set(found.seconds)
        assert found.nodes_before > 0 and found.nodes_after > 0
        torch._dynamo.reset()
        assert lacompile.last_report() is None

    def test_the_trace_of_a_compilation_has_it(self):
        """Everything else that PyTorch traces is made, too, the text of the rewritten graph among it."""
        heard, trace = [], logging.getLogger("torch.__trace")
        listener = logging.Handler()
        listener.emit = heard.append
        trace.addHandler(listener)
        try:
            torch._dynamo.reset()
            torch.compile(undecayed, backend="lightning")(*qkv(2, 3, 8, 4, 6))
        finally:
            trace.removeHandler(listener)
        told = {r.metadata["artifact"]["name"]: r.payload for r in heard if "artifact" in r.metadata}
        found = lacompile.last_report()
        assert found is not None and told["lacompile_rewrites"] == found.to_json()

    def test_a_dry_run_reports_the_same_and_changes_nothing(self):
        torch._dynamo.reset()
        args = qkv(2, 3, 8, 4, 6)
        out = torch.compile(undecayed, backend="lightning", options={"dry_run": True})(*args)
        assert torch.allclose(out, undecayed(*args), atol=1e-5)
        found = lacompile.last_report()
        assert found is not None and len(found.rewrites) == 1
        assert found.nodes_after == found.nodes_before > 0

    def test_explain_sums_all_graphs_and_publishes_nothing(self):
        def two_graphs(q, k, v):
            first = undecayed(q, k, v)
            torch._dynamo.graph_break()
            return undecayed(q, k, first)

        torch._dynamo.reset()
        found = explain(two_graphs)(*qkv(2, 3, 8, 4))
        assert (found.graphs, len(found.rewrites)) == (2, 2)
        assert lacompile.last_report() is None

    def test_explain_checks_its_options(self):
        with pytest.raises(lacompile.errors.UnknownOption):
            explain(undecayed, bufers="never")
