"""Counters of FLOPs and of live bytes, for real and fake tensors alike."""

# PyTorch hands operators and their arguments over as they come
# mypy: disable-error-code="explicit-any"
from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

CUDA_BLOCK = 512  # bytes: PyTorch's CUDA allocator gives out multiples of it

R = TypeVar("R")


class LiveStorage(TorchDispatchMode):
    """Bytes of the tensor storages that came into being inside the block and are still alive, real or fake.

    with LiveStorage() as live: ...; live.peak_bytes. `count` adds what existed before. `phase` keeps peaks apart and
    serves as the trainer's timer. block: storages take multiples of so many bytes.
    """

    def __init__(self, block: int = 1):
        super().__init__()
        self.block = block
        self.current_bytes = 0
        self.peaks: dict[str, int] = {}  # phase -> most bytes alive in it
        self.phase_name = ""
        self._alive: dict[int, weakref.ref] = {}  # address of the storage -> what tells its end

    @property
    def peak_bytes(self) -> int:
        """The highest of all phases."""
        return max(self.peaks.values(), default=0)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Inside, peaks go to this name and no other."""
        outer, self.phase_name = self.phase_name, name
        self.note(self.current_bytes)
        try:
            yield
        finally:
            self.phase_name = outer

    def note(self, live_bytes: int) -> None:
        """So many bytes were alive at some time of this phase."""
        self.peaks[self.phase_name] = max(self.peaks.get(self.phase_name, 0), live_bytes)

    def rise(self, function: Callable[[], R]) -> tuple[R, int]:
        """What the call returns, and how many bytes above the present ones it needs on its way."""
        start, outer = self.current_bytes, self.peaks.pop(self.phase_name, 0)
        self.note(start)
        result = function()
        rise = self.peaks[self.phase_name] - start
        self.note(outer)
        return result, rise

    def count(self, tensors: Iterable[Tensor]) -> int:
        """Count these from now on as well, weights from before the block say; returns the bytes this adds."""
        before = self.current_bytes
        for tensor in tensors:
            self._add(tensor.untyped_storage())
        return self.current_bytes - before

    def rounded(self, num_bytes: int) -> int:
        """What a storage of so many bytes takes."""
        return -(-num_bytes // self.block) * self.block

    def is_alive(self, address: int) -> bool:
        """Whether a storage that was there is still counted; another may come to lie at its address."""
        return address in self._alive

    def _add(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, self.rounded(storage.nbytes())
        if address not in self._alive:
            self._alive[address] = weakref.ref(storage, lambda _: self._remove(address, size))
            self.current_bytes += size
            self.note(self.current_bytes)

    def _remove(self, address: int, size: int) -> None:
        del self._alive[address]
        self.current_bytes -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.made(out, args, kwargs)
        return out

    def made(self, out: object, args: Any, kwargs: Any) -> None:
        """An operator returned this."""
        new = [s for s in _storages(out) if s._cdata not in self._alive]
        if new:  # a view of a weight from before the block is not new
            old = {s._cdata for s in _storages((args, kwargs))}
            for storage in new:
                if storage._cdata not in old:
                    self._add(storage)


def _storages(tree: object) -> list[torch.UntypedStorage]:
    leaves = [tree] if isinstance(tree, Tensor) else pytree.tree_leaves(tree)
    return [leaf.untyped_storage() for leaf in leaves if isinstance(leaf, Tensor)]


_aten = torch.ops.aten
FLOPS = {  # FlopCounterMode does not know the CPU's fused attention, and its module hooks keep gradients alive
    **flop_registry,
    _aten._int_mm: flop_registry[_aten.mm],
    _aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q.shape, k.shape, v.shape
    ),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(
        g.shape, q.shape, k.shape, v.shape
    ),
}


def flops_of(func: Any, args: Any, kwargs: Any, out: object) -> int:
    """FLOPs (2 x MAC) of an operator's call, by PyTorch's formula; 0 if it is no matrix product, convolution or
    attention."""
    formula = FLOPS.get(func._overloadpacket)
    return 0 if formula is None else formula(*args, **(kwargs or {}), out_val=out)


class CountFlops(TorchDispatchMode):
    """flops_of all operators inside the block."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.total += flops_of(func, args, kwargs, out)
        return out
