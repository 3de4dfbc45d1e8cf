"""One decayed attention: its sizes, its numbers, and its values by definition."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .choices import Choices

FIXED = ("none", "number", "list", "buffer", "input", "learned")
TOKENS = ("logsigmoid", "softplus", "dt", "given", "sigmoid")

# Decays that bf16 holds exactly: a program may keep them in any format.
SLOPES = (0.0625, 0.25, 0.015625, 0.5, 0.125, 0.375)
GAMMAS = (0.875, 0.75, 0.96875, 0.5, 0.9375, 0.625)


@dataclass(frozen=True)
class Fact:
    """What a program computes.

    Attributes:
        decay: one of FIXED, a decay per head; or of TOKENS, a decay per token as a function of an input [B, H, N].
        form: what a fixed decay is given as: slope, log or gamma.
        kv_heads: of k and v; divides heads.
        scale: of the scores.
        initial, final: whether a state [B, H, Dk, Dv] goes in, and comes out.
    """

    batch: int
    heads: int
    length: int
    dk: int
    dv: int
    decay: str
    form: str
    kv_heads: int
    scale: float
    initial: bool
    final: bool
    seed: int

    @property
    def per_token(self) -> bool:
        return self.decay in TOKENS

    @property
    def values(self) -> tuple[float, ...]:
        """The fixed decay of each head in its form."""
        if self.decay == "learned":
            return tuple((-2.0, -1.0, 0.5, -0.25, -3.0, 0.75)[: self.heads])
        start = 0 if self.decay == "number" else self.seed % 3
        table = GAMMAS if self.form == "gamma" else SLOPES
        sign = -1 if self.form == "log" else 1
        return tuple(sign * table[(start + h * (self.decay != "number")) % len(table)] for h in range(self.heads))

    def inputs(self) -> dict[str, Tensor]:
        """q [B,H,N,Dk], k and v [B,Hk,N,D], and as the fact needs them decay [H], gate [B,H,N], rate [H], state."""
        g = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g).requires_grad_()

        out = {
            "q": normal(self.batch, self.heads, self.length, self.dk),
            "k": normal(self.batch, self.kv_heads, self.length, self.dk),
            "v": normal(self.batch, self.kv_heads, self.length, self.dv),
        }
        if self.decay in ("input", "learned"):
            out["decay"] = torch.tensor(self.values).requires_grad_(self.decay == "learned")
        if self.per_token:
            gate = torch.randn(self.batch, self.heads, self.length, generator=g)
            out["gate"] = (-0.3 * gate.abs() if self.decay == "given" else gate + 1).requires_grad_()
        if self.decay == "dt":
            out["rate"] = (torch.rand(self.heads, generator=g) - 1.5).requires_grad_()
        if self.initial:
            out["state"] = normal(self.batch, self.heads, self.dk, self.dv)
        return out

    def log_decay(self, inputs: dict[str, Tensor]) -> Tensor:
        """[B, H, N] in fp64."""
        if self.per_token:
            x = inputs["gate"].double()
            if self.decay in ("logsigmoid", "sigmoid"):
                return F.logsigmoid(x)
            if self.decay == "softplus":
                return -F.softplus(x)
            return x if self.decay == "given" else -inputs["rate"].double().exp()[:, None] * F.softplus(x)
        if self.decay == "none":
            g = torch.zeros(self.heads, dtype=torch.float64)
        elif self.decay == "learned":
            a = inputs["decay"].double()
            g = F.logsigmoid(a) if self.form == "gamma" else -a.exp() if self.form == "log" else -F.softplus(a)
        else:
            x = torch.tensor(self.values, dtype=torch.float64)
            g = x.log() if self.form == "gamma" else x if self.form == "log" else -x
        return g[None, :, None].expand(self.batch, self.heads, self.length)

    def reference(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """o [B,H,N,Dv] and the final state [B,H,Dk,Dv] by definition, token by token, in fp64."""
        q, k, v = (inputs[n].double() for n in "qkv")
        k, v = (x.repeat_interleave(self.heads // self.kv_heads, 1) for x in (k, v))
        g = self.log_decay(inputs)
        state = inputs["state"].double() if self.initial else q.new_zeros(self.batch, self.heads, self.dk, self.dv)
        out = []
        for t in range(self.length):
            state = state * g[:, :, t, None, None].exp() + k[:, :, t, :, None] * v[:, :, t, None, :]
            out.append(self.scale * torch.einsum("bhd,bhde->bhe", q[:, :, t], state))
        return torch.stack(out, 2), state


def draw(pick: Choices, seed: int) -> Fact:
    """A random fact. Sizes coincide now and then on purpose."""
    heads = pick((2, 3, 1, 4))
    kv_heads = pick([heads, heads, heads, *(h for h in (1, 2) if heads % h == 0)])
    decay = pick((*FIXED, *FIXED, *TOKENS))
    return Fact(
        batch=pick((2, 1, 3)),
        heads=heads,
        length=pick((8, 6, 9, 7, 10, 5)),
        dk=pick((4, 3, 2, 5, 6, 1)) if pick.flip(6) else pick((4, 3, 6)),
        dv=pick((3, 4, 2, 5, 6, 1)) if pick.flip(6) else pick((3, 4, 6)),
        decay=decay,
        form=pick(("slope", "log", "gamma")) if decay in FIXED else "log",
        kv_heads=kv_heads,
        scale=pick((1.0, 0.5, 0.25, 1 / math.sqrt(6))),
        initial=pick.flip(5),
        final=pick.flip(4),
        seed=seed,
    )
