"""The Python code of the README runs, in its order, and does what the README says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def blocks():
    """The Python blocks, but for the one line at the top that has no model to compile."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1:]


def test_the_code_runs_and_reports_one_rewrite(tmp_path):
    program = tmp_path / "model.py"
    program.write_text("\n".join(blocks()).replace("import torch\n", "import torch; torch.manual_seed(0)\n", 1))
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = program.read_text().splitlines()
    line = next(n for n, text in enumerate(lines, 1) if "weights @ v" in text)
    shown = re.search(r"```text\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1).splitlines()
    assert f"model.py:{line}: parallel form" in shown[1]
    expected = [shown[0], shown[1].split("model.py")[1]]
    # last_report and explain say the same
    assert [done.stdout.count(text) for text in expected] == [2, 2]


def test_the_options_are_those_there_are():
    from lacompile.options import Options

    section = (ROOT / "README.md").read_text().split("## Options")[1].split("\n## ")[0]
    assert re.findall(r"^- `(\w+)`:", section, re.MULTILINE) == list(Options.__dataclass_fields__)


def test_the_obligations_are_those_of_the_proof():
    from lacompile.passes.lift.prove import obligations

    section = (ROOT / "README.md").read_text().split("## What is left alone")[1].split("\n## ")[0]
    assert re.findall(r"^\| `([a-z-]+)`", section, re.MULTILINE) == re.findall(
        r"^    (\S+) ", obligations.__doc__ or "", re.MULTILINE
    )
