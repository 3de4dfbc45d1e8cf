"""What is shipped, what an import costs, and who may import whom."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.resources
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import lacompile

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lacompile"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def python(code):
    """The standard output of ``code`` in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


LOADED = "import sys; print(*sorted(m for m in sys.modules if m.split('.')[0] in {top}))"


class TestImport:
    def test_the_package_loads_only_itself(self):
        heavy = ("torch", "triton", "rich", "matplotlib", "sympy", "lacompile")
        assert python("import lacompile;" + LOADED.format(top=heavy)) == ["lacompile"]

    def test_the_operator_needs_no_analysis_and_no_triton(self):
        code = "import lacompile; lacompile.decayed_attention;" + LOADED.format(top=("triton", "rich", "matplotlib"))
        assert python(code) == []
        code = "import lacompile; lacompile.decayed_attention;" + LOADED.format(top=("lacompile",))
        loaded = python(code)
        assert "lacompile.ops" in loaded and not [m for m in loaded if m.startswith("lacompile.passes")]

    @pytest.mark.parametrize("module", ["lacompile.backend", "lacompile.testing"])
    def test_the_backend_loads_no_triton_and_no_printing(self, module):
        assert python(f"import {module};" + LOADED.format(top=("triton", "rich", "matplotlib"))) == []

    def test_every_public_name_is_there(self):
        code = "import lacompile; [getattr(lacompile, n) for n in lacompile.__all__]; print(*lacompile.__all__)"
        assert python(code) == ["Report", "__version__", "decayed_attention", "decode_step", "explain", "last_report"]

    def test_another_name_is_an_attribute_error(self):
        with pytest.raises(AttributeError, match="'no_such_name'"):
            lacompile.no_such_name  # noqa: B018

    def test_explain_is_the_function_every_time(self):
        assert python("import lacompile; lacompile.explain; print(callable(lacompile.explain))") == ["True"]

    def test_no_module_has_the_name_of_a_public_function(self):
        """The import system would bind the module's name over that of the function."""
        modules = {p.stem if p.suffix else p.name for p in PACKAGE.iterdir()}
        assert not modules & {n for n in lacompile.__all__ if callable(getattr(lacompile, n))}


class TestRegistration:
    def test_the_entry_point_is_the_backend(self):
        from lacompile.backend import lightning

        (found,) = importlib.metadata.entry_points(group="torch_dynamo_backends", name="lightning")
        assert found.value == "lacompile.backend:lightning"
        assert found.load() is lightning

    def test_dynamo_finds_it_without_an_import(self):
        code = "import torch; print('lightning' in torch.compiler.list_backends());"
        code += LOADED.format(top=("lacompile",))
        assert python(code) == ["True"]

    def test_the_version_is_one(self):
        assert lacompile.__version__ == PROJECT["project"]["version"] == importlib.metadata.version("lacompile")


class TestWheel:
    def test_it_holds_the_package_and_no_other_top_level_name(self):
        assert PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"] == {"packages": ["lacompile"]}

    def test_types_are_shipped(self):
        assert (importlib.resources.files("lacompile") / "py.typed").is_file()

    @pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="needs the repository")
    def test_no_module_is_ignored(self):
        """The build leaves out what .gitignore names."""
        files = [p for p in PACKAGE.rglob("*") if p.suffix == ".py" or p.name == "py.typed"]
        done = subprocess.run(["git", "check-ignore", *map(str, files)], capture_output=True, text=True, cwd=ROOT)
        assert (done.returncode, done.stdout) == (1, "")

    def test_every_folder_of_modules_is_a_package(self):
        folders = {p.parent for p in PACKAGE.rglob("*.py")}
        assert [str(f) for f in folders if not (f / "__init__.py").is_file()] == []

    def test_the_files_that_the_project_names_exist(self):
        assert (ROOT / PROJECT["project"]["readme"]).is_file()
        assert all((ROOT / name).is_file() for name in PROJECT["project"]["license-files"])

    def test_the_pinned_versions_are_ones_that_the_project_allows(self):
        lines = (ROOT / "requirements.txt").read_text().splitlines()
        pinned = {
            r.name: next(iter(r.specifier)).version
            for r in (Requirement(line) for line in lines if line and not line.startswith("#"))
        }
        extras = PROJECT["project"]["optional-dependencies"]
        wanted = [*PROJECT["project"]["dependencies"], *extras["test"], *extras["demo"], *extras["triton"]]
        for requirement in map(Requirement, wanted):
            assert requirement.specifier.contains(pinned[requirement.name]), requirement.name


class TestWhoImportsWhom:
    def test_the_contracts_hold(self):
        tool = Path(sys.executable).with_name("lint-imports")
        if not tool.exists():
            pytest.skip("import-linter is not installed")
        done = subprocess.run([str(tool), "--no-cache"], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stdout

    @pytest.mark.parametrize(
        ("folder", "forbidden"),
        [
            ("kernels", ("torch.fx", "torch._dynamo", "torch._inductor")),
            ("passes", ("triton",)),
        ],
    )
    def test_parts_of_pytorch_that_a_folder_does_not_know(self, folder, forbidden):
        """The linter sees other packages as one name each."""
        for path in (PACKAGE / folder).rglob("*.py"):
            bad = [n for n in _imported(path) if any(n == f or n.startswith(f + ".") for f in forbidden)]
            assert not bad, f"{path.relative_to(ROOT)} imports {bad}"

    def test_a_broken_contract_is_noticed(self, tmp_path):
        """The near twin: the same contracts, over a copy in which a kernel imports a pass."""
        tool = Path(sys.executable).with_name("lint-imports")
        if not tool.exists():
            pytest.skip("import-linter is not installed")
        shutil.copytree(PACKAGE, tmp_path / "lacompile")
        shutil.copy(ROOT / "pyproject.toml", tmp_path)
        with open(tmp_path / "lacompile/kernels/reference.py", "a") as file:
            file.write("\nfrom ..passes import facts  # noqa\n")
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        done = subprocess.run([str(tool), "--no-cache"], capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert done.returncode == 1 and "lacompile.kernels.reference -> lacompile.passes" in done.stdout, done.stdout

    def test_private_modules_of_pytorch_are_imported_in_one_file(self):
        importers = {p.name for p in PACKAGE.rglob("*.py") if any(n.startswith("torch._") for n in _imported(p))}
        assert importers == {"_compat.py"}

    def test_the_operator_imports_kernels_inside_functions_only(self):
        tree = ast.parse((PACKAGE / "ops.py").read_text())
        top = [n for n in tree.body if isinstance(n, ast.ImportFrom)]
        assert not [n for n in top if (n.module or "").startswith("kernels")]
        assert [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("kernels")]

    def test_only_the_triton_kernels_import_triton(self):
        importers = {
            p.relative_to(PACKAGE).parts[:2]
            for p in PACKAGE.rglob("*.py")
            if any(n == "triton" or n.startswith("triton.") for n in _imported(p))
        }
        assert importers <= {("kernels", "lightning2")}


def _imported(path):
    """The full names of what a file imports, at its top level and inside its functions."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names += [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
    return names
