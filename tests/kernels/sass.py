"""What a compiled kernel's instructions say of products whose first operand is in registers.

The tensor cores read it while the program goes on, up to the next wait. Kernels with such products have come out of a
compiler wrong (docs/kernel-notes/tuning-and-hazards.md); a register that is used for something else too soon would be
one way.
"""

from __future__ import annotations

import re

INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)\s*(.*?)\s*;")
PRODUCT, WAIT, OPERAND = "HGMMA", "WARPGROUP.DEPBAR", 4  # registers of a thread's share of [64, 16]
NO_RESULT = ("ST", "RED", "BAR", "BRA", "SYNCS", "R2UR", "MEMBAR", "UT", "CCTL")


def products_from_registers(listing: str) -> int:
    """How many products there are whose first operand is in registers."""
    return sum(_operand(args) is not None for op, args in _instructions(listing) if op.startswith(PRODUCT))


def overwritten(listing: str) -> list[str]:
    """Instructions that write into the operand of a product before it has been waited for."""
    found, read = [], set[int]()
    for op, args in _instructions(listing):
        if op.startswith(WAIT):
            read.clear()
        elif op.startswith(PRODUCT):
            first = _operand(args)
            read |= set() if first is None else {first + n for n in range(OPERAND)}
        elif not op.startswith(NO_RESULT) and not read.isdisjoint(_results(op, args)):
            found.append(f"{op} {args}")
    return found


def _instructions(listing: str) -> list[tuple[str, str]]:
    return [(m[1], m[2]) for line in listing.splitlines() if (m := INSTRUCTION.match(line))]


def _operand(args: str) -> int | None:
    """The first register of a product's first operand; None if that is in shared memory."""
    found = re.match(r"R\d+, R(\d+)", args)
    return int(found[1]) if found else None


def _results(op: str, args: str) -> set[int]:
    found = re.match(r"(?:U?P\w+, )*R(\d+)", args)
    width = 4 if ".128" in op else 2 if ".64" in op or ".WIDE" in op else 1
    return set() if found is None else {int(found[1]) + n for n in range(width)}
