"""The rows of the support matrix: public programs, one file for each family of packages."""

from __future__ import annotations

from ..matrix import Row
from . import fla, hybrids, mlstm, prefix, retnet

ROWS: list[Row] = [*hybrids.ROWS, *fla.ROWS, *retnet.ROWS, *mlstm.ROWS, *prefix.ROWS]
