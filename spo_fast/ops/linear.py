"""A linear layer, y = x W^T + bias: PyTorch's, or oneDNN's where that is faster in float32 (onednn.py).

The backward's products, dx = dy W and dW = dy^T x, are the same op's. What oneDNN's operator has no answer for is left
to PyTorch: compilers, forward derivatives, autocast.

# 2 M I O FLOPs for M rows, as many for each gradient; bound by them.
"""

from __future__ import annotations

import math
from typing import TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from spo_fast.ops import backend, onednn
from spo_fast.ops.backend import Context, Order

Network = TypeVar("Network", bound=nn.Module)


def _case(x: Tensor) -> str:
    return "cpu float32" if x.device.type == "cpu" and x.dtype == torch.float32 else x.device.type


backend.register(
    "linear",
    cpu=("eager",),
    cuda=("eager",),
    why="PyTorch's matrix products",
    absent={
        "triton": "a product: the vendor's library, which PyTorch calls, is what Triton would have to beat",
        "c": "a product: the vendor's library, which PyTorch calls, is what C would have to beat",
        "onednn cuda": "a CPU's library",
    },
    case=_case,
    cases={"cpu float32": Order(("onednn", "eager"), "layers from 128 wide: measured faster here than MKL's")},
)

LEAST_SIDE = 128
"""Rows and columns of a weight from which on: narrower ones are the toys', whose numbers no measurement changes."""


def takes_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether a product of x with this weight is oneDNN's."""
    if torch.compiler.is_compiling() or weight.dtype != torch.float32:  # first: a compiler guards on what is asked
        return False
    wide = min(weight.shape) >= LEAST_SIDE and x.numel() > 0
    return wide and _is_unwatched(x) and _is_dense(weight) and _is_chosen(x)


def _is_unwatched(x: Tensor) -> bool:
    """By what oneDNN's operator does not know: tensors of counting modes, derivatives, autocast, tracing."""
    if type(x) not in (Tensor, nn.Parameter) or torch._C._functorch.is_functorch_wrapped_tensor(x):
        return False
    return forward_ad._current_level < 0 and not torch.is_autocast_enabled("cpu") and not torch.jit.is_tracing()


def _is_dense(weight: Tensor) -> bool:
    return weight.is_contiguous() or weight.t().is_contiguous()


def _is_chosen(x: Tensor) -> bool:
    return backend.choose("linear", x) == "onednn" and bool(torch.backends.mkldnn.enabled)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x, weight, bias):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)  # type: ignore[arg-type]  # None is kept too
        return onednn.product(x, weight, bias)

    @staticmethod
    def backward(ctx: Context, dy):
        x, weight = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        dx = linear(dy, weight.t()) if ctx.needs_input_grad[0] else None
        dw = linear(rows.t(), x.reshape(-1, x.shape[-1]).t()) if ctx.needs_input_grad[1] else None
        return dx, dw, rows.sum(0) if ctx.needs_input_grad[2] else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # (..., I), (O, I), (O,) -> (..., O)
    """torch.nn.functional.linear, by oneDNN where that is faster."""
    fits = bias is None or bias.shape == weight.shape[:1]
    if not fits or not takes_onednn(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _Linear.apply(x, weight, bias)
    return onednn.product(x, weight, bias)


def added_product(y: Tensor, x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """y + x W^T: y (M, O), (O,) or (), x (M, I), W (O, I) -> (M, O), in `out` or not. Without gradient."""
    if y.ndim and y.shape[-1] == len(weight) and takes_onednn(x, weight):
        return onednn.added(y, x, weight) if y.ndim == 2 else onednn.product(x, weight, y)
    return torch.addmm(y, x, weight.t(), out=out)  # addmm_ would escape the FLOP counter


def _flops(x: torch.Size, second: torch.Size, third: torch.Size | None, *_: object, **__: object) -> int:
    weight = third if third is not None and len(third) == 2 else second  # second: what is added
    return 2 * math.prod(x) * weight[0]


if onednn.exists():
    register_flop_formula([torch.ops.mkldnn._linear_pointwise])(_flops)


class OpLinear(nn.Linear):
    """A linear layer that computes by this op."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        return linear(input, self.weight, self.bias)


def is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """A layer that is a product and a bias, and nothing else."""
    return type(layer) in (nn.Linear, OpLinear)


def take_linear(network: Network) -> Network:
    """Give the plain linear layers inside a network this op, in place, where it is not PyTorch's own."""
    for module in network.modules():
        if type(module) is nn.Linear and takes_onednn(module.weight.data, module.weight):
            module.__class__ = OpLinear
    return network
