"""``python -m tests.models`` runs every program of the support matrix and writes the page (``make matrix``)."""

from __future__ import annotations

import sys

from .matrix import PAGE, write
from .rows import ROWS


def main() -> None:
    found, wrong = [], []
    for row in ROWS:
        print(row, flush=True)
        try:
            found.append(row.found())
        except AssertionError as error:
            wrong.append(f"{row}: {error}")
    if wrong:
        sys.exit("\n\n".join(["Nothing is written. Rows that say something else than was found:", *wrong]))
    write(found)
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
