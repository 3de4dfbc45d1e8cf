"""What a measured choice of tiles holds for: another compiler or another kernel may have another winner."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[1] / "lightning2"


@dataclass(frozen=True)
class Identity:
    """A GPU's name, the versions of Triton and of its assembler, and a digest of the kernels' source."""

    gpu: str
    triton: str
    ptxas: str
    source: str

    @property
    def digest(self) -> str:
        """Of all of it, for a file name."""
        return hashlib.sha256(repr(asdict(self)).encode()).hexdigest()[:16]


@cache
def source_digest() -> str:
    """Of every file that a kernel is made from."""
    found = hashlib.sha256()
    for path in sorted(KERNELS.rglob("*.py")):
        found.update(path.relative_to(KERNELS).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]
