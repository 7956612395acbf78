"""Which implementation of an op runs, and why.

Every op exists as `eager` (plain PyTorch, the definition); some also as `triton` (GPU, or CPU through
TRITON_INTERPRET=1) and as `c` (csrc/ through ctypes, CPU and CUDA). Each op declares an order per device, taken from
measurements; the first backend of that order that can run here is used. SPO_FAST_BACKEND=name or `with
use_backend(name)` forces one, and a forced backend that cannot run raises: nothing falls back silently.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

BACKENDS = ("eager", "triton", "c")
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
# Triton's default changes in 3.10; ours, a * b + c in one rounding, must not change with it
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


@dataclass(frozen=True)
class Op:
    """An op's name, its backends in order of preference per device type, and why some do not exist."""

    name: str
    order: Mapping[str, tuple[str, ...]]
    """device type -> backends, the preferred first."""
    why: str
    """Where the order comes from."""
    absent: Mapping[str, str] = field(default_factory=dict)
    """backend, or "backend device" -> why this op has no such implementation."""

    def why_absent(self, backend: str, device_type: str) -> str | None:
        """Why there is no such implementation on this device type; None if there is one."""
        return self.absent.get(backend) or self.absent.get(f"{backend} {device_type}")


OPS: dict[str, Op] = {}
_forced: str | None = os.environ.get("SPO_FAST_BACKEND") or None


def register(op: Op) -> Op:
    """Add an op to the table that `python -m spo_fast.ops` prints."""
    OPS[op.name] = op
    return op


@functools.cache
def why_not(name: str, backend: str, device_type: str) -> str | None:
    """None if `backend` can run op `name` on this device type here, else the reason in words."""
    op = OPS[name]
    if op.why_absent(backend, device_type) is not None:
        return op.why_absent(backend, device_type)
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if device_type == "cpu" and not INTERPRET:
            return "Triton needs a GPU (on a CPU: TRITON_INTERPRET=1 before start, to check correctness)"
    if backend == "c":
        from spo_fast.ops import c_library

        return None if c_library.load(device_type) is not None else c_library.why_missing(device_type)
    return None


def available_backends(name: str, device_type: str = "cpu") -> list[str]:
    """The backends of op `name` that can run here, in BACKENDS' order."""
    return [b for b in BACKENDS if why_not(name, b, device_type) is None]


@functools.cache
def _cached_choice(name: str, device_type: str, forced: str | None, wide: bool) -> str:
    if forced is not None and forced not in BACKENDS:
        raise ValueError(f"SPO_FAST_BACKEND={forced!r} is unknown. Use one of {', '.join(BACKENDS)}.")
    # an op that has no such backend keeps its own choice
    if forced is not None and OPS[name].why_absent(forced, device_type) is None:
        reason = why_not(name, forced, device_type)
        if reason is not None:
            raise RuntimeError(
                f"backend {forced!r} was asked for, but op {name!r} cannot use it on {device_type}: {reason}. "
                f"Available: {', '.join(available_backends(name, device_type))}."
            )
        return forced
    order = OPS[name].order.get(device_type, ("eager",))
    # no GPU kernel is tuned for float64: it is left to the others unless Triton is forced
    return next(b for b in order if why_not(name, b, device_type) is None and not (wide and b == "triton"))


def two_floats(x: float) -> tuple[float, float]:
    """The two float32 whose sum is x to 48 bits: Triton takes Python numbers as float32."""
    x = float(x)  # a number that torch.compile would keep symbolic becomes a constant
    high = struct.unpack("f", struct.pack("f", x))[0]
    return high, x - high if math.isfinite(x) else 0.0


@torch.compiler.assume_constant_result
def _choose(name: str, device_type: str, forced: str | None, wide: bool = False) -> str:
    return _cached_choice(name, device_type, forced, wide)  # torch.compile must not look inside the cache


def choose(name: str, like: torch.Tensor) -> str:
    """The backend that op `name` uses for tensors such as `like`."""
    # _forced is read here, outside the constant function, so that torch.compile guards on it.
    return _choose(name, like.device.type, _forced, like.dtype == torch.float64)


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force one backend for every op inside the block (None: the automatic choice)."""
    global _forced  # noqa: PLW0603  read by every op's choice, inside compiled graphs too
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def library_op(
    name: str,
    schema: str,
    function: Callable[..., Any],
    fake: Callable[..., Any],
    mutates_args: tuple[str, ...] = (),
) -> Any:
    """Register `spo_fast::name`; `fake` gives the outputs' shapes, `mutates_args` names what it writes into.

    Triton ops are `triton_op`s on a GPU, so that Inductor sees their kernels; C calls and the interpreter's kernels are
    opaque to it: `custom_op`.
    """
    if name.endswith("_triton") and not INTERPRET:
        # triton_op reads the schema from the function's annotations
        op: Any = torch.library.triton_op(f"spo_fast::{name}", function, mutates_args=mutates_args)
    else:
        op = torch.library.custom_op(f"spo_fast::{name}", function, mutates_args=mutates_args, schema=schema)
    op.register_fake(fake)
    return op


def launch(kernel: Any) -> Any:
    """A Triton kernel ready for `[grid](...)` inside a `library_op`."""
    return kernel if INTERPRET else torch.library.wrap_triton(kernel)


def table(device_types: tuple[str, ...] | None = None) -> list[tuple[str, str, str, str]]:
    """Rows (op, device, backend, reason): what runs on this machine, why, and why the others do not."""
    if device_types is None:
        device_types = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    rows = []
    for op in OPS.values():
        for device_type in device_types:
            chosen = _choose(op.name, device_type, _forced)
            for backend in BACKENDS:
                reason = why_not(op.name, backend, device_type)
                if backend == chosen:
                    order = op.order.get(device_type, ("eager",))
                    if backend == _forced:
                        reason = "chosen: forced"
                    elif backend == order[0]:
                        reason = f"chosen: {op.why}"
                    else:
                        reason = f"chosen: {' and '.join(order[: order.index(backend)])} cannot run"
                rows.append((op.name, device_type, backend, reason or f"available, {chosen} goes before"))
    return rows
