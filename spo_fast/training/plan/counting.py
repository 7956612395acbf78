"""What an iteration on fake tensors takes: the mode that counts it."""

# PyTorch hands operators and their arguments over as they come
# mypy: disable-error-code="explicit-any"
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from spo_fast.training.plan.counters import LiveStorage, flops_of

_aten = torch.ops.aten
SORTS = (_aten.sort.default, _aten.sort.stable, _aten.argsort.default, _aten.argsort.stable)

DEVICE_OF, META = torch.ops.prim.device.default, torch.device("meta")

UNFILLED = (_aten.empty.memory_format, _aten.zeros.default)
"""What numbers are written into."""


class Counting(LiveStorage):
    """Live bytes, and FLOPs, of an iteration whose numbers are fake and whose indices are real: scores come in order,
    and every comparison counts when a rollout reads it.

    One mode for all of it, as every operator goes through each. mode: of the fake tensors. empty: makes one of a
    shape and a type.
    """

    def __init__(self, block: int, mode: FakeTensorMode, empty: Callable[..., Tensor]):
        super().__init__(block)
        self.flops, self._empty = 0, empty
        self._dispatch: Callable[..., Any] = mode.dispatch

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: PyTorch would wrap every call to keep its compiler out, and nothing is compiled here."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is DEVICE_OF and type(args[0]) is FakeTensor:  # asked more often than anything is computed
            return META if args[0].fake_mode.in_kernel_invocation else args[0].fake_device
        if func.namespace == "prim":
            return func(*args, **kwargs)
        out = self._computed(func, types, args, kwargs)
        self.flops += flops_of(func, args, kwargs, out)
        self.made(out, args, kwargs)
        return out

    def _computed(self, func: Any, types: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func is _aten.nonzero.default and isinstance(args[0], FakeTensor):
            return torch.ones(args[0].shape).nonzero()
        if func is _aten.addmm.out and kwargs["out"] is args[0] and isinstance(args[0], FakeTensor):
            # the same product, whose fake outcome PyTorch remembers: of .out forms it remembers none (2.13)
            scales = {name: value for name, value in kwargs.items() if name != "out"}
            return _aten.addmm_.default(*args, **scales)
        out = self._dispatch(func, types, args, kwargs) if FakeTensor in types else func(*args, **kwargs)
        if func in SORTS and isinstance(args[0], FakeTensor):
            dim = next((x for x in args[1:] if type(x) is int), kwargs.get("dim", -1))
            index = torch.ones(args[0].shape, dtype=torch.int64).cumsum(dim) - 1
            return (out[0], index) if isinstance(out, tuple) else index
        if func in UNFILLED and out.is_floating_point() and not isinstance(out, FakeTensor):
            return self._empty(*out.shape, dtype=out.dtype)
        return out
