"""Every Triton kernel compiles ahead of time, without a GPU, for the architectures we name, and spills no register."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from spo_fast.ops import lora_linear, merge_lora, preference_loss, transition
from spo_fast.ops.backend import INTERPRET

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1 replaces the kernels by Python")

ARCHITECTURES = [80, 89, 90, 100]
POINTERS = {  # what each argument points to
    "rows_ptr": "*i64",
    "states_ptr": "*i64",
    "keys_ptr": "*i64",
    "table_ptr": "*fp64",
    **dict.fromkeys(("x_t_ptr", "x_prev_ptr", "noise_ptr", "x0_ptr", "child_ptr", "out_ptr"), "*fp32"),
    **dict.fromkeys(("grad_log_ratio_ptr", "grad_kl_ptr"), "*fp32"),
    **dict.fromkeys(("log_ratio_ptr", "weight_ptr", "loss_ptr", "grad_ptr", "stats_ptr"), "*fp32"),
    **dict.fromkeys(("down_ptr", "up_ptr", "delta_ptr", "partial_ptr"), "*fp32"),
    "key_ptr": "*i64",
}
SCALARS = {
    "scale": "fp32",
    "guidance": "fp32",
    "beta": "fp32",
    "low": "fp32",
    "high": "fp32",
}  # all others are 32-bit counts
KERNELS = {
    "transition, keyed": (
        transition._transition_kernel,
        {"HAS_UNCOND": True, "HAS_NOISE": False, "WANT_X0": True, "BLOCK": transition.GROUPS},
    ),
    "transition, supplied noise, no guidance": (
        transition._transition_kernel,
        {"HAS_UNCOND": False, "HAS_NOISE": True, "WANT_X0": False, "BLOCK": transition.GROUPS},
    ),
    "log_ratio": (transition._log_ratio_kernel, {"HAS_UNCOND": True, "BLOCK": transition.BLOCK}),
    "log_ratio backward": (transition._log_ratio_backward_kernel, {"HAS_UNCOND": True, "BLOCK": transition.BLOCK}),
    "preference_loss, pairs": (preference_loss._preference_loss_kernel, {"K": 2, "S": 1, "BLOCK": 256}),
    "preference_loss, four of three": (preference_loss._preference_loss_kernel, {"K": 4, "S": 3, "BLOCK": 64}),
    **{
        f"lora_linear, {tokens} tokens, rank {rank}, {str(dtype)[6:]}": (
            lora_linear._down_up_kernel,
            {"HAS_BIAS": True, "R": lora_linear._padded(rank), **lora_linear._down_up_blocks(tokens, rank, dtype)},
        )
        for tokens, rank, dtype in (
            *((tokens, rank, torch.bfloat16) for tokens, rank in ((32768, 64), (616, 64), (32768, 4), (32768, 128))),
            (32768, 64, torch.float32),
        )
    },
    **{
        f"lora_linear, gradients, rank {rank}, {str(dtype)[6:]}": (
            lora_linear._outer_kernel,
            {"R": lora_linear._padded(rank), **lora_linear._outer_blocks(dtype)},
        )
        for rank, dtype in ((64, torch.bfloat16), (4, torch.bfloat16), (128, torch.bfloat16), (64, torch.float32))
    },
    "merge_lora": (merge_lora._merge_kernel, {"BLOCK": merge_lora.GROUPS}),
}


def compile_for(kernel, constants, architecture, m_type):
    """The kernel's PTX for one architecture; m_type is what the network's outputs point to."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def type_of(name):
        if name in constants:
            return "constexpr"
        return (POINTERS.get(name) or m_type) if name.endswith("_ptr") else SCALARS.get(name, "i32")

    source = ASTSource(kernel, {name: type_of(name) for name in kernel.arg_names}, constants)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32))


def resources(ptx: str, architecture: int) -> str:
    """What ptxas -v says of a kernel."""
    from triton.backends.nvidia.compiler import get_ptxas

    ptxas = get_ptxas(architecture)
    name = re.search(r"\.target (sm_\w+)", ptx).group(1)
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "kernel.ptx"
        file.write_text(ptx)
        command = [ptxas.path, "-v", f"-arch={name}", str(file), "-o", str(file.with_suffix(".cubin"))]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_without_spills(name, architecture):
    kernel, constants = KERNELS[name]
    one = {"preference_loss": "*fp32", "bfloat16": "*bf16", "float32": "*fp32"}  # blocks chosen for one type
    for m_type in next(((t,) for word, t in one.items() if word in name), ("*bf16", "*fp32")):
        compiled = compile_for(kernel, constants, architecture, m_type)
        assert compiled.asm["cubin"]
        report = resources(compiled.asm["ptx"], architecture)
        spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
        assert spills is not None and spills.groups() == ("0", "0", "0"), report
        assert int(re.search(r"Used (\d+) registers", report).group(1)) <= 255


@pytest.mark.parametrize("name", KERNELS)
def test_compiles_with_counts_of_one(name):
    """Triton makes an integer argument of 1 a constant, which has no methods of a tensor."""
    kernel, constants = KERNELS[name]
    ones = {n: 1 for n in kernel.arg_names if n not in constants and not n.endswith("_ptr") and n not in SCALARS}
    assert compile_for(kernel, {**constants, **ones}, 90, "*bf16").asm["cubin"]
