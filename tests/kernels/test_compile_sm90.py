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
from pathlib import Path
from typing import Any

import pytest

# name: (kernel, element type, Dk, Dv, per-token decay, tensor descriptors, bytes of stack per thread that are let pass)
CASES = {
    "forward bf16 64": ("forward", "bf16", 64, 64, False, True, 0),
    "forward bf16 128": ("forward", "bf16", 128, 128, False, True, 0),
    "forward bf16 128x64 per token": ("forward", "bf16", 128, 64, True, True, 48),
    "forward bf16 256": ("forward", "bf16", 256, 256, False, True, 0),
    "forward fp16 80 by pointer": ("forward", "fp16", 80, 80, True, False, 96),
    "forward fp32 64": ("forward", "fp32", 64, 64, False, False, 0),
    "backward bf16 64 per token": ("backward", "bf16", 64, 64, True, True, 0),
    "backward bf16 128": ("backward", "bf16", 128, 128, False, True, 0),
    "backward bf16 128 per token": ("backward", "bf16", 128, 128, True, True, 48),
    "backward fp16 96 by pointer": ("backward", "fp16", 96, 96, False, False, 144),
    "segments bf16 128": ("contributions", "bf16", 128, 128, False, True, 0),
    "segments bf16 128 per token": ("contributions", "bf16", 128, 128, True, True, 0),
    "scan": ("scan", "fp32", 128, 128, False, False, 0),
    "decay gradient": ("decay_grad", "bf16", 128, 128, True, False, 0),
    "decode bf16 128": ("decode", "bf16", 128, 128, False, False, 0),
    "decode bf16 256 per token": ("decode", "bf16", 256, 256, True, False, 0),
}


def kernel_and_arguments(
    kernel: str, element: str, dk: int, dv: int, per_token: bool, tma: bool
) -> tuple[Any, dict[str, Any], dict[str, int], int, int]:
    """A kernel, its compile-time arguments, the columns of its tiles, warps and stages, as its launcher chooses."""
    import torch

    from lacompile.kernels.lightning2 import launch
    from lacompile.kernels.lightning2.backward import backward_kernel
    from lacompile.kernels.lightning2.decay_grad import decay_grad_kernel
    from lacompile.kernels.lightning2.decode import decode_kernel, tile
    from lacompile.kernels.lightning2.forward import forward_kernel
    from lacompile.kernels.lightning2.segments import contributions_kernel, scan_kernel

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[element]
    v, k = launch.config(dk, dv, dtype), launch.config(dv, dk, dtype)
    common = {"DK": dk, "DV": dv, "CHUNK": v.chunk, "UNIT": 8, "PER_TOKEN": per_token, "TMA": tma}
    common["PRECISION"] = launch.precision(dtype)
    own = {"BK": v.bk, "BV": v.bv}
    if kernel == "forward":
        columns = {"q_source": v.bk, "k_source": v.bk, "v_source": v.bv, "o_target": v.bv}
        return forward_kernel, common | own | {"HAS_START": True, "STORE_END": True}, columns, v.warps, v.stages
    if kernel == "backward":
        blocks = {"K_FULL": v.bk, "V_FULL": k.bk, "K_PART": k.bv, "V_PART": v.bv}
        flags = {"HAS_START": True, "HAS_D_START": True, "STORE_D_END": True, "DECAY_GRAD": True}
        columns = {"q_full": v.bk, "k_full": v.bk, "v_full": k.bk, "do_full": k.bk, "q_part": k.bv, "k_part": k.bv}
        columns |= {"do_part": v.bv, "dq_part": k.bv, "dk_part": k.bv, "dv_part": v.bv}
        return backward_kernel, common | blocks | flags, columns, v.warps, min(v.stages, k.stages)
    if kernel == "contributions":
        columns = {"b_source": v.bk, "c_source": v.bv}
        return contributions_kernel, common | own | {"REVERSE": True}, columns, v.warps, v.stages
    if kernel == "decode":
        bk, bv, warps = tile(dk, dv)
        const = {"DK": dk, "DV": dv, "BK": bk, "BV": bv, "PER_TOKEN": per_token, "HAS_START": True, "STORE_END": True}
        const |= {"s_v": 1, "e_v": 1}
        return decode_kernel, const, dict.fromkeys(["q_ptr", "k_ptr", "v_ptr", "o_ptr"]), warps, 1
    if kernel == "scan":
        return scan_kernel, {"DKV": dk * dv, "TILE": 1024, "REVERSE": True, "HAS_FIRST": True}, {}, 4, 1
    const = {"DKV": dk * dv, "BLOCKS": 2, "SPAN": launch.span(per_token), "PER_TOKEN": per_token}
    return decay_grad_kernel, const | {"HAS_START": True, "HAS_D_END": True}, {}, 4, 1


def is_aligned(name: str, kind: str) -> bool:
    """What a launch would specialise on: pointers, and the strides of the states that a few tokens meet."""
    return kind.startswith("*") or name in ("s_b", "s_h", "s_k", "e_b", "e_h", "e_k")


def compiled(kernel: str, element: str, dk: int, dv: int, per_token: bool, tma: bool) -> dict[str, int]:
    """Registers, stack bytes per thread, shared memory and warp-group products of one kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function, const, columns, warps, stages = kernel_and_arguments(kernel, element, dk, dv, per_token, tma)
    names = function.arg_names
    types = {name: "i32" for name in names if name not in const} | {"scale": "fp32"}
    for name in names:
        if name in columns and tma:
            types[name] = f"tensordesc<{element}[1,1,{const['CHUNK']},{columns[name]}]>"
        elif name in columns or "marks" in name:
            types[name] = f"*{element}"
        elif name.endswith("_ptr"):
            types[name] = "*fp32"
    source = ASTSource(
        function,
        {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in const.items()},
        {(n,): [["tt.divisibility", 16]] for n, name in enumerate(names) if is_aligned(name, types.get(name, ""))},
    )
    options = {"num_warps": warps, "num_stages": stages}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "shared": made.metadata.shared,
        "products": made.asm["ptx"].count("wgmma.mma_async"),
    }


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, int]]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_fits(case, results):
    kernel, *_, stack = CASES[case]
    found = results[case]
    assert found["stack"] <= stack, found
    assert found["shared"] <= 227 * 1024, found
    if kernel in ("forward", "backward", "contributions"):
        assert found["products"] > 0, "no warp-group products: a tile too small for Hopper's tensor cores"


if __name__ == "__main__":
    print(json.dumps({name: compiled(*case[:-1]) for name, case in CASES.items()}))
