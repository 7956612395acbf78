"""What the ops on denoising steps share: guided outputs, rows of a StepTable, checks of their arguments."""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # the table of `python -m spo_fast.ops` says so; nothing below is reached without Triton
    triton = None

# ---------------------------------------------------------------------------------------------------- definition


def row_of(coefficients: Tensor, rows: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    """a, b, c, d, std of each sample, shaped (B, 1, 1, 1) in the latents' dtype."""
    picked = coefficients[rows].to(like.dtype)
    return tuple(v.view(-1, *[1] * (like.ndim - 1)) for v in picked.unbind(1))


def guided(cond: Tensor, uncond: Tensor | None, guidance_scale: float, dtype: torch.dtype) -> Tensor:
    """m = uncond + g (cond - uncond) in `dtype`; cond alone without an unconditional half."""
    if uncond is None:
        return cond.to(dtype)
    uncond = uncond.to(dtype)
    return uncond + guidance_scale * (cond.to(dtype) - uncond)


if triton is not None:

    @triton.jit
    def guided_kernel(cond_ptr, uncond_ptr, offsets, mask, g, HAS_UNCOND: tl.constexpr, dtype: tl.constexpr):
        """uncond + g (cond - uncond), inside other kernels."""
        m = tl.load(cond_ptr + offsets, mask=mask, other=0.0).to(dtype)
        if HAS_UNCOND:
            u = tl.load(uncond_ptr + offsets, mask=mask, other=0.0).to(dtype)
            m = u + g * (m - u)
        return m

# ---------------------------------------------------------------------------------------------------- public functions


def checked_latents(x: Tensor) -> Tensor:
    """Latents are float32 or float64, contiguous: std is 0.02 at the last step and bf16 resolves only 0.008 near 1."""
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"latents must be float32 or float64, got {x.dtype}: convert them with .float() first")
    return x.contiguous()


def check_shape(name: str, value: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
    """Shapes and types only: they cost no wait for the device, and a kernel would read out of bounds."""
    if value is not None and (value.shape != shape or (dtype is not None and value.dtype != dtype)):
        wanted = f"{shape}" + (f" {dtype}" if dtype else "")
        raise ValueError(f"{name} is {tuple(value.shape)} {value.dtype}, expected {wanted}")


def check_states(cond: Tensor, uncond: Tensor | None, x_t: Tensor, rows: Tensor, coefficients: Tensor) -> None:
    """Raises ValueError for shapes and types that do not belong together."""
    check_shape("cond", cond, x_t.shape)
    check_shape("uncond", uncond, x_t.shape, cond.dtype)
    check_shape("rows", rows, x_t.shape[:1], torch.int64)
    check_shape("coefficients", coefficients, (coefficients.shape[0], 5), torch.float64)


def contiguous(m: Tensor | None) -> Tensor | None:
    """The output as kernels read it."""
    # UNets in channels_last give channels_last outputs; they are 4 channels wide, so a copy costs nothing.
    return None if m is None else m.contiguous()
