"""Winners by kind, as JSON: those that are shipped for a GPU, and those that this machine has found."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from .identity import Identity
from .space import Config, Kind

log = logging.getLogger("lacompile")
SHIPPED = Path(__file__).parent / "configs"
NAMED = ("body", "bk", "bv", "chunk", "warps", "stages")
"""The fields that tell one tile from another; the rest follow from them."""


@dataclass(frozen=True)
class Winner:
    """The fastest of those tiles that were tried.

    Attributes:
        tiles: its fields, those of NAMED.
        milliseconds: of each candidate, in their order; None for one that does not run or is wrong.
        complete: whether every candidate was tried.
    """

    tiles: dict[str, Any]
    milliseconds: tuple[float | None, ...]
    complete: bool

    @classmethod
    def of(cls, tiles: Config, milliseconds: Sequence[float | None], complete: bool) -> Winner:
        return cls({name: getattr(tiles, name) for name in NAMED}, tuple(milliseconds), complete)

    def place(self, candidates: Sequence[Config]) -> int | None:
        """Where it is among the candidates; None if it is no longer one of them."""
        return next((n for n, c in enumerate(candidates) if {k: getattr(c, k) for k in NAMED} == self.tiles), None)


Table = dict[str, Winner]


def read(path: Path) -> Table:
    """The winners of a file by the name of their kind; none where there is no such file or it is broken."""
    try:
        found = json.loads(path.read_text())["winners"]
        return {kind: Winner(w["tiles"], tuple(w["milliseconds"]), bool(w["complete"])) for kind, w in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("the tile choices in %s cannot be read (%s) and are ignored", path, error)
        return {}


def write(path: Path, about: Identity, winners: Table, **more: str) -> None:
    """The file as a whole or not at all: whoever reads at the same time sees the old one or the new one."""
    said = {"about": asdict(about) | more, "winners": {kind: asdict(w) for kind, w in sorted(winners.items())}}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(json.dumps(said, indent=1) + "\n")
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def shipped_path(gpu: str) -> Path:
    """Where the winners for a GPU are, if they are shipped."""
    return SHIPPED / (re.sub(r"[^a-z0-9]+", "_", gpu.lower()).strip("_") + ".json")


def stored_path(about: Identity) -> Path:
    """Where this machine keeps what it has found: ``$LACOMPILE_CACHE_DIR``, else the user's cache directory."""
    given = os.environ.get("LACOMPILE_CACHE_DIR")
    if given:
        return Path(given) / f"tiles-{about.digest}.json"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "lacompile" / f"tiles-{about.digest}.json"


def store(about: Identity, kind: Kind, winner: Winner) -> None:
    """Adds a winner to what this machine keeps; one process at a time. A place that cannot be written to is said so."""
    path = stored_path(about)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=30):
            write(path, about, read(path) | {str(kind): winner})
    except OSError as error:  # a timeout is one
        log.warning("the choice of tiles for %s cannot be kept in %s (%s)", kind, path, error)
