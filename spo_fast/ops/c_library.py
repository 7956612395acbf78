"""ctypes binding of csrc/spo_fast.h: two shared libraries, CPU and CUDA, with the same functions.

They know nothing of torch, so one build serves every version. Outputs come from torch's allocator; on CUDA the kernels
are launched on the current stream, without synchronisation, so a CUDA graph can capture them (call once before, so that
CUDA has loaded the kernel). Tensors must be contiguous (but for pixels) and on one device. No gradients here. The
functions' arguments, one struct each, stand beside their ops.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import torch
from torch import Tensor

ABI_VERSION = 4  # SPO_ABI_VERSION of csrc/spo_fast.h
LIBRARIES = {"cpu": "libspo_fast_cpu.so", "cuda": "libspo_fast_cuda.so"}
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

INT64, DOUBLE, POINTER = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p


def fields(**kinds: type) -> list[tuple[str, type]]:
    """A struct's fields in order, by name."""
    return list(kinds.items())


class Arguments(ctypes.Structure):
    """Mirror of a struct of csrc/spo_fast.h: a subclass adds the fields behind the first, which is the struct's size.

    Fields are given by name, tensors and types as they are; those left out are 0. The caller keeps the tensors alive.
    """

    _fields_ = fields(bytes=INT64)

    def __init__(self, **values: Tensor | torch.dtype | float | tuple[float, ...] | None) -> None:
        super().__init__(bytes=ctypes.sizeof(self), **{name: _as_c(value) for name, value in values.items()})


def _as_c(value: Tensor | torch.dtype | float | tuple[float, ...] | None) -> float | tuple[float, ...] | None:
    if isinstance(value, Tensor):
        return value.data_ptr()
    return DTYPE_CODES[value] if isinstance(value, torch.dtype) else value


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
        return None, f"{path} does not exist: run `pip install -e .` with {needs}, or set SPO_FAST_LIB_DIR"
    try:
        library = ctypes.CDLL(str(path))
        version = library.spo_abi_version()
    except (OSError, AttributeError) as error:
        return None, f"{path} cannot be loaded ({error}): run `pip install -e .` again"
    if version != ABI_VERSION:
        built = f"{path} has interface version {version}, this Python code needs {ABI_VERSION}"
        return None, f"{built}: run `pip install -e .` again"
    library.spo_error_string.restype = ctypes.c_char_p
    return library, ""


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


def call(name: str, device: torch.device, arguments: Arguments) -> None:
    """A function of csrc on the device's current stream. Raises RuntimeError for its error, or without a library."""
    library = load(device.type)
    if library is None:
        raise RuntimeError(f"{name} on {device}: {why_missing(device.type)}")
    function = getattr(library, name)
    if device.type == "cuda":
        with torch.cuda.device(device):
            code = function(ctypes.byref(arguments), POINTER(torch.cuda.current_stream(device).cuda_stream))
    else:
        library.spo_set_num_threads(torch.get_num_threads())
        code = function(ctypes.byref(arguments), None)
    if code != 0:
        raise RuntimeError(f"{name} on {device} failed: {library.spo_error_string(code).decode()}")
