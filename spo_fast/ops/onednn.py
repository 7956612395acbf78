"""oneDNN's float32 products on a CPU, where they beat those of the BLAS library that PyTorch calls.

PyTorch gives oneDNN its convolutions and 16-bit products, and float32 products to MKL, which keeps its widest
instructions for Intel's processors: on an AMD EPYC with AVX-512 one thread of MKL reached 110 GFLOP/s, of oneDNN 250
(benchmarks/LOG.md). Inductor calls the same operators of PyTorch's.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

FASTER = 1.25
"""oneDNN is taken from this many times MKL's speed on: where one library serves as well, numbers stay PyTorch's."""
SIDE, TURNS = 512, 9


def exists() -> bool:
    """Whether this PyTorch has oneDNN and the operators."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.cache
def why_missing() -> str | None:
    """None where oneDNN is taken, else the reason in words; the first call measures, a twentieth of a second."""
    if not exists():
        return "this PyTorch has no oneDNN"
    gain = measured_gain()
    return (
        None if gain >= FASTER else f"measured here it does {gain:.2f} times as many products as PyTorch's BLAS library"
    )


def measured_gain(clock: Callable[[], float] = time.process_time) -> float:
    """The BLAS library's time for a float32 product over oneDNN's."""
    x = torch.ones(SIDE, SIDE)
    return _gain(lambda: F.linear(x, x), lambda: product(x, x, None), clock)


def measured_bf16_gain(clock: Callable[[], float] = time.process_time) -> float:
    """Time of a product of float32's, by the library that is faster there, over time of bfloat16's."""
    x = torch.ones(SIDE, SIDE)
    narrow, by_onednn = x.bfloat16(), why_missing() is None
    return _gain(lambda: product(x, x, None) if by_onednn else F.linear(x, x), lambda: F.linear(narrow, narrow), clock)


@torch.inference_mode()
def _gain(before: Callable[[], Tensor], after: Callable[[], Tensor], clock: Callable[[], float]) -> float:
    """Of the least times of TURNS calls each, in turn, after one that makes its kernel."""
    seconds = []
    for _ in range(TURNS + 1):
        times = [clock()]
        for function in (before, after):
            function()
            times.append(clock())
        seconds.append((times[1] - times[0], times[2] - times[1]))
    first, second = (min(took) for took in zip(*seconds[1:], strict=True))
    return first / second


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # (..., I), (O, I), (O,) -> (..., O)
    """x weight^T + bias. float32 of any strides; no gradient."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def added(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:  # (M, O), (M, I), (O, I) -> (M, O)
    """y + x weight^T in one pass. float32; no gradient."""
    return torch.ops.mkldnn._linear_pointwise.binary(x, y, weight, None, "add")


if exists():

    @register_flop_formula([torch.ops.mkldnn._linear_pointwise])
    def _flops(x: torch.Size, second: torch.Size, third: torch.Size | None, *_: object, **__: object) -> int:
        weight = third if third is not None and len(third) == 2 else second  # second: what is added
        return 2 * math.prod(x) * weight[0]
