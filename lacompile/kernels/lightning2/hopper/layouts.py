"""How tiles lie in shared memory."""

from __future__ import annotations

import torch
from triton.experimental.gluon.language import NVMMASharedLayout


def swizzled(dtype: torch.dtype) -> NVMMASharedLayout:
    """Of a tile ``[1,1,rows,columns]`` of elements of this dtype, as the tensor memory accelerator writes it."""
    return NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=dtype.itemsize * 8, rank=4)
