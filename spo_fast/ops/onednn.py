"""oneDNN's float32 products on a CPU, where they beat those of the BLAS library that PyTorch calls.

PyTorch (2.13) gives oneDNN its convolutions and 16-bit products, and float32 products to MKL: on an AMD EPYC with
AVX-512 one thread of MKL reached 110 GFLOP/s, of oneDNN 230 (benchmarks/LOG.md). The operators are those that
Inductor calls of weights that it has packed; compiled code does without them here.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

FASTER = 1.25
"""oneDNN is taken from this many times MKL's speed on: where one library serves as well, numbers stay PyTorch's."""
SIDE, TURNS = 384, 9


def exists() -> bool:
    """Whether this PyTorch has oneDNN and the operators."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.cache
def why_slow() -> str | None:
    """None where oneDNN is taken, else the reason in words; the first call measures, some hundredths of a second."""
    gain = measured_gain()
    return None if gain >= FASTER else f"measured here it is {gain:.2f} times as fast as PyTorch's BLAS library"


@contextlib.contextmanager
def _square() -> Iterator[Tensor]:
    """A float32 matrix of the CPU, and whatever the caller's state is (modes that count or pretend, autocast) left."""
    with _disable_current_modes(), torch.autocast("cpu", enabled=False), torch.inference_mode():
        yield torch.ones(SIDE, SIDE, dtype=torch.float32, device="cpu")


def measured_gain(clock: Callable[[], float] = time.process_time) -> float:
    """The BLAS library's time for a float32 product over oneDNN's."""
    with _square() as x:
        return _gain(lambda: F.linear(x, x), lambda: product(x, x, None), clock)


def measured_bf16_gain(clock: Callable[[], float] = time.process_time) -> float:
    """Time of a product of float32's, by the library that is faster there, over time of bfloat16's."""
    by_onednn = exists() and why_slow() is None
    with _square() as x:
        narrow = x.bfloat16()
        wide = (lambda: product(x, x, None)) if by_onednn else (lambda: F.linear(x, x))
        return _gain(wide, lambda: F.linear(narrow, narrow), clock)


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
    """x weight^T + bias. float32; x of any strides, weight contiguous as it is or transposed; no gradient."""
    # the operator reads a bias as if it were contiguous
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias if bias is None else bias.contiguous(), "none", [], "")


def added(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:  # (M, O), (M, I), (O, I) -> (M, O)
    """y + x weight^T in one pass. float32; no gradient."""
    return torch.ops.mkldnn._linear_pointwise.binary(x, y, weight, None, "add")
