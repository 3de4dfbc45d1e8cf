"""How tiles lie in shared memory."""

from __future__ import annotations

from triton.experimental.gluon.language import NVMMASharedLayout

SWIZZLED = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
"""Of a tile ``[1,1,rows,columns]`` of 16-bit elements, as the tensor memory accelerator writes it."""
