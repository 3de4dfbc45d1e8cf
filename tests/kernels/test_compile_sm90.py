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

import pytest

# name: (kernel, element type, Dk, Dv, per-token decay, bytes of stack per thread that are let pass)
CASES = {
    "forward bf16 64": ("forward", "bf16", 64, 64, False, 0),
    "forward bf16 128": ("forward", "bf16", 128, 128, False, 48),
    "forward bf16 128x64 per token": ("forward", "bf16", 128, 64, True, 80),
    "forward bf16 256": ("forward", "bf16", 256, 256, False, 64),
    "forward fp16 80": ("forward", "fp16", 80, 80, False, 32),
    "backward bf16 64": ("backward", "bf16", 64, 64, False, 0),
    "backward bf16 128": ("backward", "bf16", 128, 128, False, 64),
    "backward bf16 128 per token": ("backward", "bf16", 128, 128, True, 144),
    "segments bf16 128": ("contributions", "bf16", 128, 128, False, 0),
    "segments bf16 128 per token": ("contributions", "bf16", 128, 128, True, 0),
    "scan": ("scan", "fp32", 128, 128, False, 0),
    "decay gradient": ("decay_grad", "bf16", 128, 128, True, 0),
}
TENSORS = {"q_ptr", "k_ptr", "v_ptr", "o_ptr", "do_ptr", "dq_ptr", "dk_ptr", "dv_ptr", "b_ptr", "c_ptr"}
MARKS = {"marks_ptr", "d_marks_ptr"}


def sizes(kernel: str, element: str, dk: int, dv: int, per_token: bool) -> tuple[object, dict[str, object], int, int]:
    """A kernel, its compile-time arguments, warps and stages, as its launcher would choose them."""
    import torch

    from lacompile.kernels.lightning2 import launch
    from lacompile.kernels.lightning2.backward import backward_kernel
    from lacompile.kernels.lightning2.decay_grad import decay_grad_kernel
    from lacompile.kernels.lightning2.forward import forward_kernel
    from lacompile.kernels.lightning2.segments import contributions_kernel, scan_kernel

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[element]
    for_v, for_k = launch.config(dk, dv, dtype), launch.config(dv, dk, dtype)
    common = {"DK": dk, "DV": dv, "CHUNK": for_v.chunk, "UNIT": 8, "PER_TOKEN": per_token}
    common["PRECISION"] = launch.precision(dtype)
    own = {"BK": for_v.bk, "BV": for_v.bv}
    if kernel == "forward":
        const = common | own | {"HAS_START": True, "STORE_END": True}
        return forward_kernel, const, for_v.warps, for_v.stages
    if kernel == "backward":
        blocks = {"K_FULL": for_v.bk, "V_FULL": for_k.bk, "K_PART": for_k.bv, "V_PART": for_v.bv}
        flags = {"HAS_START": True, "HAS_D_START": True, "STORE_D_END": True, "DECAY_GRAD": True}
        return backward_kernel, common | blocks | flags, for_v.warps, min(for_v.stages, for_k.stages)
    if kernel == "contributions":
        return contributions_kernel, common | own | {"REVERSE": True}, for_v.warps, for_v.stages
    if kernel == "scan":
        return scan_kernel, {"DKV": dk * dv, "TILE": 1024, "REVERSE": True, "HAS_FIRST": True}, 4, 1
    const = {"DKV": dk * dv, "BLOCKS": 2, "SPAN": launch.span(per_token), "PER_TOKEN": per_token}
    return decay_grad_kernel, const | {"HAS_START": True, "HAS_D_END": True}, 4, 1


def compiled(kernel: str, element: str, dk: int, dv: int, per_token: bool) -> dict[str, int]:
    """Registers, stack bytes per thread, shared memory and warp-group products of one kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function, const, warps, stages = sizes(kernel, element, dk, dv, per_token)
    names = function.arg_names
    types = {name: f"*{element}" if name in TENSORS | MARKS else "*fp32" for name in names if name.endswith("_ptr")}
    types |= {name: "i32" for name in names if name not in types and name not in const} | {"scale": "fp32"}
    source = ASTSource(
        function,
        {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in const.items()},
        {(n,): [["tt.divisibility", 16]] for n, name in enumerate(names) if name.endswith("_ptr")},
    )
    options = {"num_warps": warps, "num_stages": stages}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {
        "registers": int(registers),
        "stack": int(stack),
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
    print(json.dumps({name: compiled(*case[:5]) for name, case in CASES.items()}))
