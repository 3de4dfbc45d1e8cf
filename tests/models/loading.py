"""Public modules that import more than the machine has: loaded one file at a time, what they do not use replaced."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType


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
        missing = [m for m in absent if m not in sys.modules]
        sys.modules.update({m: _Absent(m) for m in missing})
        try:
            spec.loader.exec_module(module)
        finally:
            for m in missing:
                del sys.modules[m]
        sys.modules[name] = module
    return sys.modules[name]


@contextmanager
def without(*packages: str) -> Iterator[None]:
    """Packages that cannot be imported inside, as on a machine that lacks them."""
    hidden = {p: sys.modules.pop(p, None) for p in packages}
    sys.modules.update(dict.fromkeys(packages))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name, module in hidden.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module
