"""A CLIP scorer's input from decoded pixels, in one read of them.

    x = bicubic resize (a = -0.75, half-pixel centres, no antialias) of the short side to `size`, centre crop
    y = (clamp(x / 2 + 1/2, 0, 1) - mean_c) / std_c

as the published trainer has it: the VAE's overshoot goes through the resize and is clamped after it. The definition
resizes in the pixels' own dtype and rounds after each operation, as published; the kernels compute in float32
throughout and place the taps by integers, so on 16-bit pixels they are the more exact ones. What the crop drops is
never computed. No kernel has a backward: rollouts judge without gradient. Pixels that require one go through the
definition.

# N, 1024 -> 224, 16-bit: at most 2 * 3 * 1024^2 N bytes read and 2 * 3 * 224^2 N written, 105.5 MB at N = 16: 25 us of
# an H200's 4.3 TB/s. A scale of 4.6 skips source pixels, but no 32-byte sector: 4 of 4.6 rows, 88 %, are read. 120
# FLOPs a value: memory-bound. Eager launches 15 kernels, of which the resize is one and the others touch 224^2 pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spo_fast.ops import backend
from spo_fast.ops.backend import implementations
from spo_fast.ops.c_library import DOUBLE, DTYPE_CODES, INT64, POINTER, Arguments, call, fields
from spo_fast.ops.optional_triton import jit, launch, tl

backend.register(
    "resize_normalize",
    cpu=("c", "eager"),
    cuda=("triton", "c", "eager"),
    why="one read; measured on a CPU (benchmarks/LOG.md), the order on a GPU awaits a measurement",
)

OUTPUT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MAX_PRODUCT = 2**29  # source side * resized side: the kernels place taps by 32-bit integers


def resized_and_crop(height: int, width: int, size: int) -> tuple[int, int, int, int]:
    """(height, width) after the resize, then (top, left) of the crop; both round as the published code does."""
    scale = size / min(height, width)
    h, w = int(height * scale + 0.5), int(width * scale + 0.5)
    return h, w, round((h - size) / 2), round((w - size) / 2)  # half to even, as torchvision's CenterCrop


# ---------------------------------------------------------------------------------------------------- definition


def normalise_channels(
    pixels: Tensor,  # (N, 3, S, S) in [0, 1]
    mean: tuple[float, ...] | list[float],
    std: tuple[float, ...] | list[float],
) -> Tensor:
    """Channel by channel with Python numbers: a constant tensor would be a copy from the host."""
    channels = zip(pixels.unbind(dim=1), mean, std, strict=True)
    return torch.stack([(channel - m) / s for channel, m, s in channels], dim=1)


def resize_normalize_ref(pixels, size, mean, std, dtype):
    """The definition."""
    height, width, top, left = resized_and_crop(*pixels.shape[-2:], size)
    x = F.interpolate(pixels, size=(height, width), mode="bicubic", align_corners=False)
    x = x[..., top : top + size, left : left + size]
    return normalise_channels((x / 2 + 0.5).clamp(0, 1).float(), mean, std).to(dtype)


# ---------------------------------------------------------------------------------------------------- Triton kernel


@jit
def _cubic_near(t):
    """Keys' kernel at t, 0 <= t <= 1; `_cubic_far`: at 1 + t."""
    return 1.0 - t * t * (2.25 - 1.25 * t)


@jit
def _cubic_far(t):
    return -0.75 * t * (1.0 - t) * (1.0 - t)


@jit
def _position(o, source, target):
    """First of four taps and the fraction of output position o, exactly: (o + 1/2) source / target - 1/2."""
    numerator = (2 * o + 1) * source + target  # plus one pixel, so that it is never negative
    fraction = (numerator % (2 * target)).to(tl.float32) / (2 * target)
    return numerator // (2 * target) - 2, fraction


@jit
def _tap(first, k, source):
    return tl.minimum(tl.maximum(first + k, 0), source - 1).to(tl.int64)


@jit
def _line(line, x0, x1, x2, x3, t, mask):
    """Four columns of one source row, mixed."""
    value = _cubic_far(t) * tl.load(line + x0, mask=mask, other=0.0).to(tl.float32)
    value += _cubic_near(t) * tl.load(line + x1, mask=mask, other=0.0).to(tl.float32)
    value += _cubic_near(1.0 - t) * tl.load(line + x2, mask=mask, other=0.0).to(tl.float32)
    return value + _cubic_far(1.0 - t) * tl.load(line + x3, mask=mask, other=0.0).to(tl.float32)


@jit
def _channel(plane, out, y0, y1, y2, y3, x0, x1, x2, x3, y_t, x_t, mean, std, mask):
    value = _cubic_far(y_t) * _line(plane + y0, x0, x1, x2, x3, x_t, mask)
    value += _cubic_near(y_t) * _line(plane + y1, x0, x1, x2, x3, x_t, mask)
    value += _cubic_near(1.0 - y_t) * _line(plane + y2, x0, x1, x2, x3, x_t, mask)
    value += _cubic_far(1.0 - y_t) * _line(plane + y3, x0, x1, x2, x3, x_t, mask)
    value = value / 2 + 0.5
    value = tl.where(value < 0.0, 0.0, tl.where(value > 1.0, 1.0, value))  # a NaN stays one
    tl.store(out, ((value - mean) / std).to(out.dtype.element_ty), mask=mask)


@jit
def _resize_normalize_kernel(
    pixels_ptr,
    out_ptr,
    H,
    W,
    resized_h,
    resized_w,
    top,
    left,
    size,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    mean_r,
    mean_g,
    mean_b,
    std_r,
    std_g,
    std_b,
    BLOCK: tl.constexpr,
):
    """BLOCK neighbouring pixels of one output image, three channels each: taps are placed once."""
    image = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size * size
    y, y_t = _position(at // size + top, H, resized_h)
    x, x_t = _position(at % size + left, W, resized_w)
    y0 = _tap(y, 0, H) * stride_h
    y1 = _tap(y, 1, H) * stride_h
    y2 = _tap(y, 2, H) * stride_h
    y3 = _tap(y, 3, H) * stride_h
    x0 = _tap(x, 0, W) * stride_w
    x1 = _tap(x, 1, W) * stride_w
    x2 = _tap(x, 2, W) * stride_w
    x3 = _tap(x, 3, W) * stride_w
    plane = pixels_ptr + image * stride_n
    out = out_ptr + image * 3 * size * size + at
    _channel(plane, out, y0, y1, y2, y3, x0, x1, x2, x3, y_t, x_t, mean_r, std_r, mask)
    plane += stride_c
    out += size * size
    _channel(plane, out, y0, y1, y2, y3, x0, x1, x2, x3, y_t, x_t, mean_g, std_g, mask)
    plane += stride_c
    out += size * size
    _channel(plane, out, y0, y1, y2, y3, x0, x1, x2, x3, y_t, x_t, mean_b, std_b, mask)


BLOCK = 128  # one output pixel a thread: two take 128 registers


def _launch(pixels: Tensor, size: int, mean: list[float], std: list[float], dtype: torch.dtype) -> Tensor:
    out = pixels.new_empty((len(pixels), 3, size, size), dtype=dtype)
    if len(pixels) == 0:
        return out
    H, W = pixels.shape[-2:]
    launch(_resize_normalize_kernel)[(len(pixels), -(-size * size // BLOCK))](
        *(pixels, out, H, W, *resized_and_crop(H, W, size), size, *pixels.stride(), *mean, *std),
        BLOCK=BLOCK,
    )
    return out


# ---------------------------------------------------------------------------------------------------- C library


class ResizeNormalizeArguments(Arguments):
    """spo_resize_normalize_args of csrc/spo_fast.h."""

    _fields_ = fields(
        pixel_dtype=INT64,
        out_dtype=INT64,
        pixels=POINTER,
        strides=INT64 * 4,
        N=INT64,
        H=INT64,
        W=INT64,
        resized_h=INT64,
        resized_w=INT64,
        top=INT64,
        left=INT64,
        size=INT64,
        mean=DOUBLE * 3,
        std_dev=DOUBLE * 3,
        out=POINTER,
    )


def resize_normalize_c(pixels, size, mean, std, dtype):
    """As resize_normalize_ref. Raises ValueError for wrong shapes or dtypes."""
    if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.dtype not in DTYPE_CODES:
        raise ValueError(f"pixels are {tuple(pixels.shape)} {pixels.dtype}, expected (N, 3, H, W) of a float type")
    N, _, H, W = pixels.shape
    out = _fake(pixels, size, mean, std, dtype)
    resized_h, resized_w, top, left = resized_and_crop(H, W, size)
    arguments = ResizeNormalizeArguments(
        pixel_dtype=pixels.dtype,
        out_dtype=dtype,
        pixels=pixels,
        strides=pixels.stride(),
        N=N,
        H=H,
        W=W,
        resized_h=resized_h,
        resized_w=resized_w,
        top=top,
        left=left,
        size=size,
        mean=tuple(mean),
        std_dev=tuple(std),
        out=out,
    )
    call("spo_resize_normalize", pixels.device, arguments)
    return out


# ---------------------------------------------------------------------------------------------------- torch.library ops


def _fake(pixels, size, mean, std, dtype):
    return pixels.new_empty((pixels.shape[0], 3, size, size), dtype=dtype)


RESIZE_NORMALIZE = implementations(
    "resize_normalize", eager=resize_normalize_ref, triton=_launch, c=resize_normalize_c, fake=_fake
)

# ---------------------------------------------------------------------------------------------------- public function


def resize_normalize(
    pixels: Tensor,  # (N, 3, H, W) about [-1, 1], any float type, any strides
    size: int,
    mean: tuple[float, float, float],  # of pixels in [0, 1]
    std: tuple[float, float, float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # (N, 3, size, size) `dtype`, contiguous
    """Bicubic resize of the short side to `size`, centre crop, to [0, 1], clamp, normalise.

    Differentiable in pixels: those that require a gradient go through the definition, whatever the backend. Raises
    ValueError for other shapes or types.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3 or 0 in pixels.shape[2:]:
        raise ValueError(f"pixels must be (N, 3, H, W) and not empty, got {tuple(pixels.shape)}")
    if dtype not in OUTPUT_DTYPES:
        raise ValueError(f"dtype={dtype} is no type of a scorer: use one of {', '.join(map(str, OUTPUT_DTYPES))}")
    H, W = pixels.shape[-2:]
    if max(side * resized for side, resized in zip((H, W), resized_and_crop(H, W, size), strict=False)) > MAX_PRODUCT:
        raise ValueError(f"an image of {H}x{W} pixels is too long to be resized to {size}: crop it first")
    # rollouts judge without gradient, so no kernel has a backward
    with_gradient = torch.is_grad_enabled() and pixels.requires_grad
    chosen = "eager" if with_gradient else backend.choose("resize_normalize", pixels)
    return RESIZE_NORMALIZE[chosen](pixels, size, list(mean), list(std), dtype)
