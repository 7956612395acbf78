"""models/attention.py: the layouts of the other kernels, what may run where, and the choice by (pretended) time."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from tiny import make_tiny_sdxl

from spo_fast.config.training import AdapterConfig
from spo_fast.models import attention
from spo_fast.models.accelerate import blank_forward
from spo_fast.models.attention import KERNELS, pick, sdpa, shapes_of
from spo_fast.models.policy import Policy


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:  # (B, L, H, D), as these packages
    weights = torch.einsum("blhd,bmhd->bhlm", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhlm,bmhd->blhd", weights.softmax(-1), v)


def stub(monkeypatch: pytest.MonkeyPatch, package: str, **functions: Any) -> None:
    module = types.ModuleType(package)
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, package, module)


@pytest.mark.parametrize("both", [False, True])
def test_every_kernel_takes_and_gives_rows_of_heads(both, monkeypatch):
    """The packages' functions stand in as the formula in their documented layout, with or without the log-sum."""
    stub(monkeypatch, "xformers", ops=None)
    stub(monkeypatch, "xformers.ops", memory_efficient_attention=written_out)
    flash = (lambda *qkv: (written_out(*qkv), None)) if both else written_out
    stub(monkeypatch, "flash_attn_interface", flash_attn_func=flash)
    q, k, v = randn(2, 5, 3, 4, seed=0), randn(2, 7, 3, 4, seed=1), randn(2, 7, 3, 4, seed=2)
    for name, kernel in KERNELS.items():
        assert torch.allclose(kernel(q, k, v), written_out(q, k, v), rtol=0, atol=1e-12), name


SHAPES = {((2, 64, 4, 8), (2, 64, 4, 8)): 3, ((2, 64, 4, 8), (2, 7, 4, 8)): 1}


def test_the_fastest_of_all_layers_together_is_taken(monkeypatch):
    monkeypatch.setattr(attention, "why_not", lambda name, *_: "absent" if name == "flash3" else None)
    ms = {"sdpa": (1.0, 9.0), "cudnn": (3.5, 1.0), "xformers": (float("inf"), 0.1)}  # self-attention, text

    def measure(kernel: Any, shape: Any) -> float:
        return ms[kernel.__name__][shape[0] != shape[1]]

    name, reason = pick("auto", SHAPES, "cuda", torch.float16, False, measure)
    assert name == "cudnn" and reason.endswith("cudnn 11.50, sdpa 12.00, xformers inf")
    assert pick("sdpa", SHAPES, "cuda", torch.float16, False, measure) == ("sdpa", "given")


def test_a_cpu_runs_pytorchs_and_says_why_not_others():
    def never(*_: Any) -> float:
        raise AssertionError("nothing to choose between")

    name, reason = pick("auto", {}, "cpu", torch.float32, False, never)
    assert name == "sdpa" and "nothing else" in reason
    for other in ("cudnn", "xformers", "flash3"):
        with pytest.raises(ValueError, match="CUDA device.*Use --attention auto or sdpa"):
            pick(other, {}, "cpu", torch.float32, False, never)


def test_shapes_are_those_of_the_networks_own_forward(tmp_path):
    """The tiny SDXL attends at 4x4 only, with 4 heads of 8."""
    from diffusers import UNet2DConditionModel

    unet: Any = UNet2DConditionModel.from_pretrained(make_tiny_sdxl(tmp_path) / "unet")
    policy = Policy(unet, AdapterConfig(), seed=0)
    policy.fuse()
    found = shapes_of(unet, blank_forward(unet, 3, (4, 8, 8), 7))
    assert set(found) == {((3, 16, 4, 8), (3, 16, 4, 8)), ((3, 16, 4, 8), (3, 7, 4, 8))}
    layers = [m for m in unet.modules() if hasattr(m, "attend")]
    assert sum(found.values()) == len(layers) and all(layer.attend is sdpa for layer in layers)
    policy.attend_with(KERNELS["cudnn"])
    assert all(layer.attend is KERNELS["cudnn"] for layer in layers)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [n for n in KERNELS if n != "sdpa"])
def test_kernels_agree_on_a_gpu(name):
    if reason := attention.why_not(name, "cuda", torch.float16, False):
        pytest.skip(reason)
    for shape in ((8, 1024, 20, 64), (8, 4096, 10, 64), (2, 4096, 8, 40)):
        q, k, v = (randn(*shape, seed=s).cuda().half() for s in range(3))
        want = written_out(q[:1, :256].double(), k[:1].double(), v[:1].double())
        eager, mine = (float((KERNELS[n](q, k, v)[:1, :256].double() - want).abs().max()) for n in ("sdpa", name))
        assert mine <= 2 * eager
        assert attention.time_on_gpu(KERNELS[name], (shape, shape), torch.float16) > 0
