"""Frozen weights in fewer bits, inexact: y = x W^T + y0, and dx = dy W; W gets no gradient, x is not saved.

    nf4   4-bit codes of bitsandbytes (NormalFloat, QLoRA, arXiv 2305.14314), a float32 scale for 64 weights;
          computed with W made whole, in x's type, for the moment of the product
    int8  W = q s with s a row's largest |W| / 127, x likewise by token; y = (q_x q^T) s_x s, sums in int32
    fp8   the same in e4m3, whose largest number is 448; sums in float32

Backward every one makes W whole: gradients have no bound that 8 bits could be scaled by beforehand.

# I O weights take I O (1/2 + 1/16), I O or I O bytes, for 2 I O in 16 bits; made whole, 2 I O more for the moment.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from spo_fast.ops.backend import Context, library_op
from spo_fast.ops.linear import added_product, linear

FEW = 16  # rows of int8 that cuBLAS does not multiply: it takes more
BLOCK = 64  # weights that share a scale in NF4
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
TYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


class Quantised(NamedTuple):
    """A matrix W (O, I). The type of its values says how it is kept."""

    values: Tensor  # (O, I) int8 or float8_e4m3fn; NF4: (O, I / 2) uint8, two codes a byte
    scale: Tensor  # (O, 1) float32; NF4: (O I / 64,)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight, whatever its values are packed into."""
        rows, columns = self.values.shape
        return rows, columns * (2 if self.values.dtype == torch.uint8 else 1)


def quantise(weight: Tensor, how: str) -> Quantised:  # (O, I), both multiples of 16
    """how: nf4 (bitsandbytes must be imported), int8 or fp8."""
    if how == "nf4":
        codes, scale = torch.ops.bitsandbytes.quantize_4bit(weight.float().contiguous(), BLOCK, "nf4", torch.uint8)
        return Quantised(codes.view(len(weight), -1), scale)
    return Quantised(*_rounded(weight, TYPES[how]))


def _rounded(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:  # (M, I) -> (M, I), (M, 1) float32
    x = x.float()
    scale = x.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / LARGEST[dtype]
    q = x / scale
    return (q.round() if dtype == torch.int8 else q).to(dtype), scale


def dense(values: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:  # (O, I)
    """W in a float type. scale None: values are W itself."""
    if scale is None:
        return values
    if values.dtype != torch.uint8:
        return (values.float() * scale).to(dtype)
    wide = torch.float32 if dtype == torch.float64 else dtype  # bitsandbytes' types
    # a block a row: its CPU kernel (0.50) takes the wrong scales where a block runs on into the next row
    blocks = torch.ops.bitsandbytes.dequantize_4bit(values, scale, BLOCK, "nf4", (len(scale), BLOCK), wide)
    return blocks.view(len(values), -1).to(dtype)


def add_product(y: Tensor, x: Tensor, values: Tensor, scale: Tensor | None, out: Tensor | None = None) -> Tensor:
    """y + x W^T. y (M, O), (O,) or (); x (M, I)."""
    if scale is None or values.dtype == torch.uint8:
        return added_product(y, x, dense(values, scale, x.dtype), out)
    q, x_scale = _rounded(x, values.dtype)
    if values.dtype == torch.int8:
        few = len(q) <= FEW  # the modulations of a transformer's block are of samples, not of tokens
        sums = torch._int_mm(F.pad(q, (0, 0, 0, 2 * FEW - len(q))) if few else q, values.t())[: len(q)]
    else:
        sums = FP8_PRODUCT(q, values)
    return torch.add(y, sums.mul(x_scale).mul_(scale.t()).to(x.dtype), out=out)


def _fp8_product(q: Tensor, values: Tensor) -> Tensor:  # (M, I), (O, I) of e4m3 -> (M, O) float32
    if not q.is_cuda:  # PyTorch's own took 800 times as long there
        return q.float() @ values.float().t()
    one = torch.ones((), device=q.device)  # scales come afterwards: with those of rows kernels write bfloat16 only
    return torch._scaled_mm(q, values.t(), one, one, out_dtype=torch.float32)


FP8_PRODUCT = library_op(
    "fp8_product",
    "(Tensor q, Tensor values) -> Tensor",
    _fp8_product,
    lambda q, values: q.new_empty(q.shape[0], values.shape[0], dtype=torch.float32),
)


@register_flop_formula(torch.ops.spo_fast.fp8_product)
def _fp8_flops(q: torch.Size, values: torch.Size, *_: object, **__: object) -> int:
    return 2 * q[0] * q[1] * values[0]


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x, values, scale, bias):
        ctx.save_for_backward(values, scale)
        return add_product(x.new_zeros(()) if bias is None else bias, x, values, scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Context, dy):
        values, scale = ctx.saved_tensors
        return linear(dy, dense(values, scale, dy.dtype).t()), None, None, None


def quantised_linear(
    x: Tensor,  # (..., I) any float type: the compute type
    weight: Quantised,  # of (O, I)
    bias: Tensor | None,  # (O,) frozen, x's type
) -> Tensor:  # (..., O)
    """x W^T + bias, gradient to x only."""
    y = _FrozenLinear.apply(x.reshape(-1, x.shape[-1]).contiguous(), *weight, bias)
    return y.view(*x.shape[:-1], -1)
