"""The examples run from a clean process, say what they are for, and show what they promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name, *arguments, **environment):
    """The standard output of an example; one thread, for the sake of other tests."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(output, line):
    """The cells of the first table line of this name; None for a cell that is left out."""
    (cells, *_) = re.findall(rf"^ *{re.escape(line)}  +(.*)$", output, re.MULTILINE)
    return [None if c == "-" else float(c.rstrip("x")) for c in cells.split()]


def test_every_example_is_run_here():
    assert {p.name for p in EXAMPLES.iterdir() if p.suffix == ".py"} == {"quickstart.py"}


def test_help_names_the_options():
    text = run("quickstart.py", "--help")
    assert all(option in text for option in ("--device", "--length", "--layer", "--seconds"))


def test_the_quickstart_compiles_a_layer_and_measures_it():
    """Without training steps, for which no time is left."""
    out = run("quickstart.py", "--device", "cpu", "--layer", "retention", "--length", "256", "--seconds", "0")
    assert all(ms is not None and ms > 0 for ms in numbers(out, "median, ms"))
    assert all(error is not None and error < 1e-4 for error in numbers(out, "output to fp64"))
    assert numbers(out, "speed-up over eager")[0] == numbers(out, "speed-up over inductor")[1] == 1
    assert "training step left out" in out
    assert "rewrote 1 decayed attention in 1 graph" in out


def test_the_quickstart_without_a_compiler_runs_what_it_can():
    """Training steps included."""
    out = run("quickstart.py", "--device", "cpu", "--layer", "minimax", "--length", "256", CXX="/nonexistent/g++")
    assert "rewrote 1 decayed attention in 1 graph" in out
    assert out.count("inductor failed at forward") == out.count("inductor failed at training step") == 1
    eager, inductor, lightning = numbers(out, "input gradient to fp64")
    assert inductor is None and eager < 1e-3 and lightning < 1e-3
