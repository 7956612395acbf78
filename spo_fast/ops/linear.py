"""A frozen linear layer, y = x W^T + bias: PyTorch's, or oneDNN's where that is faster in float32 (onednn.py).

The backward is dx = dy W by the same library; W and bias get no gradient from oneDNN, and are left to PyTorch where
they want one.

# 2 M I O FLOPs for M rows; bound by them.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spo_fast.ops import backend, onednn
from spo_fast.ops.backend import Context, Order


def _case(x: Tensor) -> str:
    real = type(x) in (Tensor, nn.Parameter)  # what counts shapes is no tensor of a CPU
    return "cpu float32" if real and x.device.type == "cpu" and x.dtype == torch.float32 else x.device.type


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
    cases={"cpu float32": Order(("onednn", "eager"), "measured faster here than the BLAS library of PyTorch")},
)

LEAST = 2**14
"""Weights of a layer from which on: smaller ones are the toy's, whose numbers are to be the same on every CPU."""


def takes_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether a product of x with this weight, which gets no gradient, is oneDNN's."""
    wide = weight.dtype == torch.float32 and weight.numel() >= LEAST and x.numel() > 0
    return wide and backend.choose("linear", x) == "onednn"


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x, weight, bias):
        ctx.save_for_backward(weight)
        return onednn.product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Context, dy):
        (weight,) = ctx.saved_tensors
        return onednn.product(dy, weight.t(), None), None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # (..., I), (O, I), (O,) -> (..., O)
    """torch.nn.functional.linear; of weights that get no gradient by oneDNN where that is faster."""
    learns = torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
    if learns or not takes_onednn(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Linear.apply(x, weight, bias)
    return onednn.product(x, weight, bias)


def added_product(y: Tensor, x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """y + x W^T: y (M, O), (O,) or (), x (M, I), W (O, I) -> (M, O), in `out` or not. Without gradient."""
    if y.ndim == 2 and takes_onednn(x, weight):
        return onednn.added(y, x, weight)
    return torch.addmm(y, x, weight.t(), out=out)  # addmm_ would escape the FLOP counter


def take_linear(network: nn.Module) -> None:
    """Give the plain linear layers inside a frozen network this op, in place, where it is not PyTorch's own."""
    for module in network.modules():
        if type(module) is nn.Linear and takes_onednn(module.weight.data, module.weight):
            module.forward = functools.partial(_forward, module)  # type: ignore[method-assign]


def _forward(module: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, module.weight, module.bias)
