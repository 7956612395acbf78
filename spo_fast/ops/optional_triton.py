"""Triton, which need not be there: kernels are decorated and launched alike with it, without it, in its interpreter."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable
from typing import Protocol

import torch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
# Triton's default changes in 3.10; ours, a * b + c in one rounding, must not change with it
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

try:
    import triton
    import triton.language as tl
    from triton import jit
except ImportError:  # the table of `python -m spo_fast.ops` says so; no kernel is reached without Triton
    triton = tl = None  # type: ignore[assignment]

    def jit(function):  # type: ignore[no-redef]
        """The function as it is: nobody calls it."""
        return function


class Kernel(Protocol):
    """What `jit` makes of a function."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]: ...

    def __call__(self, *args: object, **kwargs: object) -> object:
        """From another kernel."""


def launch(kernel: Kernel) -> Kernel:
    """A kernel ready for `[grid](...)` inside an op."""
    return kernel if INTERPRET else torch.library.wrap_triton(kernel)


def two_floats(x: float) -> tuple[float, float]:
    """The two float32 whose sum is x to 48 bits: Triton takes Python numbers as float32."""
    x = float(x)  # a number that torch.compile would keep symbolic becomes a constant
    high = struct.unpack("f", struct.pack("f", x))[0]
    return high, x - high if math.isfinite(x) else 0.0
