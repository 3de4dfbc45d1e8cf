"""Where a loop's results are put side by side, however that is called; near twins."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lacompile.testing import assert_refused, assert_rewritten

from .test_filled import compared
from .test_series import WIDTH, B, N, attention_of, layer, tokens

SIDE_BY_SIDE = {
    "concat": lambda ys: torch.concat([y[:, None] for y in ys], 1),
    "concatenate": lambda ys: torch.concatenate([y[:, None] for y in ys], axis=1),
    "concatenate by name": lambda ys: torch.concatenate(tensors=[y.unsqueeze(1) for y in ys], dim=-2),
    "hstack": lambda ys: torch.hstack([y[:, None] for y in ys]),
    "hstack of features": lambda ys: torch.hstack(ys).unflatten(1, (N, WIDTH)),
    "hstack of vectors": lambda ys: torch.hstack([y[0] for y in ys]).view(N, WIDTH),
    "vstack": lambda ys: torch.vstack([y[None] for y in ys]),
    "vstack of vectors": lambda ys: torch.vstack([y[0] for y in ys]),
    "row_stack": lambda ys: torch.row_stack([y[None] for y in ys]),
    "column_stack": lambda ys: torch.column_stack([y[:, None] for y in ys]),
    "column_stack of vectors": lambda ys: torch.column_stack([y[0] for y in ys]),
    "dstack": lambda ys: torch.dstack(ys),
    "dstack of columns": lambda ys: torch.dstack([y[..., None] for y in ys]),
    "ATen's own": lambda ys: torch.ops.aten.cat.default([y[:, None] for y in ys], 1),
    "from a tuple": lambda ys: torch.stack(tuple(ys), dim=-2),
}


@pytest.mark.parametrize("join", SIDE_BY_SIDE)
def test_results_put_side_by_side(join):
    def run(x, w, b):
        return SIDE_BY_SIDE[join](attention_of(x, lambda o, x_t: F.linear(o.flatten(1), w, b)))

    report = assert_rewritten(run, tokens(), *layer(), compiled=False)
    assert report.rewrites[0].length == str(N)
    assert report.nodes_after < report.nodes_before / 2


OTHER_ORDERS = {
    "one batch after the other": lambda ys: torch.vstack(ys),
    "vectors of one entry": lambda ys: torch.dstack([y[0] for y in ys]),
    "vectors and rows": lambda ys: torch.vstack([y[0] if t % 2 else y[:1] for t, y in enumerate(ys)]),
    "columns and matrices": lambda ys: torch.column_stack([y[:, 0] if t % 2 else y for t, y in enumerate(ys)]),
    "backwards": lambda ys: torch.vstack([y[0] for y in ys[::-1]]),
    "all pairs": lambda ys: torch.cartesian_prod(*(y[0, :1] for y in ys)),
    "diagonal blocks": lambda ys: torch.block_diag(*ys),
    "written elsewhere": lambda ys: torch.vstack(ys, out=torch.empty(N * B, WIDTH).to(ys[0])),
    "written into": lambda ys: torch.vstack(ys).mul_(2),
}


@pytest.mark.parametrize("join", OTHER_ORDERS)
def test_results_put_together_otherwise(join):
    """Rewritten or not, they are what they are."""

    def run(x, w, b):
        return OTHER_ORDERS[join](attention_of(x, lambda o, x_t: F.linear(o.flatten(1), w, b)))

    given = [a.detach() for a in (tokens(), *layer())] if join == "written elsewhere" else (tokens(), *layer())
    compared(run, *given)


@torch.compiler.allow_in_graph
def joined_in_another_order(ys):
    return torch.cat(ys[::-1], 1)


def test_a_join_that_is_not_of_pytorch_stays():
    def run(x, w, b):
        return joined_in_another_order(attention_of(x, lambda o, x_t: F.linear(o.flatten(1)[:, None], w, b)))

    assert_refused(run, tokens(), *layer(), options={"validate": "off"})
