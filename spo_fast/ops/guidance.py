"""What the ops on denoising steps share: guided outputs, rows of a StepTable, checks of their arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from spo_fast.ops.c_library import DOUBLE, DTYPE_CODES, INT64, POINTER, Arguments, check_tensor, fields
from spo_fast.ops.optional_triton import jit, tl

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


# ---------------------------------------------------------------------------------------------------- Triton


@jit
def guided_kernel(cond_ptr, uncond_ptr, offsets, mask, g, HAS_UNCOND: tl.constexpr, dtype: tl.constexpr):
    """uncond + g (cond - uncond), inside other kernels."""
    m = tl.load(cond_ptr + offsets, mask=mask, other=0.0).to(dtype)
    if HAS_UNCOND:
        u = tl.load(uncond_ptr + offsets, mask=mask, other=0.0).to(dtype)
        m = u + g * (m - u)
    return m


# ---------------------------------------------------------------------------------------------------- C library


class StepArguments(Arguments):
    """spo_step of csrc/spo_fast.h, and what a subclass adds. Raises ValueError for what the library cannot read."""

    _fields_ = fields(
        m_dtype=INT64,
        x_dtype=INT64,
        cond=POINTER,
        uncond=POINTER,
        x_t=POINTER,
        rows=POINTER,
        table=POINTER,
        num_rows=INT64,
        guidance=DOUBLE,
        B=INT64,
        n=INT64,
    )

    def __init__(
        self,
        cond: Tensor,  # (B, ...) float32, float64, bfloat16 or float16
        uncond: Tensor | None,  # (B, ...) same dtype; None: m = cond
        x_t: Tensor,  # (B, ...) float32 or float64
        rows: Tensor,  # (B,) int64
        table: Tensor,  # (R, 5) float64
        guidance_scale: float,
        **more: Tensor | float | None,
    ) -> None:
        B = x_t.shape[0]
        if cond.dtype not in DTYPE_CODES:
            raise ValueError(f"network outputs have dtype {cond.dtype}; use one of {', '.join(map(str, DTYPE_CODES))}")
        if x_t.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"latents have dtype {x_t.dtype}; use float32 or float64: std is 0.02 at the last step")
        check_tensor("cond", cond, x_t.shape, cond.dtype, x_t)
        check_tensor("uncond", uncond, x_t.shape, cond.dtype, x_t)
        check_tensor("x_t", x_t, x_t.shape, x_t.dtype, x_t)
        check_tensor("rows", rows, (B,), torch.int64, x_t)
        check_tensor("table", table, (table.shape[0], 5), torch.float64, x_t)
        super().__init__(
            m_dtype=cond.dtype,
            x_dtype=x_t.dtype,
            cond=cond,
            uncond=uncond,
            x_t=x_t,
            rows=rows,
            table=table,
            num_rows=table.shape[0],
            guidance=guidance_scale,
            B=B,
            n=x_t.shape[1:].numel() if B else 1,  # of an empty batch no size is read
            **more,
        )


# ---------------------------------------------------------------------------------------------------- public functions


def check_shape(name: str, value: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
    """Shapes and types only: they cost no wait for the device, and a kernel would read out of bounds."""
    if value is not None and (value.shape != shape or (dtype is not None and value.dtype != dtype)):
        wanted = f"{shape}" + (f" {dtype}" if dtype else "")
        raise ValueError(f"{name} is {tuple(value.shape)} {value.dtype}, expected {wanted}")


def checked_states(
    cond: Tensor, uncond: Tensor | None, x_t: Tensor, rows: Tensor, coefficients: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """The arguments as kernels read them: contiguous. Raises ValueError for shapes and types that do not fit.

    Latents are float32 or float64, else TypeError: std is 0.02 at the last step and bf16 resolves only 0.008 near 1.
    """
    check_shape("cond", cond, x_t.shape)
    check_shape("uncond", uncond, x_t.shape, cond.dtype)
    check_shape("rows", rows, x_t.shape[:1], torch.int64)
    check_shape("coefficients", coefficients, (coefficients.shape[0], 5), torch.float64)
    if x_t.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"latents must be float32 or float64, got {x_t.dtype}: convert them with .float() first")
    # UNets in channels_last give channels_last outputs; they are 4 channels wide, so a copy costs nothing.
    uncond = None if uncond is None else uncond.contiguous()
    return cond.contiguous(), uncond, x_t.contiguous(), rows.contiguous(), coefficients
