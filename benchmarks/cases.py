"""The problems that kernels are compared on, and what a pass over one of them is."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import harness
import peers
import torch
from harness import DEVICE, Row
from peers import Peer
from torch import Tensor

from lacompile.kernels import cpu
from lacompile.testing import head_log_decay, token_log_decay

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One problem.

    Attributes:
        batch, heads, length, dim: B, H, N and D.
        per_token: one decay per token instead of one per head.
    """

    batch: int
    heads: int
    length: int
    dim: int
    per_token: bool = False

    def columns(self) -> Row:
        return {
            "B": self.batch, "H": self.heads, "N": self.length, "D": self.dim,
            "decay": "token" if self.per_token else "head",
        }  # fmt: skip

    @property
    def token_heads(self) -> int:
        return self.batch * self.heads * self.length


@dataclass
class Inputs:
    """Tensors of one case; those of a training step are leaves that want gradients."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    do: Tensor

    @classmethod
    def of(cls, case: Case, *, heads_first: bool = False) -> Inputs:
        generator = torch.Generator(DEVICE).manual_seed(0)  # a million tokens take minutes on the host

        def drawn(scale: float = 1.0) -> Tensor:
            sizes = (case.batch, case.length, case.heads, case.dim)
            x = scale * torch.randn(sizes, generator=generator, device=DEVICE, dtype=DTYPE)
            return x.transpose(1, 2).contiguous() if heads_first else x.transpose(1, 2)

        q, k, v, do = drawn(), drawn(case.dim**-0.5), drawn(), drawn()
        if case.per_token:
            decay = token_log_decay(case.batch, case.heads, case.length, device=DEVICE)
        else:
            decay = head_log_decay(case.heads, device=DEVICE)
        return cls(q, k, v, decay, do)

    def leaves(self) -> list[Tensor]:
        found = [self.q, self.k, self.v]
        return [*found, self.log_decay] if self.log_decay.dim() == 3 else found

    def exact(self) -> tuple[Tensor, list[Tensor]]:
        """Output and gradients of the leaves in fp64, by the chunked form."""
        args = [x.detach().double() for x in (self.q, self.k, self.v, self.log_decay)]
        grads = cpu.backward(self.do.double(), None, *args, 1.0, None, self.log_decay.dim() == 3)
        return cpu.forward(*args, 1.0, None)[0], list(grads[: len(self.leaves())])


def steps(peer: Peer, x: Inputs) -> dict[str, Callable[[], object]]:
    """The calls that are timed, by the name of the pass."""

    def forward() -> Tensor:
        with torch.no_grad():
            return peer.attend(x.q, x.k, x.v, x.log_decay)

    def train() -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in x.leaves()]
        decay = leaves[3] if len(leaves) == 4 else x.log_decay
        return torch.autograd.grad(peer.attend(*leaves[:3], decay), leaves, x.do)

    return {"forward": forward, "forward + backward": train}


def reason(error: Exception, peer: Peer) -> str:
    """The first line of an error; our own errors are shown in full."""
    if peer is peers.OURS:
        traceback.print_exception(error)
    return f"{type(error).__name__}: {error}".splitlines()[0][:120]


def warm(cases: Sequence[Case], compared: Sequence[Peer], shard: int = 0, shards: int = 1) -> None:
    """Runs every pass once, so that what compiles and tunes itself does it now; on short sequences where that will do.

    With several shards each takes its share of the peers that compile for each shape; :func:`peers.share_autotuning`
    divides the configurations of the others.
    """
    shapes = list(dict.fromkeys(Case(1, c.heads, 512, c.dim, c.per_token) for c in cases))
    with harness.turn(alone=False):
        for peer in compared:
            for case in cases[shard::shards] if peer.compiles_each_shape else shapes:
                for call in steps(peer, Inputs.of(case, heads_first=peer.heads_first)).values():
                    try:
                        call()
                    except Exception as error:
                        print(f"warm-up of {peer.name}: {reason(error, peer)}", flush=True)
                harness.release()
