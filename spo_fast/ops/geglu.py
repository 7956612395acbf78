"""GEGLU: y = a gelu(g) with (a, g) = h.chunk(2, -1), the gate of a diffusion transformer's feed-forward (exact gelu).

gelu(g) = g Phi(g), Phi(g) = (1 + erf(g / sqrt 2)) / 2; the backward computes it again from h, the only tensor saved:
    dL/da = dy gelu(g),   dL/dg = dy a (Phi(g) + g phi(g)),   phi(g) = exp(-g^2 / 2) / sqrt(2 pi)

# 3 D elements moved a row forward (h read, y written), 5 D backward (h and dy read, dh written); memory-bound. At
# SDXL's (8, 4096, 2 x 2560) in 16 bits 503 MB and 839 MB: 117 us and 195 us of 4.3 TB/s. Eager writes and reads
# gelu(g) besides.
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
    "geglu",
    cpu=("eager",),
    cuda=("eager", "triton"),
    why="the definition on a CPU; on CUDA it awaits measurement, so PyTorch's stays first",
    absent={
        "c": "at the toy's size a C call costs as much as eager; on CUDA C++ could move no fewer bytes than Triton"
    },
)

# ---------------------------------------------------------------------------------------------------- definition


def geglu_ref(h: Tensor) -> Tensor:
    """The definition."""
    a, g = h.chunk(2, -1)
    return a * F.gelu(g)


# ---------------------------------------------------------------------------------------------------- Triton kernels


@jit
def _geglu_kernel(h_ptr, y_ptr, D, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(h_ptr + row * 2 * D + j, mask=j < D, other=0.0).to(tl.float32)
    g = tl.load(h_ptr + row * 2 * D + D + j, mask=j < D, other=0.0).to(tl.float32)
    y = a * (0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476)))
    tl.store(y_ptr + row * D + j, y.to(y_ptr.dtype.element_ty), mask=j < D)


@jit
def _geglu_backward_kernel(h_ptr, grad_y_ptr, grad_h_ptr, D, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dtype: tl.constexpr = grad_h_ptr.dtype.element_ty
    a = tl.load(h_ptr + row * 2 * D + j, mask=j < D, other=0.0).to(tl.float32)
    g = tl.load(h_ptr + row * 2 * D + D + j, mask=j < D, other=0.0).to(tl.float32)
    grad_y = tl.load(grad_y_ptr + row * D + j, mask=j < D, other=0.0).to(tl.float32)
    cdf = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
    density = tl.exp(-0.5 * g * g) * 0.3989422804014327
    tl.store(grad_h_ptr + row * 2 * D + j, (grad_y * g * cdf).to(dtype), mask=j < D)
    tl.store(grad_h_ptr + row * 2 * D + D + j, (grad_y * a * (cdf + g * density)).to(dtype), mask=j < D)


BLOCK = 1024  # columns a program: 8 a thread


def _launch(h: Tensor) -> Tensor:
    D = h.shape[-1] // 2
    y = torch.empty((*h.shape[:-1], D), dtype=h.dtype, device=h.device)
    if y.numel():
        launch(_geglu_kernel)[(y.numel() // D, -(-D // BLOCK))](h, y, D, BLOCK=BLOCK)
    return y


def _launch_backward(h: Tensor, grad_y: Tensor) -> Tensor:
    D = h.shape[-1] // 2
    grad_h = torch.empty_like(h)
    if h.numel():
        launch(_geglu_backward_kernel)[(h.numel() // (2 * D), -(-D // BLOCK))](h, grad_y, grad_h, D, BLOCK=BLOCK)
    return grad_h


# ---------------------------------------------------------------------------------------------------- torch.library op


def _fake(h):
    return h.new_empty((*h.shape[:-1], h.shape[-1] // 2))


def _backward_fake(h, grad_y):
    return torch.empty_like(h)


GEGLU = implementations("geglu", triton=_launch, fake=_fake)


def _save(ctx: Context, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(gradient: Callable[..., Tensor], ctx: Context, grad_y: Tensor) -> tuple[Tensor]:
    return (gradient(*ctx.saved_tensors, grad_y.contiguous()),)


differentiate(GEGLU, implementations("geglu_backward", triton=_launch_backward, fake=_backward_fake), _save, _backward)

# ---------------------------------------------------------------------------------------------------- public function


def geglu(h: Tensor) -> Tensor:  # h (..., 2D) any float type -> (..., D)
    """a gelu(g), (a, g) = h.chunk(2, -1), inside a kernel in float32. Raises ValueError if the last size is odd."""
    if h.ndim == 0 or h.shape[-1] % 2:
        raise ValueError(f"h is {tuple(h.shape)}: its last size must be even, a's channels and then g's")
    return GEGLU["triton"](h.contiguous()) if backend.choose("geglu", h) == "triton" else geglu_ref(h)
