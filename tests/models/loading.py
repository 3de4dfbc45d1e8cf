"""Public modules that import more than the machine has: loaded one file at a time, what they do not use replaced."""

from __future__ import annotations

import importlib.util
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from unittest import mock


class _Absent(ModuleType):
    """A module that is not installed: every name in it is a placeholder that nothing may call."""

    def __init__(self, name: str):
        super().__init__(name)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def load(package: str, path: str, absent: tuple[str, ...] = ()) -> ModuleType:
    """The file ``path`` of an installed package, as it is, without running the package's ``__init__``.

    Args:
        package: the top-level import name.
        path: the file, relative to the package's folder.
        absent: modules that the file imports for other parts of itself, and that are not installed.
    """
    name = f"{package}_{path.removesuffix('.py').replace('/', '_')}"
    if name not in sys.modules:
        found = importlib.util.find_spec(package)
        assert found is not None and found.submodule_search_locations, f"{package} is not installed"
        spec = importlib.util.spec_from_file_location(name, Path(found.submodule_search_locations[0]) / path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        with mock.patch.dict(sys.modules, {m: _Absent(m) for m in absent}):
            spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


def release(distribution: str) -> str:
    """The installed version of a distribution."""
    return version(distribution)
