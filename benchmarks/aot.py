"""Every Triton kernel, compiled ahead of time without a GPU: registers, shared memory and spills of each.

    python -m benchmarks.aot [--arch 80 89 90 100] [--only transition ...] [--record]
    python -m benchmarks.aot --tritons 3.6.0 3.7.0 3.8.0 3.9.0 --record    # each from PyPI, in a folder of its own

Exit status 1 if any kernel spills. tests/test_aot.py asserts the same of the Triton that is installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.records import Records, results_path, table
from spo_fast.ops import (
    ada_norm,
    geglu,
    gelu_tanh,
    group_norm_silu,
    joint_heads,
    log_ratio,
    lora_linear,
    merge_lora,
    preference_loss,
    resize_normalize,
    transition,
)
from spo_fast.ops.backend import INTERPRET

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
    **{f"{name}_{i}_ptr": "*bf16" for name in ("down", "up") for i in range(3)},  # a rollout has no masters
    "key_ptr": "*i64",
    **dict.fromkeys(("partial_ptr", "sums_ptr", "mean_ptr", "rstd_ptr", "cos_ptr", "sin_ptr"), "*fp32"),
}
# all other scalars are 32-bit counts
SCALARS = {
    **dict.fromkeys(("guidance", "guidance_low", "beta", "low", "high", "beta_low", "low_low", "high_low"), "fp32"),
    **dict.fromkeys(("scale", "eps"), "fp32"),
    **dict.fromkeys(("mean_r", "mean_g", "mean_b", "std_r", "std_g", "std_b"), "fp32"),
}
KERNELS = {
    "transition, keyed": (
        transition._transition_kernel,
        {"HAS_UNCOND": True, "HAS_NOISE": False, "WANT_X0": True, "BLOCK": transition.GROUPS},
    ),
    "transition, supplied noise, no guidance": (
        transition._transition_kernel,
        {"HAS_UNCOND": False, "HAS_NOISE": True, "WANT_X0": False, "BLOCK": transition.GROUPS},
    ),
    "log_ratio": (log_ratio._log_ratio_kernel, {"HAS_UNCOND": True, "BLOCK": log_ratio.BLOCK}),
    "log_ratio backward": (log_ratio._log_ratio_backward_kernel, {"HAS_UNCOND": True, "BLOCK": log_ratio.BLOCK}),
    "preference_loss, pairs": (preference_loss._preference_loss_kernel, {"K": 2, "S": 1, "BLOCK": 256}),
    "preference_loss, four of three": (preference_loss._preference_loss_kernel, {"K": 4, "S": 3, "BLOCK": 64}),
    "resize_normalize": (resize_normalize._resize_normalize_kernel, {"BLOCK": resize_normalize.BLOCK}),
    "geglu": (geglu._geglu_kernel, {"BLOCK": geglu.BLOCK}),
    "geglu backward": (geglu._geglu_backward_kernel, {"BLOCK": geglu.BLOCK}),
    **{
        f"gelu_tanh{words}": (gelu_tanh._gelu_tanh_kernel, {**flags, "BLOCK": gelu_tanh.BLOCK})
        for words, flags in (
            ("", {"HAS_BEFORE": False}),
            (", columns before", {"HAS_BEFORE": True}),
        )
    },
    "gelu_tanh backward": (gelu_tanh._gelu_tanh_backward_kernel, {"BLOCK": gelu_tanh.BLOCK}),
    **{
        f"ada_norm{words}, {residuals} + {norms}, {D} channels": (
            kernel,
            {"RESIDUALS": residuals, "NORMS": norms, **ada_norm._block(D), **flags},
        )
        for words, kernel, flags in (
            ("", ada_norm._ada_norm_kernel, {}),
            (" backward", ada_norm._ada_norm_backward_kernel, {"HAS_GRAD_H": True}),
        )
        for residuals, norms, D in ((1, 1, 3072), (1, 2, 1536), (2, 1, 1536))
    },
    **{
        f"joint_heads{words}, {D} channels{', rotary' * rotary}": (
            kernel,
            joint_heads._constants(D, norm=True, rotary=rotary, copy_v=True),
        )
        for words, kernel in (
            ("", joint_heads._joint_heads_kernel),
            (" backward", joint_heads._joint_heads_backward_kernel),
        )
        for D, rotary in ((64, False), (128, True))
    },
    "group_norm_silu combine": (group_norm_silu._combine_kernel, {"BLOCK": group_norm_silu.PARTS}),
    "merge_lora": (merge_lora._merge_kernel, {"BLOCK": merge_lora.GROUPS}),
    **{
        f"lora_linear, {tokens} tokens, rank {rank}, {str(dtype)[6:]}": (
            lora_linear._down_up_kernel,
            {
                "HAS_BIAS": True,
                "SAVE_T": True,
                "R": lora_linear._padded(rank),
                **lora_linear._down_up_blocks(tokens, rank, dtype),
            },
        )
        for tokens, rank, dtype in (
            *((tokens, rank, torch.bfloat16) for tokens, rank in ((32768, 64), (616, 64), (32768, 4), (32768, 128))),
            (32768, 64, torch.float32),
        )
    },
    **{
        f"lora_linear, queries keys values, rank {rank}, bfloat16": (
            lora_linear._down_up_three_kernel,
            {
                "HAS_BIAS": True,
                "R": lora_linear._padded(rank),
                **lora_linear._down_up_blocks(32768, rank, torch.bfloat16),
            },
        )
        for rank in (4, 64, 128)
    },
    **{
        f"lora_linear, gradients, rank {rank}, {str(dtype)[6:]}": (
            lora_linear._outer_kernel,
            {"R": lora_linear._padded(rank), **lora_linear._outer_blocks(dtype)},
        )
        for rank, dtype in ((64, torch.bfloat16), (4, torch.bfloat16), (128, torch.bfloat16), (64, torch.float32))
    },
}
for _layout, _last in (("channels-last", True), ("NCHW", False)):
    _tile = group_norm_silu._constants(_last)
    KERNELS |= {
        f"group_norm_silu moments, {_layout}": (group_norm_silu._moments_kernel, _tile),
        f"group_norm_silu, {_layout}": (group_norm_silu._normalise_kernel, {"SILU": True, **_tile}),
        f"group_norm_silu sums, {_layout}": (group_norm_silu._grad_sums_kernel, {"SILU": True, **_tile}),
        f"group_norm_silu backward, {_layout}": (group_norm_silu._grad_input_kernel, {"SILU": True, **_tile}),
    }


@dataclass(frozen=True)
class Resources:
    """What ptxas says of a kernel."""

    kernel: str
    pointers: str  # what the arguments of no fixed type point to: the network's outputs, pixels
    architecture: int
    registers: int  # a thread
    shared: int  # bytes a block
    spills: int  # bytes stored and loaded, and the stack


def compile_for(
    kernel: Any, constants: dict[str, Any], architecture: int, m_type: str, divisible: Sequence[str] = ()
) -> Any:
    """The compiled kernel for one architecture; m_type is what pointers of no fixed type point to.

    divisible: counts that are multiples of 16 at the real shapes; Triton then knows it of them and of all pointers.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def type_of(name: str) -> str:
        if name in constants:
            return "constexpr"
        return (POINTERS.get(name) or m_type) if name.endswith("_ptr") else SCALARS.get(name, "i32")

    names = kernel.arg_names
    known = [i for i, name in enumerate(names) if divisible and (name.endswith("_ptr") or name in divisible)]
    attributes = {(i,): [["tt.divisibility", 16]] for i in known}
    options = {name: value for name, value in constants.items() if name not in names}  # num_warps
    constants = {name: value for name, value in constants.items() if name in names}
    source = ASTSource(kernel, {name: type_of(name) for name in names}, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def resources(name: str, architecture: int, m_type: str, divisible: Sequence[str] = ()) -> Resources:
    """Compiles kernel `name` of KERNELS, and asks ptxas about it."""
    from triton.backends.nvidia.compiler import get_ptxas

    compiled = compile_for(*KERNELS[name], architecture, m_type, divisible)
    ptx = compiled.asm["ptx"]
    target = re.search(r"\.target (sm_\w+)", ptx)
    assert target is not None and compiled.asm["cubin"]
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "kernel.ptx"
        file.write_text(ptx)
        command = [get_ptxas(architecture).path, "-v", f"-arch={target[1]}", str(file), "-o", f"{file}.cubin"]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = re.search(r"Used (\d+) registers", report)
    if spills is None or registers is None:
        raise RuntimeError(f"ptxas -v has another format than expected: {report}")
    return Resources(
        name, m_type, architecture, int(registers[1]), compiled.metadata.shared, sum(map(int, spills.groups()))
    )


def pointer_types(name: str) -> tuple[str, ...]:
    kernel, constants = KERNELS[name]
    for dtype in ("bfloat16", "float32"):  # blocks chosen for one type
        if name.endswith(dtype):
            return ({"bfloat16": "*bf16", "float32": "*fp32"}[dtype],)
    free = [n for n in kernel.arg_names if n.endswith("_ptr") and n not in POINTERS and n not in constants]
    return ("*bf16", "*fp32") if free else ("*fp32",)


def survey(architectures: Sequence[int], names: Sequence[str]) -> Iterator[Resources]:
    for name in names:
        for m_type in pointer_types(name):
            for architecture in architectures:
                yield resources(name, architecture, m_type)


def with_triton(version: str, args: argparse.Namespace) -> int:
    """The exit status of this command beside another Triton, which is installed into a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, f"triton=={version}"]
        subprocess.run(pip, check=True)
        path = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
        again = [sys.executable, "-m", "benchmarks.aot", "--arch", *map(str, args.arch), "--only", *args.only]
        print(f"== Triton {version}", flush=True)
        environment = {**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": f"{folder}/cache"}
        return subprocess.run([*again, *["--record"] * args.record], env=environment, check=False).returncode


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, help="compute capabilities, such as 90")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="kernels whose name begins so")
    parser.add_argument("--tritons", nargs="+", metavar="VERSION", help="these in turn instead of the installed one")
    parser.add_argument(
        "--record", action="store_true", help="append what is found to results/<date>_cpu_kernels.jsonl"
    )
    args = parser.parse_args(argv)
    if args.tritons:
        raise SystemExit(max([with_triton(version, args) for version in args.tritons]))
    if INTERPRET:
        raise SystemExit("TRITON_INTERPRET=1 replaces the kernels by Python: unset it")
    names = [name for name in KERNELS if name.startswith(tuple(args.only))]
    if not names:
        raise SystemExit(f"--only {args.only[0]}: unknown. Kernels: {'; '.join(KERNELS)}.")
    found = list(survey(args.arch, names))
    heading = ["kernel", "pointers", "sm", "registers", "shared bytes", "spilled bytes"]
    print(table([heading, *([*r.__dict__.values()] for r in found)]))
    if args.record:
        rows = [[*r.__dict__.values()] for r in found]
        columns = [field.name for field in dataclasses.fields(Resources)]
        Records(results_path("kernels", "cpu"), "aot").write("all kernels", columns=columns, rows=rows)
    if any(r.spills for r in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
