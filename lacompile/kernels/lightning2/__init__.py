"""Triton kernels for decayed causal linear attention: ``forward`` and ``backward``, the contract of kernels/cpu.py.

One body (:mod:`.body`) computes the output and all three gradients; see arXiv 2401.04658 for the tiling.
"""

from .backward import backward
from .forward import forward

__all__ = ["backward", "forward"]
