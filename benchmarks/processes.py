"""Rows that each have a process of their own: compiled side by side from cold caches, timed one at a time."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import harness
from harness import Row

ONE = "--one"
"""The argument of a process: the fields of its run as JSON."""
SHARD = "--shard"
"""The argument of a process that only compiles: which part of how many, as in 2/8."""


def compile_side_by_side(script: str, processes: int, *arguments: str, **environment: str) -> None:
    """Fills Triton's cache on disk, which the processes share: each runs ``script`` with a SHARD of its own."""
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, script, *arguments, SHARD]
    running = [subprocess.Popen([*command, f"{n}/{processes}"], env=variables) for n in range(processes)]
    for process in running:
        process.wait()


@contextlib.contextmanager
def compiling(limit: int) -> Iterator[None]:
    """Beside other processes. After ``limit`` seconds the process ends: the compiler would take an exception for its
    own."""
    with harness.turn(alone=False):
        signal.alarm(limit)
        yield
        signal.alarm(0)


def answer(run: str, measure: Callable[[Row], Row]) -> None:
    """What the process of one row does with the value of ONE."""
    print(json.dumps(measure(json.loads(run))), flush=True)


def _row(script: str, run: Row, limit: int) -> Row:
    with tempfile.TemporaryDirectory() as cold:
        caches = {f"{name}_CACHE_DIR": f"{cold}/{name}" for name in ("TRITON", "TORCHINDUCTOR")}
        threads = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "2"}
        command = [sys.executable, script, ONE, json.dumps(run)]
        done = subprocess.run(command, env=os.environ | threads | caches, stdout=subprocess.PIPE, text=True)
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        late = done.returncode == -signal.SIGALRM
        return {"failed": f"not compiled within {limit} s" if late else f"exit status {done.returncode}"}


def rows(script: str, runs: Sequence[Row], processes: int, limit: int) -> Iterator[tuple[Row, Row]]:
    """Each run with its row, as they are done; those that come first begin first."""
    with ThreadPoolExecutor(processes) as pool:
        begun = {pool.submit(_row, script, run, limit): run for run in runs}
        for done in as_completed(begun):
            yield begun[done], done.result()
