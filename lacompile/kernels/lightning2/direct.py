"""Launches through CUDA's own driver, of parameters that were packed once for the addresses that they hold.

Triton's launch makes each argument anew in each call: it encodes descriptors and asks the driver about addresses. That
takes longer than a short sequence does on the GPU (docs/kernel-notes/host.md).

What a kernel is handed, and in which order, is Triton's to choose. So a kernel is launched this way only if the driver
says that it takes as many parameters as are packed here, each of the same size; and before it is trusted it is asked
for something whose answer is known, launched both ways (:mod:`.selfcheck`).
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

from torch import Tensor
from triton import knobs
from triton.runtime import driver

MAP, MAP_ALIGNMENT = 128, 64
"""Bytes of a tensor map, and what its address is a multiple of."""
OBJECTS = (MAP + 64, MAP + 128)
"""Bytes of Triton's object around one: before it is what every object begins with, aligned to 64 bytes or to 128."""
NUMBERS = {"i32": "i", "i64": "q", "fp32": "f"}
MOST = 256
"""Addresses whose parameters are kept: those of all layers of a model whose calls are alike."""

Described = Callable[[Tensor], Any]
"""A descriptor of a tensor as Triton's launch takes it."""


class Compiled(Protocol):
    """What of Triton's compiled kernel is read here."""

    src: Any
    metadata: Any
    function: int


@dataclass
class Layout:
    """Where a kernel's parameters lie in one block of memory: that of numbers is known, that of tensors is not."""

    sizes: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    values: bytearray = field(default_factory=bytearray)
    addresses: list[tuple[int, int]] = field(default_factory=list)
    """(offset, which tensor) of each address."""
    maps: list[tuple[int, int, Any]] = field(default_factory=list)
    """(offset, which tensor, how its tiles lie in shared memory) of each tensor map."""

    def add(self, value: bytes, alignment: int) -> int:
        """The offset of one parameter more."""
        offset = -(-len(self.values) // alignment) * alignment
        self.values.extend(bytes(offset - len(self.values)) + value)
        self.offsets.append(offset)
        self.sizes.append(len(value))
        return offset

    def add_number(self, kind: str, value: float) -> None:
        packed = struct.pack(NUMBERS[kind], value)
        self.add(packed, len(packed))


def layout_of(compiled: Compiled, described: Sequence[bool], arguments: Sequence[Any]) -> Layout | None:
    """How parameters are packed; None for a kernel that wants something that is not known here.

    Args:
        compiled: the kernel.
        described: of each tensor, whether it is handed over by a descriptor.
        arguments: descriptors, or anything for other tensors; numbers; compile-time constants.
    """
    plain = {
        "num_ctas": 1, "launch_cooperative_grid": False, "launch_pdl": False,
        "global_scratch_size": 0, "profile_scratch_size": 0,
    }  # fmt: skip
    if any(getattr(compiled.metadata, name, value) != value for name, value in plain.items()):
        return None
    tiles = iter(getattr(compiled.metadata, "tensordesc_meta", None) or ())
    layout = Layout()
    for n, (kind, argument) in enumerate(zip(compiled.src.signature.values(), arguments, strict=True)):
        by_map = kind.startswith("tensordesc")
        if by_map != (n < len(described) and described[n]):
            return None
        if by_map:
            in_shared = next(tiles, None)
            if in_shared is None:  # then the kernel makes the tensor map itself
                return None
            layout.maps.append((layout.add(bytes(MAP), MAP_ALIGNMENT), n, in_shared))
            for size in argument.shape:
                layout.add_number("i32", size)
            for stride in argument.strides:
                layout.add_number("i64", stride)
        elif kind.startswith("*"):
            layout.addresses.append((layout.add(bytes(8), 8), n))
        elif kind in NUMBERS:
            layout.add_number(kind, argument)
        elif kind != "constexpr":
            return None
    for _ in ("global", "profile"):  # scratch, of which there is none
        layout.add(bytes(8), 8)
    return layout


class Direct:
    """A compiled kernel over so many programs, for tensors that differ in their addresses alone."""

    def __init__(
        self, compiled: Compiled, programs: int, device: int, layout: Layout, boxes: Sequence[Described | None]
    ):
        metadata = compiled.metadata
        self.layout, self.boxes, self.device = layout, boxes, device
        self.before = compiled.function, programs, 1, 1, 32 * metadata.num_warps, 1, 1, metadata.shared
        self.known: dict[tuple[int, ...], tuple[Any, Any]] = {}
        self.stream: Callable[[int], int] = driver.active.get_current_stream
        self.launch = _cuda().cuLaunchKernel

    def __call__(self, tensors: Sequence[Tensor]) -> None:
        packed = self.known.get(tuple([x.data_ptr() for x in tensors]))
        if packed is None:
            packed = self.pack(tensors)
        error = self.launch(*self.before, self.stream(self.device), packed[0], None)
        if error:
            raise RuntimeError(f"CUDA did not launch a kernel: {_said(error)}")

    def pack(self, tensors: Sequence[Tensor]) -> tuple[Any, Any]:
        """(addresses of all parameters, the memory they are in)."""
        layout, addresses = self.layout, tuple(x.data_ptr() for x in tensors)
        memory = ctypes.create_string_buffer(len(layout.values) + MAP_ALIGNMENT)
        start = -(-ctypes.addressof(memory) // MAP_ALIGNMENT) * MAP_ALIGNMENT
        ctypes.memmove(start, bytes(layout.values), len(layout.values))
        for offset, n in layout.addresses:
            ctypes.c_uint64.from_address(start + offset).value = addresses[n]
        for offset, n, in_shared in layout.maps:
            box = self.boxes[n]
            assert box is not None
            ctypes.memmove(start + offset, _tensor_map(box(tensors[n]), in_shared), MAP)
        parameters = (ctypes.c_void_p * len(layout.offsets))(*(start + offset for offset in layout.offsets))
        if len(self.known) >= MOST:
            self.known.clear()
        packed = self.known[addresses] = parameters, memory
        return packed


def direct(
    compiled: Compiled, programs: int, boxes: Sequence[Described | None], tensors: Sequence[Tensor], rest: Iterable[Any]
) -> Direct | None:
    """A launch of a kernel for tensors like these; None where Triton has to launch it.

    Args:
        compiled: the kernel, which Triton has launched before.
        programs: how many there are.
        boxes: how each tensor is described; None where it is handed over by its address.
        tensors: those of one call.
        rest: the arguments behind them.
    """
    if compiled.metadata.target.backend != "cuda" or programs == 0:
        return None
    arguments = [x if box is None else box(x) for box, x in zip(boxes, tensors, strict=True)]
    layout = layout_of(compiled, [box is not None for box in boxes], [*arguments, *rest])
    if layout is None or not _takes(compiled.function, layout.sizes):
        return None
    made = Direct(compiled, programs, tensors[0].device.index, layout, boxes)
    try:
        made.pack(tensors)
    except NotImplementedError:
        return None
    return made


def watched() -> bool:
    """Whether somebody wants to know of each launch, which Triton tells them."""
    before, after = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(before, "calls", before) or getattr(after, "calls", after))


@cache
def _cuda() -> Any:
    library = ctypes.CDLL("libcuda.so.1")
    launch = library.cuLaunchKernel
    launch.argtypes = [ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3]
    library.cuFuncGetParamInfo.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_void_p] * 2]
    library.cuGetErrorString.argtypes = [ctypes.c_int, ctypes.c_void_p]
    return library


def _takes(function: int, sizes: Sequence[int]) -> bool:
    """Whether a kernel's parameters have these sizes in bytes, by the driver's word."""
    try:
        ask = _cuda().cuFuncGetParamInfo
    except (OSError, AttributeError):  # no driver of that name, or one before CUDA 12.4
        return False
    offset, size = ctypes.c_size_t(), ctypes.c_size_t()
    for n, expected in enumerate(sizes):
        if ask(function, n, ctypes.byref(offset), ctypes.byref(size)) or size.value != expected:
            return False
    return bool(ask(function, len(sizes), ctypes.byref(offset), ctypes.byref(size)))


def _tensor_map(described: Any, in_shared: Any) -> bytes:
    """A descriptor as the hardware reads it, which is the last that Triton's object for it holds."""
    from triton.backends.nvidia.driver import make_tensordesc_arg

    held = make_tensordesc_arg(described, in_shared)[0]
    size = type(held).__basicsize__
    if size not in OBJECTS:
        raise NotImplementedError(f"a tensor map in an object of {size} bytes")
    return ctypes.string_at(id(held) + size - MAP, MAP)


def _said(error: int) -> str:
    text = ctypes.c_char_p()
    _cuda().cuGetErrorString(error, ctypes.byref(text))
    return f"{(text.value or b'unknown error').decode()} ({error})"
