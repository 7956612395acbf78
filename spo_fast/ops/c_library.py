"""ctypes binding of csrc/spo_fast.h: two shared libraries, CPU and CUDA, with the same functions.

They know nothing of torch, so one build serves every version. Outputs come from torch's allocator; on CUDA the kernels
are launched on the current stream, without synchronisation, so a CUDA graph can capture them (call once before, so that
CUDA has loaded the kernel). Tensors must be contiguous (but for pixels) and on one device. No gradients here.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ABI_VERSION = 2  # SPO_ABI_VERSION of csrc/spo_fast.h
LIBRARIES = {"cpu": "libspo_fast_cpu.so", "cuda": "libspo_fast_cuda.so"}
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
LATENT_DTYPES = (torch.float32, torch.float64)

_INT, _INT64, _DOUBLE, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
_TABLE = [_POINTER, _INT64, _DOUBLE]  # table, num_rows, guidance
_GROUP_NORM = [_INT64] * 4 + [_INT]  # N, C, S, num_groups, channels_last
_LOG_RATIO = [_INT] * 2 + [_POINTER] * 8 + _TABLE + [_INT64] * 3  # dtypes, tensors, U, T, n
ARGUMENTS = {
    "spo_transition": [_INT] * 2 + [_POINTER] * 4 + _TABLE + [_POINTER] * 2 + [_INT64] * 3 + [_POINTER] * 3,
    "spo_log_ratio_forward": _LOG_RATIO + [_POINTER] * 3,
    "spo_log_ratio_backward": _LOG_RATIO + [_POINTER] * 5,
    "spo_resize_normalize": [_INT] * 2 + [_POINTER] * 2 + [_INT64] * 8 + [_POINTER] * 3,
    "spo_merge": [_INT] + [_POINTER] * 3 + [_INT64] + [_POINTER] * 2,
    "spo_group_norm_silu_forward": [_INT] + [_POINTER] * 3 + _GROUP_NORM + [_DOUBLE, _INT] + [_POINTER] * 4,
    "spo_group_norm_silu_backward": [_INT] + [_POINTER] * 6 + _GROUP_NORM + [_INT] + [_POINTER] * 2,
    "spo_philox": [_POINTER] * 3,
    "spo_set_num_threads": [_INT],
    "spo_abi_version": [],
}
CPU_ONLY = {"spo_group_norm_silu_forward", "spo_group_norm_silu_backward"}


def load(device_type: str) -> ctypes.CDLL | None:
    """The library for "cpu" or "cuda" tensors, or None: `why_missing` then says why."""
    return _open(device_type)[0]


def why_missing(device_type: str) -> str:
    """Why `load(device_type)` gave None, and how to mend it ("" if it gave a library)."""
    return _open(device_type)[1]


@functools.cache
def _open(device_type: str) -> tuple[ctypes.CDLL | None, str]:
    """(library, "") or (None, reason)."""
    if device_type not in LIBRARIES:
        return None, f"there is no C library for device type {device_type!r} (only {', '.join(LIBRARIES)})"
    # The folder given replaces the installed one: a forced place that lacks the file must not go unnoticed.
    folder = os.environ.get("SPO_FAST_LIB_DIR") or Path(__file__).parents[1] / "lib"
    path = Path(folder) / LIBRARIES[device_type]
    if not path.is_file():
        needs = "a C++ compiler" if device_type == "cpu" else "nvcc on PATH"
        return None, f"{path} does not exist: run `pip install .` with {needs}, or set SPO_FAST_LIB_DIR"
    try:
        library = ctypes.CDLL(str(path))
        version = library.spo_abi_version()
    except (OSError, AttributeError) as error:
        return None, f"{path} cannot be loaded ({error}): rebuild it with `pip install .`"
    if version != ABI_VERSION:
        return (
            None,
            f"{path} has interface version {version}, this Python code needs {ABI_VERSION}: `pip install .` again",
        )
    for name, argtypes in ARGUMENTS.items():
        if device_type == "cpu" or name not in CPU_ONLY:
            getattr(library, name).argtypes = argtypes
    library.spo_error_string.restype = ctypes.c_char_p
    return library, ""


def transition(
    cond: Tensor,  # (B, ...) float32, float64, bfloat16 or float16
    uncond: Tensor | None,  # (B, ...) same dtype; None: m = cond
    x_t: Tensor,  # (B, ...) float32 or float64
    rows: Tensor,  # (B,) int64
    table: Tensor,  # (R, 5) float64
    guidance_scale: float,
    keys: Tensor | None,  # (B, 5) int64: seed, iteration, prompt, step, candidate
    noise: Tensor | None,  # (K, B, ...) same dtype as x_t; goes before keys
    num_children: int,  # K, may be 0
    want_x0: bool = True,
) -> tuple[Tensor, Tensor]:  # x0 (B, ...), or (0, ...) if not wanted; children (K, B, ...)
    """x0 = c x_t + d m and children a x_t + b m + std z, in one pass.

    Raises ValueError for wrong shapes, dtypes, devices or strides, RuntimeError for a row outside the table (CPU only).
    """
    B, shape = x_t.shape[0], x_t.shape
    m_dtype, x_dtype = _dtype_codes(cond, x_t)
    _check("cond", cond, shape, cond.dtype, x_t)
    _check("uncond", uncond, shape, cond.dtype, x_t)
    _check("x_t", x_t, shape, x_t.dtype, x_t)
    _check("rows", rows, (B,), torch.int64, x_t)
    _check("table", table, (table.shape[0], 5), torch.float64, x_t)
    _check("keys", keys, (B, 5), torch.int64, x_t)
    _check("noise", noise, (num_children, *shape), x_t.dtype, x_t)
    if num_children > 0 and keys is None and noise is None:
        raise ValueError(f"transition: {num_children} children need keys (B, 5) or noise (K, B, ...)")
    x0 = torch.empty_like(x_t) if want_x0 else x_t.new_empty((0, *shape[1:]))
    children = x_t.new_empty((num_children, *shape))
    _call(
        "spo_transition",
        x_t.device,
        *(m_dtype, x_dtype, _pointer(cond), _pointer(uncond), _pointer(x_t), _pointer(rows)),
        *(_pointer(table), table.shape[0], guidance_scale, _pointer(keys), _pointer(noise)),
        *(num_children, B, _sample_size(x_t), _pointer(x0 if want_x0 else None), _pointer(children)),
    )
    return x0, children


def log_ratio_forward(
    cond: Tensor,  # (U, ...) policy, float32, float64, bfloat16 or float16
    uncond: Tensor | None,  # (U, ...)
    frozen_cond: Tensor,  # (U, ...) same dtype
    frozen_uncond: Tensor | None,  # (U, ...), None exactly where uncond is
    x_t: Tensor,  # (U, ...) float32 or float64
    x_prev: Tensor,  # (T, ...) same dtype as x_t
    states: Tensor,  # (T,) int64 in [0, U)
    rows: Tensor,  # (U,) int64
    table: Tensor,  # (R, 5) float64
    guidance_scale: float,
) -> tuple[Tensor, Tensor]:  # log_ratio (T,), kl (T,), dtype of x_t
    """Log-ratio and KL of each transition, means over the elements of a sample.

    Raises ValueError for wrong shapes, dtypes, devices or strides, RuntimeError for an index out of range (CPU only).
    """
    arguments = _log_ratio_arguments(
        cond, uncond, frozen_cond, frozen_uncond, x_t, x_prev, states, rows, table, guidance_scale
    )
    log_ratio, kl = x_t.new_empty(x_prev.shape[0]), x_t.new_empty(x_prev.shape[0])
    _call("spo_log_ratio_forward", x_t.device, *arguments, _pointer(log_ratio), _pointer(kl))
    return log_ratio, kl


def log_ratio_backward(
    cond: Tensor,
    uncond: Tensor | None,
    frozen_cond: Tensor,
    frozen_uncond: Tensor | None,
    x_t: Tensor,
    x_prev: Tensor,
    states: Tensor,
    rows: Tensor,
    table: Tensor,
    guidance_scale: float,
    grad_log_ratio: Tensor,  # (T,) dtype of x_t
    grad_kl: Tensor,  # (T,) dtype of x_t
) -> tuple[Tensor, Tensor | None]:  # grad_cond, grad_uncond (U, ...), dtype of cond
    """Gradients of sum(grad_log_ratio log_ratio + grad_kl kl) with respect to cond and uncond; errors as forward's."""
    arguments = _log_ratio_arguments(
        cond, uncond, frozen_cond, frozen_uncond, x_t, x_prev, states, rows, table, guidance_scale
    )
    _check("grad_log_ratio", grad_log_ratio, states.shape, x_t.dtype, x_t)
    _check("grad_kl", grad_kl, states.shape, x_t.dtype, x_t)
    grad_cond = torch.empty_like(cond)
    grad_uncond = None if uncond is None else torch.empty_like(uncond)
    _call(
        "spo_log_ratio_backward",
        x_t.device,
        *arguments,
        *(_pointer(grad_log_ratio), _pointer(grad_kl), _pointer(grad_cond), _pointer(grad_uncond)),
    )
    return grad_cond, grad_uncond


def resize_normalize(
    pixels: Tensor,  # (N, 3, H, W) float32, float64, bfloat16 or float16, any strides
    size: int,
    mean: list[float],
    std: list[float],
    dtype: torch.dtype,
) -> Tensor:  # (N, 3, size, size) dtype
    """The scorer's input (resize_normalize.py). Raises ValueError for wrong shapes or dtypes."""
    from spo_fast.ops.resize_normalize import resized_and_crop

    if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.dtype not in DTYPE_CODES:
        raise ValueError(f"pixels are {tuple(pixels.shape)} {pixels.dtype}, expected (N, 3, H, W) of a float type")
    H, W = pixels.shape[-2:]
    out = pixels.new_empty((len(pixels), 3, size, size), dtype=dtype)
    _call(
        "spo_resize_normalize",
        pixels.device,
        *(DTYPE_CODES[pixels.dtype], DTYPE_CODES[dtype], _pointer(pixels), (_INT64 * 4)(*pixels.stride())),
        *(len(pixels), H, W, *resized_and_crop(H, W, size), size),
        *((_DOUBLE * 3)(*mean), (_DOUBLE * 3)(*std), _pointer(out)),
    )
    return out


def merge(
    weight: Tensor,  # any shape, float32, bfloat16 or float16
    delta: Tensor,  # same shape, float32
    key: Tensor,  # (5,) int64
    out: Tensor,  # same shape and dtype as weight: written
) -> None:
    """out = weight + delta, rounded stochastically; ValueError for wrong shapes, dtypes, devices or strides."""
    for name, tensor, dtype in (
        ("weight", weight, weight.dtype),
        ("delta", delta, torch.float32),
        ("out", out, weight.dtype),
    ):
        _check(name, tensor, weight.shape, dtype, weight)
    _check("key", key, (5,), torch.int64, weight)
    _call(
        "spo_merge",
        weight.device,
        *(DTYPE_CODES[weight.dtype], _pointer(weight), _pointer(delta), _pointer(key), weight.numel(), _pointer(out)),
    )


def group_norm_silu_forward(
    x: Tensor,  # (N, C, H, W) float32, float64, bfloat16 or float16; NCHW, or channels-last if said so
    weight: Tensor,  # (C,) same dtype
    bias: Tensor,  # (C,)
    num_groups: int,
    channels_last: bool,
    eps: float,
    silu: bool,
    y: Tensor,  # as x, out
    mean: Tensor,  # (N, num_groups) float32, or float64 for float64, out
    rstd: Tensor,  # likewise
) -> None:
    """Group norm, then SiLU if asked. The caller has checked shapes and layouts (ops/group_norm_silu.py)."""
    tensors = (_pointer(t) for t in (x, weight, bias))
    counts = x.shape[0], x.shape[1], x.shape[2] * x.shape[3], num_groups, channels_last
    outputs = (_pointer(t) for t in (y, mean, rstd))
    _call("spo_group_norm_silu_forward", x.device, DTYPE_CODES[x.dtype], *tensors, *counts, eps, silu, *outputs)


def group_norm_silu_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    grad_y: Tensor,  # as x
    num_groups: int,
    channels_last: bool,
    silu: bool,
    grad_x: Tensor,  # as x, out
) -> None:
    """The gradient with respect to x; the caller has checked shapes and layouts."""
    tensors = (_pointer(t) for t in (x, weight, bias, mean, rstd, grad_y))
    counts = x.shape[0], x.shape[1], x.shape[2] * x.shape[3], num_groups, channels_last
    _call("spo_group_norm_silu_backward", x.device, DTYPE_CODES[x.dtype], *tensors, *counts, silu, _pointer(grad_x))


def _log_ratio_arguments(
    cond, uncond, frozen_cond, frozen_uncond, x_t, x_prev, states, rows, table, guidance_scale
) -> tuple:
    """What forward and backward have in common, checked, in the order of the C interface."""
    U, T, shape = x_t.shape[0], x_prev.shape[0], x_t.shape
    m_dtype, x_dtype = _dtype_codes(cond, x_t)
    if (uncond is None) != (frozen_uncond is None):
        raise ValueError("log_ratio: uncond and frozen_uncond must both be given or both be None")
    for name, m in (("cond", cond), ("uncond", uncond), ("frozen_cond", frozen_cond), ("frozen_uncond", frozen_uncond)):
        _check(name, m, shape, cond.dtype, x_t)
    _check("x_t", x_t, shape, x_t.dtype, x_t)
    _check("x_prev", x_prev, (T, *shape[1:]), x_t.dtype, x_t)
    _check("states", states, (T,), torch.int64, x_t)
    _check("rows", rows, (U,), torch.int64, x_t)
    _check("table", table, (table.shape[0], 5), torch.float64, x_t)
    pointers = (_pointer(t) for t in (cond, uncond, frozen_cond, frozen_uncond, x_t, x_prev, states, rows, table))
    return m_dtype, x_dtype, *pointers, table.shape[0], guidance_scale, U, T, _sample_size(x_t)


def _dtype_codes(m: Tensor, x_t: Tensor) -> tuple[int, int]:
    if m.dtype not in DTYPE_CODES:
        raise ValueError(f"network outputs have dtype {m.dtype}; use one of {', '.join(map(str, DTYPE_CODES))}")
    if x_t.dtype not in LATENT_DTYPES:
        raise ValueError(f"latents have dtype {x_t.dtype}; use float32 or float64: std is 0.02 at the last step")
    return DTYPE_CODES[m.dtype], DTYPE_CODES[x_t.dtype]


def _check(name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> None:
    if tensor is None:
        return
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
    if tensor.dtype != dtype:
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected {dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, the others on {like.device}: move it there")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous (strides {tensor.stride()}): call .contiguous() first")


def _sample_size(x: Tensor) -> int:
    """Elements of one sample, also of an empty batch."""
    return x.numel() // x.shape[0] if x.shape[0] else max(1, x.shape[1:].numel())


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _call(name: str, device: torch.device, *arguments: Any) -> None:
    library = load(device.type)
    if library is None:
        raise RuntimeError(f"{name} on {device}: {why_missing(device.type)}")
    if device.type == "cuda":
        with torch.cuda.device(device):
            code = getattr(library, name)(*arguments, torch.cuda.current_stream(device).cuda_stream)
    else:
        library.spo_set_num_threads(torch.get_num_threads())
        code = getattr(library, name)(*arguments, None)
    if code != 0:
        raise RuntimeError(f"{name} on {device} failed: {library.spo_error_string(code).decode()}")
