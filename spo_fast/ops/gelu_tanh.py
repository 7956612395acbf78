"""GELU by tanh, of the feed-forwards of diffusion transformers, beside what a product also reads:

    y = [before, gelu(h)],   gelu(z) = z (1 + tanh u) / 2 = z sigmoid(2 u),   u = sqrt(2 / pi) (z + .044715 z^3)

FLUX's single blocks multiply attention and feed-forward, side by side, by one matrix: here the second is written where
it is to stand, and no pass of its own joins them. The backward computes gelu' from h again, and saves no more.

# 2 D elements moved a row forward (h read, y written) and 2 P for the P columns before; 3 D backward (h, dy, dh).
# Memory-bound: at FLUX's (4, 4608, 12288) behind 3072 columns, in 16 bits, 1.13 GB: 263 us of 4.3 TB/s; PyTorch, which
# joins them afterwards, 2.04 GB.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from spo_fast.ops import backend
from spo_fast.ops.backend import Context, differentiate, implementations
from spo_fast.ops.optional_triton import jit, launch, tl

backend.register(
    "gelu_tanh",
    cpu=("eager",),
    cuda=("eager", "triton"),
    why="PyTorch's is one pass already where nothing stands before it; on CUDA Triton's awaits measurement",
    absent={"c": "bound by memory: C++ could move no fewer bytes than PyTorch's or Triton's kernel"},
)

# ---------------------------------------------------------------------------------------------------- definition


def gelu_tanh_ref(h: Tensor, before: Tensor | None = None) -> Tensor:
    """The definition."""
    y = F.gelu(h, approximate="tanh")
    return y if before is None else torch.cat([before, y], -1)


# ---------------------------------------------------------------------------------------------------- Triton kernels


@jit
def _sigmoid_2u(z):
    """sigmoid(2 u) and 2 du/dz; beyond 16 both have reached their limits, where z^3 would only overflow."""
    near = tl.minimum(tl.maximum(z, -16.0), 16.0)
    u = 0.7978845608028654 * near * (1.0 + 0.044715 * near * near)
    return 1.0 / (1.0 + tl.exp(-2.0 * u)), 1.5957691216057308 * (1.0 + 0.134145 * near * near)


@jit
def _gelu_tanh_kernel(h_ptr, before_ptr, y_ptr, P, D, HAS_BEFORE: tl.constexpr, BLOCK: tl.constexpr):
    """Blocks of the P columns before come first: no block holds columns of both."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    if HAS_BEFORE:
        blocks = (P + BLOCK - 1) // BLOCK
        if block < blocks:
            j = block * BLOCK + tl.arange(0, BLOCK)
            copied = tl.load(before_ptr + row * P + j, mask=j < P, other=0.0)
            tl.store(y_ptr + row * (P + D) + j, copied, mask=j < P)
        block -= blocks
    j = block * BLOCK + tl.arange(0, BLOCK)
    inside = (j >= 0) & (j < D)
    z = tl.load(h_ptr + row * D + j, mask=inside, other=0.0).to(tl.float32)
    sigmoid, _ = _sigmoid_2u(z)
    tl.store(y_ptr + row * (P + D) + P + j, (z * sigmoid).to(dtype), mask=inside)


@jit
def _gelu_tanh_backward_kernel(h_ptr, grad_y_ptr, grad_h_ptr, P, D, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = j < D
    z = tl.load(h_ptr + row * D + j, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_y_ptr + row * (P + D) + P + j, mask=inside, other=0.0).to(tl.float32)
    sigmoid, slope = _sigmoid_2u(z)
    # beyond 16 sigmoid (1 - sigmoid) is 0, whatever z
    near = tl.minimum(tl.maximum(z, -16.0), 16.0)
    grad *= sigmoid + near * slope * sigmoid * (1.0 - sigmoid)
    tl.store(grad_h_ptr + row * D + j, grad.to(grad_h_ptr.dtype.element_ty), mask=inside)


BLOCK = 1024  # columns a program: 8 a thread


def _launch(h: Tensor, before: Tensor | None) -> Tensor:
    D, P = h.shape[-1], 0 if before is None else before.shape[-1]
    y = _fake(h, before)
    if h.numel():
        launch(_gelu_tanh_kernel)[(h.numel() // D, -(-P // BLOCK) + -(-D // BLOCK))](
            *(h, h if before is None else before, y, P, D),
            HAS_BEFORE=before is not None,
            BLOCK=BLOCK,
        )
    return y


def _launch_backward(h: Tensor, grad_y: Tensor) -> Tensor:
    D = h.shape[-1]
    grad_h = torch.empty_like(h)
    if h.numel():
        launch(_gelu_tanh_backward_kernel)[(h.numel() // D, -(-D // BLOCK))](
            *(h, grad_y, grad_h, grad_y.shape[-1] - D, D), BLOCK=BLOCK
        )
    return grad_h


# ---------------------------------------------------------------------------------------------------- torch.library op


def _fake(h, before):
    return h.new_empty((*h.shape[:-1], h.shape[-1] + (0 if before is None else before.shape[-1])))


def _backward_fake(h, grad_y):
    return torch.empty_like(h)


GELU_TANH = implementations("gelu_tanh", triton=_launch, fake=_fake)
GRADIENT = implementations("gelu_tanh_backward", triton=_launch_backward, fake=_backward_fake)


def _save(ctx: Context, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _backward(gradient: Callable[..., Tensor], ctx: Context, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    (h,) = ctx.saved_tensors
    grad_y = grad_y.contiguous()
    return gradient(h, grad_y), grad_y[..., : -h.shape[-1]] if ctx.needs_input_grad[1] else None


differentiate(GELU_TANH, GRADIENT, _save, _backward)

# ---------------------------------------------------------------------------------------------------- public function


def gelu_tanh(
    h: Tensor,  # (..., D) any float type
    before: Tensor | None = None,  # (..., P) of h's type
) -> Tensor:  # (..., P + D)
    """[before, gelu(h)] with gelu by tanh, inside a kernel in float32.

    Raises ValueError for columns before that do not fit h.
    """
    if before is not None and (
        before.shape[:-1] != h.shape[:-1] or before.dtype != h.dtype or before.device != h.device
    ):
        raise ValueError(
            f"gelu_tanh: before is {tuple(before.shape)} {before.dtype} on {before.device}, beside h "
            f"{tuple(h.shape)} {h.dtype} on {h.device}"
        )
    chosen = backend.choose("gelu_tanh", h)
    if chosen == "eager":
        return gelu_tanh_ref(h, before)
    return GELU_TANH[chosen](h.contiguous(), None if before is None else before.contiguous())
