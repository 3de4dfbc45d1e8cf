"""Sequences that are packed one after the other, cut into pieces: the list of work, made on the device.

How long the sequences are is known to the device alone, and the host never waits to know it. It launches as many
programs as there could be pieces; those beyond the last one find an empty piece and leave.
"""

# What @triton.jit makes of a function and of its launch is beyond a type checker.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

SHORTEST = 1024
"""Tokens of a piece, at least: its state is as much memory as a hundred tokens or two."""


@dataclass(frozen=True)
class Pieces:
    """At most ``count`` pieces of at most ``tokens`` tokens.

    Attributes:
        table: ``[count, 3]`` int32: a piece's sequence, its first token and its end; the two are equal beyond the last.
        firsts: ``[S + 1]`` int32: the first piece of each sequence, and the number of all.
    """

    table: Tensor
    firsts: Tensor
    tokens: int
    count: int

    @property
    def sequences(self) -> int:
        return self.firsts.shape[0] - 1


def tokens_of_a_piece(length: int, programs: int, slots: int) -> int:
    """So many that the pieces of ``length`` tokens fill ``slots`` about twice, with ``programs`` for each piece."""
    wanted = length * programs // (2 * slots)
    return max(SHORTEST, -(-wanted // SHORTEST) * SHORTEST)


def cut(cu_seqlens: Tensor, length: int, tokens: int) -> Pieces:
    """The pieces of sequences that begin and end at ``cu_seqlens`` ``[S + 1]``, in ``length`` tokens.

    Whatever the numbers are, no piece reaches beyond the tokens there are.
    """
    count = length // tokens + cu_seqlens.shape[0] - 1
    edges = cu_seqlens.long().clamp(0, length)
    pieces = (edges.diff() + (tokens - 1)).div(tokens, rounding_mode="floor").clamp_min(0)
    firsts = torch.nn.functional.pad(pieces.cumsum(0), (1, 0))
    piece = torch.arange(count, device=edges.device)
    sequence = torch.searchsorted(firsts[1:], piece, right=True).clamp_max(cu_seqlens.shape[0] - 2)
    begin = edges[sequence] + (piece - firsts[sequence]) * tokens
    end = torch.minimum(begin + tokens, edges[sequence + 1]).maximum(begin)
    return Pieces(torch.stack([sequence, begin, end], 1).int(), firsts.int(), tokens, count)


@triton.jit
def piece_at(table_ptr, firsts_ptr, piece):
    """(sequence, first token as int64, number of tokens, whether it is its sequence's first piece, and its last)."""
    sequence = tl.load(table_ptr + piece * 3)
    begin = tl.load(table_ptr + piece * 3 + 1)
    size = tl.load(table_ptr + piece * 3 + 2) - begin
    is_first = piece == tl.load(firsts_ptr + sequence)
    is_last = piece + 1 == tl.load(firsts_ptr + sequence + 1)
    return sequence, begin.to(tl.int64), size, is_first, is_last
