"""Which implementation of an op runs, and why.

Every op exists as `eager` (plain PyTorch, the definition); some also as `triton` (GPU, or CPU through
TRITON_INTERPRET=1), as `c` (csrc/ through ctypes, CPU and CUDA), or, if it is one product, as `onednn` (CPU). Each op
declares an order per device, taken from measurements, and another for those calls there that were measured otherwise;
the first backend of that order that can run here is used. SPO_FAST_BACKEND=name or `with use_backend(name)` forces
one, and a forced backend that cannot run raises: nothing falls back silently.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.library import CustomOpDef, infer_schema

from spo_fast.ops import c_library, onednn
from spo_fast.ops.optional_triton import INTERPRET, triton

BACKENDS = ("eager", "triton", "c", "onednn")


@dataclass(frozen=True)
class Order:
    """Backends, the preferred first, and why."""

    backends: tuple[str, ...]
    why: str
    """Where the order comes from."""


def _device(case: str) -> str:
    return case.partition(" ")[0]


@dataclass(frozen=True)
class Op:
    """An op's name, its backends in order of preference, and why some do not exist."""

    name: str
    orders: Mapping[str, Order]
    """By device type, or by what the call is: whatever `case` gives."""
    absent: Mapping[str, str]
    """backend, or "backend device" -> why this op has no such implementation."""
    case: Callable[[Tensor], str] | None
    """A call's tensor -> its key in `orders` ("cpu channels-last"); one that is none stands for the device type."""

    @property
    def known(self) -> tuple[str, ...]:
        """The backends that there is something to say of."""
        ordered = {backend for order in self.orders.values() for backend in order.backends}
        return tuple(b for b in BACKENDS if b != "onednn" or b in ordered)

    def why_absent(self, backend: str, device_type: str) -> str | None:
        """Why there is no such implementation on this device type; None if there is one."""
        if backend not in self.known:
            return "its own kernel is of no library"
        return self.absent.get(backend) or self.absent.get(f"{backend} {device_type}")

    def order(self, case: str) -> Order:
        """Of a case, else of its device type; eager on one that nobody has thought of."""
        return self.orders.get(case) or self.orders.get(_device(case)) or Order(("eager",), "the definition")


OPS: dict[str, Op] = {}
_forced: str | None = os.environ.get("SPO_FAST_BACKEND") or None


def register(
    name: str,
    *,
    cpu: tuple[str, ...],
    cuda: tuple[str, ...],
    why: str,
    absent: Mapping[str, str] | None = None,
    case: Callable[[Tensor], str] | None = None,
    cases: Mapping[str, Order] | None = None,
) -> None:
    """Add an op to the table that `python -m spo_fast.ops` prints: its orders by device type, and by case if any.

    `case` must read no more of the tensor than torch.compile guards on: its type, sizes and strides.
    """
    orders = {"cpu": Order(cpu, why), **(cases or {}), "cuda": Order(cuda, why)}
    OPS[name] = Op(name, orders, absent or {}, case)


@functools.cache
def why_not(name: str, backend: str, device_type: str) -> str | None:
    """None if `backend` can run op `name` on this device type here, else the reason in words."""
    op = OPS[name]
    if op.why_absent(backend, device_type) is not None:
        return op.why_absent(backend, device_type)
    if backend == "triton":
        if triton is None:
            return "the package triton is not installed"
        if device_type == "cpu" and not INTERPRET:
            return "Triton needs a GPU (on a CPU: TRITON_INTERPRET=1 before start, to check correctness)"
    if backend == "onednn":
        return None if onednn.exists() else "this PyTorch has no oneDNN"
    if backend == "c":
        return None if c_library.load(device_type) is not None else c_library.why_missing(device_type)
    return None


def why_later(backend: str) -> str | None:
    """None if a backend that can run is taken as its op's order says, else the reason why others come first."""
    return onednn.why_slow() if backend == "onednn" else None


def available_backends(name: str, device_type: str = "cpu") -> list[str]:
    """The backends of op `name` that can run here, in BACKENDS' order."""
    return [b for b in BACKENDS if why_not(name, b, device_type) is None]


@functools.cache
def _cached_choice(name: str, case: str, forced: str | None, wide: bool) -> str:
    device_type = _device(case)
    if forced is not None and forced not in BACKENDS:
        raise ValueError(f"SPO_FAST_BACKEND={forced!r} is unknown. Use one of {', '.join(BACKENDS)}.")
    op = OPS[name]
    # an op that has no such backend keeps its own choice; oneDNN has no other cases than those it stands first in
    has = forced is not None and op.why_absent(forced, device_type) is None
    if has and (forced != "onednn" or forced in op.order(case).backends):
        assert forced is not None
        reason = why_not(name, forced, device_type)
        if reason is not None:
            raise RuntimeError(
                f"backend {forced!r} was asked for, but op {name!r} cannot use it on {device_type}: {reason}. "
                f"Available: {', '.join(available_backends(name, device_type))}."
            )
        return forced
    # no GPU kernel is tuned for float64: it is left to the others unless Triton is forced
    able = [b for b in op.order(case).backends if why_not(name, b, device_type) is None]
    return next(b for b in able if not (wide and b == "triton") and why_later(b) is None)


def _choose(name: str, case: str, forced: str | None, wide: bool = False) -> str:
    return _cached_choice(name, case, forced, wide)


# torch.compile must not look inside the cache. torch.compiler.assume_constant_result does no more, but imports the
# compiler: a second that nobody who does not compile has to wait
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose(name: str, like: Tensor) -> str:
    """The backend that op `name` uses for tensors such as `like`: of its device, type and memory layout."""
    # The case and _forced are read here, outside the constant function, so that torch.compile guards on them.
    op = OPS[name]
    case = like.device.type if op.case is None else op.case(like)
    return _choose(name, case, _forced, like.dtype == torch.float64)


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force one backend for every op inside the block (None: the automatic choice)."""
    global _forced  # noqa: PLW0603  read by every op's choice, inside compiled graphs too
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


class Context(FunctionCtx):
    """What PyTorch hands to an op's save and backward."""

    constants: tuple[float, ...]
    """Numbers that save leaves for backward beside the tensors."""
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]


def library_op(
    name: str,
    schema: str,
    function: Callable[..., object],
    fake: Callable[..., object],
    mutates_args: tuple[str, ...] = (),
) -> CustomOpDef:
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


def implementations(
    name: str,
    *,
    triton: Callable[..., object],
    fake: Callable[..., object],
    eager: Callable[..., object] | None = None,
    c: Callable[..., object] | None = None,
    schema: str | None = None,
    mutates_args: tuple[str, ...] = (),
) -> dict[str, Callable[..., Any]]:
    """backend -> callable, all with the arguments of one schema: that of `triton`'s annotations, unless it is given.

    `eager` needs no op of its own: PyTorch sees through it.
    """
    schema = schema or infer_schema(triton, mutates_args=mutates_args).replace("SymInt", "int")
    found: dict[str, Callable[..., Any]] = {} if eager is None else {"eager": eager}
    for backend, function in (("triton", triton), ("c", c)):
        if function is not None:
            found[backend] = library_op(f"{name}_{backend}", schema, function, fake, mutates_args)
    return found


def differentiate(
    forward: Mapping[str, Callable[..., Any]],
    gradient: Mapping[str, Callable[..., Any]],
    save: Callable[..., None],
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> None:
    """Each op's gradient: save(ctx, inputs, output), then backward(its backend's op of `gradient`, ctx, *grads)."""
    for name, op in forward.items():
        if isinstance(op, CustomOpDef):
            op.register_autograd(functools.partial(backward, gradient.get(name)), setup_context=save)


def table(device_types: tuple[str, ...] | None = None) -> list[tuple[str, str, str, str]]:
    """Rows (op, device or case, backend, reason): what runs on this machine, why, and why the others do not."""
    if device_types is None:
        device_types = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    rows = []
    for op in OPS.values():
        for case in op.orders:
            device_type = _device(case)
            if device_type not in device_types:
                continue
            chosen, order = _choose(op.name, case, _forced), op.order(case)
            for backend in op.known:
                reason = why_not(op.name, backend, device_type)
                if reason is None and backend in order.backends:
                    reason = why_later(backend)
                if backend == chosen:
                    if backend == _forced:
                        reason = "chosen: forced"
                    elif backend == order.backends[0]:
                        reason = f"chosen: {order.why}"
                    else:
                        before = order.backends[: order.backends.index(backend)]
                        slower = all(why_not(op.name, b, device_type) is None for b in before)
                        reason = f"chosen: {' and '.join(before)} {'is no faster' if slower else 'cannot run'}"
                rows.append((op.name, case, backend, reason or f"available, {chosen} goes before"))
    return rows
