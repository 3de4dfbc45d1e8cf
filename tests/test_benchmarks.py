"""The benchmarks run: on tiny problems, on any device. Their numbers are not judged, except against fp64."""

from __future__ import annotations

import importlib
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import cases  # noqa: E402
import harness  # noqa: E402
import peers  # noqa: E402
import processes  # noqa: E402


@pytest.mark.parametrize(("name", "rows"), [("kernels", 7), ("paper", 8)])
def test_a_dry_run_writes_its_table_with_what_it_rests_on(name, rows, tmp_path):
    out = tmp_path / f"{name}.csv"
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--dry", "--seconds", "0.01", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    about, found = harness.read_csv(out)
    assert {"torch", "python", "date", "command"} <= set(about)
    ours = [r for r in found if r["implementation"] == peers.OURS.name]
    assert len(found) >= rows and all(float(r["p50_ms"]) > 0 and not r.get("failed") for r in ours)
    assert out.with_suffix(".md").read_text().count("\n|") == len(found) + 2


def test_a_layer_has_a_row_from_a_process_of_its_own(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "layers.py"), "--small", "--layers", "retention", "--lengths", "64"]
    command += ["--backends", "eager", "--seconds", "0.01", "--out", str(tmp_path), "--name", "dry"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = harness.read_csv(tmp_path / "retention_layer_dry.csv")[1]
    assert float(row["forward_ms"]) > 0 and float(row["train_ms"]) > 0 and 0 < float(row["error"]) < 0.02


def test_a_wrong_kernel_is_not_timed():
    wrong = peers.Peer("wrong", lambda q, k, v, g: peers.OURS.attend(q, k, v, g) * 1.1)
    kernels = runpy.run_path(str(BENCHMARKS / "kernels.py"))
    rows = kernels["rows_of"](cases.Case(1, 2, 70, 16), [wrong], 1e12, 0.01)
    assert [r["failed"].split(":")[0] for r in rows] == ["AssertionError"] * 2
    assert not any("p50_ms" in r for r in rows)


def test_tables_survive_the_disk(tmp_path):
    rows = [{"a": 1, "b": "x, y"}, {"a": 2, "c": "two\nlines"}]
    harness.write_csv(tmp_path / "t.csv", {"command": "python x: y"}, rows)
    about, found = harness.read_csv(tmp_path / "t.csv")
    assert about == {"command": "python x: y"}
    assert [(r["a"], r["b"], r["c"].split()) for r in found] == [("1", "x, y", []), ("2", "", ["two", "lines"])]


def test_quantiles_are_of_the_calls():
    assert harness.quantiles([3.0]) == harness.Times(3.0, 3.0, 3.0, 1)
    assert harness.quantiles([float(n) for n in range(11)]) == harness.Times(2.0, 5.0, 8.0, 11)


@pytest.fixture
def rows_of(monkeypatch, tmp_path):
    """Runs a benchmark here, and its rows too, which have processes of their own elsewhere."""

    def run(name, *arguments):
        benchmark, out = importlib.import_module(name), tmp_path / f"{name}.csv"
        monkeypatch.setattr(processes, "rows", lambda script, runs, *_: ((run, benchmark.measure(run)) for run in runs))
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments, "--out", str(out)])
        benchmark.main()
        return harness.read_csv(out)[1]

    return run


def test_the_analysis_is_timed_stage_by_stage(rows_of):
    (row,) = rows_of("analysis_time", "--families", "token loop", "--sizes", "60")
    assert int(row["rewrites"]) == 1 and 50 < int(row["nodes"]) < 80
    assert float(row["capture_s"]) > 0 and float(row["total_s"]) > float(row["match_s"]) > 0


def test_a_first_call_is_split_into_its_parts(rows_of):
    torch._dynamo.reset()
    shape = ["--hidden", "32", "--heads", "2"]
    (row,) = rows_of("compile_time", "--lengths", "512", "--backends", "lightning", *shape)
    assert int(row["rewrites"]) == 1 and int(row["nodes_handed_over"]) < int(row["nodes"])
    parts = [float(row[f"{part}_s"]) for part in ("dynamo", "analysis", "inductor", "run")]
    assert all(part > 0 for part in parts)
    assert abs(sum(parts) + float(row["kernels_s"]) - float(row["first_s"])) < 0.01
