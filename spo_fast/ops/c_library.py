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

INT, INT64, DOUBLE, POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
_TABLE = [POINTER, INT64, DOUBLE]  # table, num_rows, guidance
_GROUP_NORM = [INT64] * 4 + [INT]  # N, C, S, num_groups, channels_last
_LOG_RATIO = [INT] * 2 + [POINTER] * 8 + _TABLE + [INT64] * 3  # dtypes, tensors, U, T, n
ARGUMENTS = {
    "spo_transition": [INT] * 2 + [POINTER] * 4 + _TABLE + [POINTER] * 2 + [INT64] * 3 + [POINTER] * 3,
    "spo_log_ratio_forward": _LOG_RATIO + [POINTER] * 3,
    "spo_log_ratio_backward": _LOG_RATIO + [POINTER] * 5,
    "spo_resize_normalize": [INT] * 2 + [POINTER] * 2 + [INT64] * 8 + [POINTER] * 3,
    "spo_merge": [INT] + [POINTER] * 3 + [INT64] + [POINTER] * 2,
    "spo_group_norm_silu_forward": [INT] + [POINTER] * 3 + _GROUP_NORM + [DOUBLE, INT] + [POINTER] * 4,
    "spo_group_norm_silu_backward": [INT] + [POINTER] * 6 + _GROUP_NORM + [INT] + [POINTER] * 2,
    "spo_philox": [POINTER] * 3,
    "spo_set_num_threads": [INT],
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


def dtype_codes(m: Tensor, x_t: Tensor) -> tuple[int, int]:
    """As csrc numbers them. Raises ValueError for types that it does not take."""
    if m.dtype not in DTYPE_CODES:
        raise ValueError(f"network outputs have dtype {m.dtype}; use one of {', '.join(map(str, DTYPE_CODES))}")
    if x_t.dtype not in LATENT_DTYPES:
        raise ValueError(f"latents have dtype {x_t.dtype}; use float32 or float64: std is 0.02 at the last step")
    return DTYPE_CODES[m.dtype], DTYPE_CODES[x_t.dtype]


def check_tensor(name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> None:
    """Raises ValueError unless the tensor is as the C code will read it. None is not looked at."""
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


def sample_size(x: Tensor) -> int:
    """Elements of one sample, also of an empty batch."""
    return x.numel() // x.shape[0] if x.shape[0] else max(1, x.shape[1:].numel())


def pointer(tensor: Tensor | None) -> int | None:
    """The tensor's address for ctypes."""
    return None if tensor is None else tensor.data_ptr()


def call(name: str, device: torch.device, *arguments: Any) -> None:
    """A function of csrc on the device's current stream. Raises RuntimeError for its error, or without a library."""
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
