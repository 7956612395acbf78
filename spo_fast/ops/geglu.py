"""GEGLU: y = a gelu(g), (a, g) = (h + bias).chunk(2, -1), the gate of a diffusion transformer's feed-forward.

gelu(g) = g Phi(g), exact: Phi(g) = (1 + erf(g / sqrt 2)) / 2. The backward computes it again from h, and saves no more:
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
from spo_fast.ops.c_library import INT64, POINTER, Arguments, call, fields
from spo_fast.ops.optional_triton import jit, launch, tl

backend.register(
    "geglu",
    cpu=("c", "eager"),
    cuda=("eager", "triton"),
    why="on a CPU one pass, which adds the bias too; on CUDA it awaits measurement, so PyTorch's stays first",
    absent={"c cuda": "bound by memory: CUDA C++ could move no fewer bytes than Triton's kernel"},
)

# ---------------------------------------------------------------------------------------------------- definition


def geglu_ref(h: Tensor, bias: Tensor | None = None) -> Tensor:
    """The definition."""
    a, g = _with(h, bias).chunk(2, -1)
    return a * F.gelu(g)


def _with(h: Tensor, bias: Tensor | None) -> Tensor:
    return h if bias is None else h + bias


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


def _launch(h: Tensor, bias: Tensor | None) -> Tensor:
    h = _with(h, bias)  # on a GPU a product brings its own
    D = h.shape[-1] // 2
    y = torch.empty((*h.shape[:-1], D), dtype=h.dtype, device=h.device)
    if y.numel():
        launch(_geglu_kernel)[(y.numel() // D, -(-D // BLOCK))](h, y, D, BLOCK=BLOCK)
    return y


def _launch_backward(h: Tensor, bias: Tensor | None, grad_y: Tensor) -> Tensor:
    h = _with(h, bias)
    D = h.shape[-1] // 2
    grad_h = torch.empty_like(h)
    if h.numel():
        launch(_geglu_backward_kernel)[(h.numel() // (2 * D), -(-D // BLOCK))](h, grad_y, grad_h, D, BLOCK=BLOCK)
    return grad_h


# ---------------------------------------------------------------------------------------------------- C library


class GegluArguments(Arguments):
    """spo_geglu_args of csrc/spo_fast.h."""

    _fields_ = fields(
        dtype=INT64, h=POINTER, bias=POINTER, grad_y=POINTER, rows=INT64, D=INT64, y=POINTER, grad_h=POINTER
    )

    def __init__(self, h, bias, **more):
        D = h.shape[-1] // 2
        super().__init__(dtype=h.dtype, h=h, bias=bias, rows=h.numel() // (2 * D), D=D, **more)


def _forward_c(h, bias):
    y = _fake(h, bias)
    if y.numel():
        call("spo_geglu_forward", h.device, GegluArguments(h, bias, y=y))
    return y


def _backward_c(h, bias, grad_y):
    grad_h = torch.empty_like(h)
    if h.numel():
        call("spo_geglu_backward", h.device, GegluArguments(h, bias, grad_y=grad_y, grad_h=grad_h))
    return grad_h


# ---------------------------------------------------------------------------------------------------- torch.library op


def _fake(h, bias):
    return h.new_empty((*h.shape[:-1], h.shape[-1] // 2))


def _backward_fake(h, bias, grad_y):
    return torch.empty_like(h)


GEGLU = implementations("geglu", triton=_launch, c=_forward_c, fake=_fake)
GRADIENT = implementations("geglu_backward", triton=_launch_backward, c=_backward_c, fake=_backward_fake)


def _save(ctx: Context, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)  # the bias may be None


def _backward(gradient: Callable[..., Tensor], ctx: Context, grad_y: Tensor) -> tuple[Tensor, Tensor | None]:
    grad_h = gradient(*ctx.saved_tensors, grad_y.contiguous())
    return grad_h, grad_h.sum_to_size(grad_h.shape[-1:]) if ctx.needs_input_grad[1] else None


differentiate(GEGLU, GRADIENT, _save, _backward)

# ---------------------------------------------------------------------------------------------------- public function


def geglu(h: Tensor, bias: Tensor | None = None) -> Tensor:  # h (..., 2D) any float type, bias (2D) -> (..., D)
    """a gelu(g), (a, g) = (h + bias).chunk(2, -1), inside a kernel in float32.

    Raises ValueError if the last size is odd, or the bias is none of it.
    """
    if h.ndim == 0 or h.shape[-1] % 2:
        raise ValueError(f"h is {tuple(h.shape)}: its last size must be even, a's channels and then g's")
    if bias is not None and (bias.shape != h.shape[-1:] or bias.dtype != h.dtype or bias.device != h.device):
        raise ValueError(
            f"the bias is {tuple(bias.shape)}, {bias.dtype} on {bias.device}; h asks for ({h.shape[-1]},), {h.dtype} "
            f"on {h.device}"
        )
    chosen = backend.choose("geglu", h)
    if chosen == "eager":
        return geglu_ref(h, bias)
    return GEGLU[chosen](h.contiguous(), None if bias is None else bias.contiguous())
