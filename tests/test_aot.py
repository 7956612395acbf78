"""Every Triton kernel compiles ahead of time, without a GPU, for the architectures we name, and spills no register."""

from __future__ import annotations

import pytest

from spo_fast.ops.backend import INTERPRET

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1 replaces the kernels by Python")

from benchmarks.aot import ARCHITECTURES, KERNELS, SCALARS, compile_for, main, resources, survey  # noqa: E402  (needs Triton)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_without_spills(name, architecture):
    found = list(survey([architecture], [name]))
    assert found
    for r in found:
        assert r.spills == 0 and 0 < r.registers <= 255, r
        assert r.shared <= 99 * 1024, r  # a block's share on the cards with the least of it (sm_86, 89)


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("m_type", ["*bf16", "*fp32"])
@pytest.mark.parametrize("name", [n for n in KERNELS if n.startswith(("ge", "group_norm_silu", "ada", "joint"))])
def test_real_shapes_move_16_bytes_at_a_time(name, m_type, architecture):
    """C and D are multiples of 16 in every model and S from 8x8 on: loads are wide, and half a multiprocessor's
    threads or more find registers."""
    divisible = ("C", "S", "D", "P", "chunk", "x_b", "h_b", "gate_b", "mod_b", "in_b", "in_l")
    found = resources(name, architecture, m_type, divisible)
    assert found.spills == 0
    if "combine" not in name:  # it reads interleaved pairs
        assert "ld.global.v4.b32" in compile_for(*KERNELS[name], architecture, m_type, divisible).asm["ptx"]
        assert found.registers <= 128


@pytest.mark.parametrize("name", KERNELS)
def test_compiles_with_counts_of_one(name):
    """Triton makes an integer argument of 1 a constant, which has no methods of a tensor."""
    kernel, constants = KERNELS[name]
    ones = {n: 1 for n in kernel.arg_names if n not in constants and not n.endswith("_ptr") and n not in SCALARS}
    assert compile_for(kernel, {**constants, **ones}, 90, "*bf16").asm["cubin"]


def test_command_prints_a_table(capsys):
    main(["--arch", "90", "--only", "preference_loss"])
    heading, *rows = capsys.readouterr().out.splitlines()
    assert heading.split() == ["kernel", "pointers", "sm", "registers", "shared", "bytes", "spilled", "bytes"]
    assert len(rows) == 2 and all(row.split()[-1] == "0" and " 90 " in row for row in rows)
    with pytest.raises(SystemExit, match="unknown. Kernels: transition, keyed"):
        main(["--only", "conv"])
