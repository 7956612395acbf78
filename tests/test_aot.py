"""Every Triton kernel compiles ahead of time, without a GPU, for the architectures we name, and spills no register."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import pytest

from spo_fast.ops import geglu, group_norm_silu, preference_loss, transition
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
    **dict.fromkeys(("partial_ptr", "sums_ptr", "mean_ptr", "rstd_ptr"), "*fp32"),
    **dict.fromkeys(("log_ratio_ptr", "weight_ptr", "loss_ptr", "grad_ptr", "stats_ptr"), "*fp32"),
}
SCALARS = dict.fromkeys(("guidance", "beta", "low", "high", "eps"), "fp32")  # all others are 32-bit counts
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
    "geglu": (geglu._geglu_kernel, {"BLOCK": geglu.BLOCK}),
    "geglu backward": (geglu._geglu_backward_kernel, {"BLOCK": geglu.BLOCK}),
    "group_norm_silu combine": (group_norm_silu._combine_kernel, {"BLOCK": group_norm_silu.PARTS}),
}
for _layout, _last in (("channels-last", True), ("NCHW", False)):
    _tile = group_norm_silu._constants(_last)
    KERNELS |= {
        f"group_norm_silu moments, {_layout}": (group_norm_silu._moments_kernel, _tile),
        f"group_norm_silu, {_layout}": (group_norm_silu._normalise_kernel, {"SILU": True, **_tile}),
        f"group_norm_silu sums, {_layout}": (group_norm_silu._grad_sums_kernel, {"SILU": True, **_tile}),
        f"group_norm_silu backward, {_layout}": (group_norm_silu._grad_input_kernel, {"SILU": True, **_tile}),
    }


def compile_for(kernel, constants, architecture, m_type, divisible=()):
    """The kernel's PTX for one architecture; m_type is what the network's outputs point to. `divisible` names the
    counts that are multiples of 16 at the real shapes; Triton then knows it of them and of all pointers."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def type_of(name):
        if name in constants:
            return "constexpr"
        return (POINTERS.get(name) or m_type) if name.endswith("_ptr") else SCALARS.get(name, "i32")

    names = kernel.arg_names
    known = [i for i, name in enumerate(names) if divisible and (name.endswith("_ptr") or name in divisible)]
    attributes = {(i,): [["tt.divisibility", 16]] for i in known}
    source = ASTSource(kernel, {name: type_of(name) for name in names}, constants, attributes)
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
    for m_type in ("*bf16", "*fp32") if "preference" not in name else ("*fp32",):
        compiled = compile_for(kernel, constants, architecture, m_type)
        assert compiled.asm["cubin"]
        report = resources(compiled.asm["ptx"], architecture)
        spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
        assert spills is not None and spills.groups() == ("0", "0", "0"), report
        assert int(re.search(r"Used (\d+) registers", report).group(1)) <= 255


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("m_type", ["*bf16", "*fp32"])
@pytest.mark.parametrize("name", [n for n in KERNELS if n.startswith(("geglu", "group_norm_silu"))])
def test_real_shapes_move_16_bytes_at_a_time(name, m_type, architecture):
    """C and D are multiples of 16 in every model and S from 8x8 on: loads are wide, and half a multiprocessor's
    threads or more find registers."""
    kernel, constants = KERNELS[name]
    compiled = compile_for(kernel, constants, architecture, m_type, divisible=("C", "S", "D", "chunk"))
    report = resources(compiled.asm["ptx"], architecture)
    assert "0 bytes spill stores" in report
    if "combine" not in name:  # it reads interleaved pairs
        assert "ld.global.v4.b32" in compiled.asm["ptx"]
        assert int(re.search(r"Used (\d+) registers", report).group(1)) <= 128


@pytest.mark.parametrize("name", KERNELS)
def test_compiles_with_counts_of_one(name):
    """Triton makes an integer argument of 1 a constant, which has no methods of a tensor."""
    kernel, constants = KERNELS[name]
    ones = {n: 1 for n in kernel.arg_names if n not in constants and not n.endswith("_ptr") and n not in SCALARS}
    assert compile_for(kernel, {**constants, **ones}, 90, "*bf16").asm["cubin"]
