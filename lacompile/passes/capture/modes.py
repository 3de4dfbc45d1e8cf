"""Nodes that switch a mode of PyTorch: gradients, inference, autocast."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

GRAD_MODE = (torch._C._set_grad_enabled, torch.set_grad_enabled)
INFERENCE_MODE = (torch.autograd.grad_mode._enter_inference_mode, torch.autograd.grad_mode._exit_inference_mode)
AUTOCAST = (torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast)


def switches_autocast(graph: fx.Graph) -> bool:
    """Whether an autocast begins or ends in it: the same call may then round in another way elsewhere."""
    return any(graph.find_nodes(op="call_function", target=f) for f in AUTOCAST)


def sets_grad_mode(node: fx.Node) -> bool:
    """Whether a node says whether gradients are recorded from there on, and does nothing else."""
    return node.op == "call_function" and node.target in GRAD_MODE and isinstance(node.args[0], bool)


def grad_modes(gm: fx.GraphModule) -> dict[fx.Node, bool]:
    """Whether gradients are recorded when each node runs."""
    enabled = torch.is_grad_enabled()
    outside: list[bool] = []
    out = {}
    for node in gm.graph.nodes:
        out[node] = enabled
        if sets_grad_mode(node):
            enabled = bool(node.args[0])
        elif node.target is INFERENCE_MODE[0] and node.args[0]:
            outside.append(enabled)
            enabled = False
        elif node.target is INFERENCE_MODE[1] and outside:
            enabled = outside.pop()
    return out


class Autocasts:
    """The autocasts that a graph is inside of while it runs."""

    def __init__(self) -> None:
        self._entered: list[Any] = []

    def switch(self, node: fx.Node, args: Any) -> Any:
        """Runs a node that enters or leaves one."""
        if node.target is AUTOCAST[0]:
            self._entered.append(AUTOCAST[0](*args))
            return self._entered[-1]
        self._entered.remove(args[0])
        return AUTOCAST[1](args[0])

    def leave_all(self) -> None:
        for mode in reversed(self._entered):
            AUTOCAST[1](mode)
