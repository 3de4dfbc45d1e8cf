"""The main kernels compile for Hopper without a GPU, and keep to their registers: a spill is a slow kernel.

Compilation happens in a process of its own, since another test may have made these kernels interpreted ones here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from .sass import overwritten, products_from_registers

# name: (kernel, element type, Dk, Dv, per-token decay, tensor descriptors, bytes of stack per thread that are let pass)
CASES = {
    "hopper forward bf16 64 shared": ("hopper forward 2", "bf16", 64, 64, False, True, 0),
    "hopper forward bf16 64 shared per token": ("hopper forward 2", "bf16", 64, 64, True, True, 16),
    "hopper forward bf16 64 alone": ("hopper forward 0", "bf16", 64, 64, False, True, 0),
    "hopper forward bf16 64 alone six stages": ("hopper forward 1", "bf16", 64, 64, False, True, 0),
    "hopper forward bf16 128": ("hopper forward 0", "bf16", 128, 128, False, True, 0),
    "hopper forward bf16 128 per token": ("hopper forward 0", "bf16", 128, 128, True, True, 0),
    "hopper forward fp16 112x80 per token two stages": ("hopper forward 1", "fp16", 112, 80, True, True, 80),
    "hopper backward bf16 64 shared": ("hopper backward 2", "bf16", 64, 64, False, True, 32),
    "hopper backward bf16 64 shared per token with decay": ("hopper decays 1", "bf16", 64, 64, True, True, 112),
    "hopper backward bf16 64 alone": ("hopper backward 0", "bf16", 64, 64, False, True, 0),
    "hopper backward bf16 64 shared with decay": ("hopper decays 1", "bf16", 64, 64, False, True, 112),
    "hopper backward bf16 64 alone with decay": ("hopper decays 0", "bf16", 64, 64, False, True, 0),
    "hopper backward bf16 64 alone per token with decay": ("hopper decays 0", "bf16", 64, 64, True, True, 0),
    # At 128 nearly all of it is after the loop, where the state at the end is written.
    "hopper backward bf16 128": ("hopper backward 0", "bf16", 128, 128, False, True, 640),
    "hopper backward bf16 128 with decay": ("hopper decays 0", "bf16", 128, 128, False, True, 640),
    "hopper backward bf16 128 per token with decay": ("hopper decays 0", "bf16", 128, 128, True, True, 640),
    "hopper forward fp32 64": ("hopper forward 0", "fp32", 64, 64, False, True, 0),
    "hopper forward fp32 128x64 per token": ("hopper forward 0", "fp32", 128, 64, True, True, 0),
    "hopper forward fp32 128": ("hopper forward 0", "fp32", 128, 128, False, True, 0),
    "hopper backward fp32 64 with decay": ("hopper decays 0", "fp32", 64, 64, False, True, 0),
    "hopper backward fp32 128": ("hopper backward 0", "fp32", 128, 128, False, True, 0),
    "hopper backward fp32 128x64 per token with decay": ("hopper decays 0", "fp32", 128, 64, True, True, 0),
    "hopper forward fp32 64 of bf16": ("hopper forward 0 qkv", "fp32", 64, 64, True, True, 0),
    "hopper forward fp32 128x64 per token of bf16": ("hopper forward 0 qk", "fp32", 128, 64, True, True, 0),
    "hopper backward fp32 128 of bf16": ("hopper backward 0 qkv", "fp32", 128, 128, False, True, 0),
    "hopper backward fp32 128x64 per token with decay of bf16": ("hopper decays 0 qk", "fp32", 128, 64, True, True, 0),
    # With one decay for all tokens the portable backward kernel spills; marks at every chunk were up to a tenth faster,
    # and took more than twice the memory (docs/kernel-notes/decay-gradient.md).
    "forward bf16 64": ("forward", "bf16", 64, 64, False, True, 0),
    "backward bf16 64 two stages": ("backward 1", "bf16", 64, 64, True, True, 0),
    "backward bf16 256 one stage": ("backward 1", "bf16", 256, 256, False, True, 392),
    "forward bf16 128": ("forward", "bf16", 128, 128, False, True, 0),
    "forward bf16 128x64 per token": ("forward", "bf16", 128, 64, True, True, 48),
    "forward bf16 256": ("forward", "bf16", 256, 256, False, True, 0),
    "forward fp16 80 by pointer": ("forward", "fp16", 80, 80, True, False, 96),
    # Tiles of fp32 that spill little or nothing are slower (docs/kernel-notes/fp32.md).
    "forward fp32 64": ("forward", "fp32", 64, 64, False, False, 320),
    "forward fp32 128": ("forward", "fp32", 128, 128, False, False, 608),
    "backward fp32 64": ("backward", "fp32", 64, 64, True, False, 640),
    "backward fp32 128": ("backward", "fp32", 128, 128, True, False, 984),
    "backward bf16 64 per token": ("backward", "bf16", 64, 64, True, True, 0),
    "backward bf16 128": ("backward", "bf16", 128, 128, False, True, 88),
    "backward bf16 128 per token": ("backward", "bf16", 128, 128, True, True, 48),
    "backward fp16 96 by pointer": ("backward", "fp16", 96, 96, False, False, 320),
    "segments bf16 128": ("contributions", "bf16", 128, 128, False, True, 0),
    "segments bf16 128 per token": ("contributions", "bf16", 128, 128, True, True, 0),
    "segments fp32 128x64 per token": ("contributions", "fp32", 128, 64, True, False, 0),
    "segments fp32 128x64 per token of bf16": ("contributions narrow", "fp32", 128, 64, True, False, 0),
    "scan": ("scan", "fp32", 128, 128, False, False, 0),
    "decay gradient": ("decay_grad", "bf16", 128, 128, True, False, 0),
    "inside fp32 64": ("inside", "fp32", 64, 64, True, False, 0),
    "inside fp32 64 of bf16": ("inside narrow", "fp32", 64, 64, True, False, 0),
    "inside fp32 128": ("inside", "fp32", 128, 128, True, False, 0),
    "decode bf16 128": ("decode", "bf16", 128, 128, False, False, 0),
    "decode bf16 256 per token": ("decode", "bf16", 256, 256, True, False, 0),
}


DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""By name: PyTorch is for the process that compiles."""


@dataclass
class Case:
    """A kernel, its compile-time arguments, the columns of its tiles, and what it is launched with."""

    kernel: Any
    constants: dict[str, Any]
    columns: dict[str, int]
    options: dict[str, int]


def case(name: str, element: str, dk: int, dv: int, per_token: bool, tma: bool) -> Case:
    """As the launcher chooses, in the form that needs the most: with states in and out, and the decay's gradient."""
    import torch

    from lacompile.kernels.lightning2 import inside, launch, segments
    from lacompile.kernels.lightning2.backward import backward_kernel
    from lacompile.kernels.lightning2.decay_grad import decay_grad_kernel
    from lacompile.kernels.lightning2.decode import decode_kernel, tile
    from lacompile.kernels.lightning2.forward import forward_kernel
    from lacompile.kernels.lightning2.hopper.backward import backward_kernel as hopper_backward
    from lacompile.kernels.lightning2.hopper.forward import forward_kernel as hopper_forward
    from lacompile.kernels.tuning import space

    dtype = getattr(torch, DTYPES[element])
    name, _, place = name.partition(" ") if not name.startswith("hopper") else (name, "", "")
    v, k = (space.portables(*sizes, dtype)[int(place) if place.isdigit() else 0] for sizes in ((dk, dv), (dv, dk)))
    pre = launch.prepass_config(dk, dv, dtype)
    common: dict[str, Any] = {"DK": dk, "DV": dv, "CHUNK": v.chunk, "PER_TOKEN": per_token}
    own = {"UNIT": 8, "TMA": tma, "PRECISION": launch.precision(dtype, torch.device("cuda"))}
    end = {"HAS_START": True, "STORE_END": True}
    ends = {"HAS_START": True, "HAS_D_START": True, "STORE_D_END": True, "DECAY_GRAD": True}

    def forward_columns(bk: int, bv: int) -> dict[str, int]:
        return {"q_source": bk, "k_source": bk, "v_source": bv, "o_target": bv}

    def backward_columns(k_full: int, v_full: int, k_part: int, v_part: int) -> dict[str, int]:
        full = {"q_full": k_full, "k_full": k_full, "v_full": v_full, "do_full": v_full}
        part = dict.fromkeys(("q_part", "k_part", "dq_part", "dk_part"), k_part)
        return full | part | dict.fromkeys(("do_part", "dv_part"), v_part)

    if name.startswith("hopper"):
        _, use, n, *narrow = name.split()
        tiles = space.hopper(dk, dv, dtype, use == "decays")[int(n)]
        turned = space.hopper(dv, dk, dtype, use == "decays")[int(n)]
        bv = tiles.bv
        common |= {"BV": bv, "CHUNK": tiles.chunk} | tiles.constants | launch.digits(dtype, "".join(narrow))
        if use == "forward":
            return Case(hopper_forward, common | end | {"BK": tiles.bk}, forward_columns(tiles.bk, bv), tiles.options)
        ends |= {"DECAY_GRAD": use == "decays", "K_FULL": tiles.bk, "V_FULL": turned.bk}
        return Case(hopper_backward, common | ends, backward_columns(tiles.bk, turned.bk, bv, bv), tiles.options)
    options = {"num_warps": v.warps, "num_stages": v.stages}
    if name == "forward":
        return Case(forward_kernel, common | own | end | {"BK": v.bk, "BV": v.bv}, forward_columns(v.bk, v.bv), options)
    if name == "backward":
        blocks = {"K_FULL": v.bk, "V_FULL": k.bk, "K_PART": k.bv, "V_PART": v.bv}
        options["num_stages"] = min(v.stages, k.stages)
        return Case(backward_kernel, common | own | ends | blocks, backward_columns(v.bk, k.bk, k.bv, v.bv), options)
    if name == "contributions":
        common |= {"BK": pre.bk, "BV": pre.bv, "BOTH": True, "NARROW": bool(place)}
        columns = {"k_source": pre.bk, "v_source": pre.bv, "q_source": pre.bk, "do_source": pre.bv}
        options = {"num_warps": pre.warps, "num_stages": pre.stages}
        return Case(segments.contributions_kernel, common | own, columns, options)
    if name == "inside":
        const = {"DK": dk, "DV": dv, "BLOCK": inside.BLOCK, "CHUNK": v.chunk, "PER_TOKEN": per_token}
        const |= {"UNIT": 8, "PRECISION": own["PRECISION"], "NARROW": bool(place)}
        columns = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "do_ptr"), 0)
        return Case(inside.inside_kernel, const, columns, {"num_warps": inside.warps(v.chunk)})
    if name == "decode":
        bk, bv, warps = tile(dk, dv)
        const = {"DK": dk, "DV": dv, "BK": bk, "BV": bv, "PER_TOKEN": per_token, "s_v": 1, "e_v": 1} | end
        return Case(decode_kernel, const, dict.fromkeys(["q_ptr", "k_ptr", "v_ptr", "o_ptr"], 0), {"num_warps": warps})
    if name == "scan":
        const = {"DKV": dk * dv, "TILE": 1024, "CHUNK": v.chunk, "PIECES": launch.PIECES, "BOTH": True}
        const |= {"PER_TOKEN": per_token, "HAS_FIRST": True, "HAS_D_LAST": True}
        return Case(segments.scan_kernel, const, {}, {"num_warps": 4})
    const = {"DKV": dk * dv, "BLOCKS": 2, "SPAN": launch.SPAN, "INSIDE": True, "PER_TOKEN": per_token}
    return Case(decay_grad_kernel, const | {"HAS_START": True, "HAS_D_END": True}, {}, {"num_warps": 4})


def is_aligned(name: str, kind: str) -> bool:
    """What a launch would specialise on: pointers, and the strides of the states that a few tokens meet."""
    return kind.startswith("*") or name in ("s_b", "s_h", "s_k", "e_b", "e_h", "e_k")


def parameter_sizes(ptx: str) -> list[int]:
    """Bytes of each parameter of a kernel."""
    header = ptx[ptx.index(".entry") :]
    found = re.findall(r"\.param (?:\.align \d+ )?\.[a-z](\d+) [^,)[]*(?:\[(\d+)\])?", header[: header.index(")")])
    return [int(bits) // 8 * int(count or 1) for bits, count in found]


def compiled(name: str, element: str, dk: int, dv: int, per_token: bool, tma: bool) -> dict[str, Any]:
    """Registers, stack bytes per thread, shared memory, warp-group products and parameters of one kernel."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    from lacompile.kernels.lightning2.direct import layout_of
    from lacompile.kernels.lightning2.hopper.layouts import swizzled

    made_of = case(name, element, dk, dv, per_token, tma)
    const, columns, gluon = made_of.constants, made_of.columns, name.startswith("hopper")
    names = made_of.kernel.arg_names
    dtype = getattr(torch, DTYPES[element])
    layout = swizzled(dtype)
    types = {name: "i32" for name in names if name not in const} | {"scale": "fp32"}
    for name in names:
        if name in columns and tma:
            tile = f"{element}[1,1,{const['CHUNK']},{columns[name]}]"
            types[name] = f"tensordesc<{tile},{layout!r}>" if gluon else f"tensordesc<{tile}>"
        elif name in columns:
            types[name] = f"*{element}"
        elif name.endswith("_ptr"):
            types[name] = "*fp32"
    source = (GluonASTSource if gluon else ASTSource)(
        made_of.kernel,
        {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in const.items()},
        {(n,): [["tt.divisibility", 16]] for n, name in enumerate(names) if is_aligned(name, types.get(name, ""))},
    )
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=made_of.options)
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        asked = {"cuobjdump": "--dump-resource-usage", "nvdisasm": "-c"}
        usage, listing = (
            subprocess.run([tools / tool, option, file.name], capture_output=True, text=True).stdout
            for tool, option in asked.items()
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    rest = [const.get(name, 1) for name in names if not name.endswith(("_ptr", "_source", "_target", "_full", "_part"))]
    described = [kind.startswith("tensordesc") for kind in source.signature.values()][: len(names) - len(rest)]
    layout = layout_of(made, described, [*[SimpleNamespace(shape=[1] * 4, strides=[1] * 4)] * len(described), *rest])
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "shared": made.metadata.shared,
        "products": made.asm["ptx"].count("wgmma.mma_async"),
        "from_registers": products_from_registers(listing),
        "overwritten": overwritten(listing),
        "packed": layout and layout.sizes,
        "taken": parameter_sizes(made.asm["ptx"]),
    }


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.test_compile_sm90"]
    done = subprocess.run(command, env=env, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_fits(case, results):
    kernel, *_, stack = CASES[case]
    found = results[case]
    assert found["stack"] <= stack, found
    assert found["shared"] <= 227 * 1024, found
    if kernel.split()[0] in ("hopper", "forward", "backward", "contributions"):
        assert found["products"] > 0, "no warp-group products: a tile too small for Hopper's tensor cores"


@pytest.mark.parametrize("case", CASES)
def test_no_operand_is_overwritten(case, results):
    """Registers that the tensor cores read are left alone until they have."""
    found = results[case]
    assert found["from_registers"] or not case.startswith("hopper")
    assert not found["overwritten"]


def test_an_operand_that_is_overwritten_is_seen():
    lines = [
        "HGMMA.64x32x16.F32.BF16 R116, R136, gdesc[UR48], RZ, !UPT", "@P0 FADD R140, R1, R2", "LDS.64 R135, [R3]",
        "STS [R137], R1", "WARPGROUP.DEPBAR.LE gsb0, 0x0", "MOV R136, R2", "HGMMA.64x64x16.F32 R24, gdesc[UR4], R24",
    ]  # fmt: skip
    listing = "\n".join(f"        /*54{n}0*/                   {line} ;" for n, line in enumerate(lines))
    assert products_from_registers(listing) == 1
    assert overwritten(listing) == ["LDS.64 R135, [R3]"]


@pytest.mark.parametrize("case", CASES)
def test_parameters_are_packed_as_the_kernel_takes_them(case, results):
    """What CUDA's driver says of a kernel before it is launched without Triton."""
    found = results[case]
    assert len(found["taken"]) > 4
    assert found["packed"] == found["taken"]


if __name__ == "__main__":
    print(json.dumps({name: compiled(*case[:-1]) for name, case in CASES.items()}))
