"""Networks without weights, each of whose calls runs once for every set of shapes."""

# PyTorch hands operators and their arguments over as they come
# mypy: disable-error-code="explicit-any"
from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from spo_fast.training.plan.counters import CUDA_BLOCK, CountFlops, LiveStorage

P = ParamSpec("P")
R = TypeVar("R")
M = TypeVar("M", bound=nn.Module)


class Once:
    """Makes fake weights, and runs calls of networks: the first with new shapes as it is, later ones as its repetition.

    Fake tensors have a shape, a type and a storage that takes no memory. What is computed of one is one; all else, as
    the indices of an experience, is real. cuda: storages take as many bytes as there. device: where the weights lie.
    """

    def __init__(self, cuda: bool = False, device: str = "cpu"):
        self.device = torch.device(device)
        self.mode, self.live = FakeTensorMode(allow_non_fake_inputs=True), LiveStorage(CUDA_BLOCK if cuda else 1)
        self.tally: dict[str, Counter[str]] = {}
        """Part of a run -> samples and flops."""
        self.setting: Hashable = None
        # a call's bytes on its way, its FLOPs, its outputs anew
        self._seen: dict[Hashable, tuple[int, int, Callable[[], object]]] = {}
        self._counters: list[CountFlops] = []  # of the calls that are running, the outermost first
        with self.mode:
            self._like = torch.empty(0, device=self.device)

    def start(self, setting: Hashable) -> LiveStorage:
        """Count anew. setting: what the calls depend on besides their shapes."""
        self.live, self.tally, self.setting = LiveStorage(self.live.block), {}, setting
        return self.live

    def weights(self, module: M, dtype: torch.dtype | None = None) -> M:
        """The module of the meta device with fake weights, of this type or their own."""
        with self.mode:
            for part in module.modules():
                for name, p in part.named_parameters(recurse=False):
                    values = torch.empty(p.shape, dtype=dtype or p.dtype, device=self.device)
                    part._parameters[name] = nn.Parameter(values, p.requires_grad)
                for name, b in part.named_buffers(recurse=False):
                    part._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device=self.device)
        return module.eval()

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A fake tensor."""
        return self._like.new_empty(shape, dtype=dtype)

    def wrap(self, function: Callable[P, R], part: str | None = None, samples: bool = True) -> Callable[P, R]:
        """The function, run once for each set of shapes without gradient; with gradient it is left alone.

        part: of the tally; None: the phase. samples: the first tensor's rows are counted.
        """

        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.is_grad_enabled():
                return function(*args, **kwargs)
            name = part or self.live.phase_name
            tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            key = (id(function), name, self.setting, *((x.shape, x.dtype) for x in tensors))
            return self.run(key, name, len(tensors[0]) if samples else 0, lambda: function(*args, **kwargs))

        return call

    def run(self, key: Hashable, part: str, samples: int, function: Callable[[], R]) -> R:
        """function(), or what it left behind when this key was first met: its outputs, peak and FLOPs."""
        out, flops = self._repeat(key, function)
        self.tally.setdefault(part, Counter()).update(samples=samples, flops=flops)
        return out

    def repeat_blocks(self, network: nn.Module, blocks: tuple[type[nn.Module], ...]) -> None:
        """Of the network's blocks that are alike, one runs without gradient, for each set of inputs; its outputs must
        share nothing with its inputs."""
        for block in (m for m in network.modules() if isinstance(m, blocks)):
            block.forward = self._block(block.forward, structure(block))

    def _block(self, function: Callable[P, R], like: Hashable) -> Callable[P, R]:
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.is_grad_enabled():
                return function(*args, **kwargs)
            told = [
                (x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x
                for x in pytree.tree_leaves((args, kwargs))
            ]
            key = (like, self.live.phase_name, self.setting, *told)
            return self._repeat(key, lambda: function(*args, **kwargs))[0]

        return call

    def _repeat(self, key: Hashable, function: Callable[[], R]) -> tuple[R, int]:
        """(function() or its outputs anew, its FLOPs)."""
        if key in self._seen:
            rise, flops, outputs = self._seen[key]
            self.live.note(self.live.current_bytes + rise)
            for counter in self._counters:
                counter.total += flops
            return cast("R", outputs()), flops
        with CountFlops() as counter:
            self._counters.append(counter)
            try:
                out, rise = self.live.rise(function)
            finally:
                self._counters.pop()
        leaves, tree = pytree.tree_flatten(out)
        made = [
            functools.partial(self._made, x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x for x in leaves
        ]
        self._seen[key] = rise, counter.total, lambda: tree.unflatten([x() if callable(x) else x for x in made])
        return out, counter.total

    def _made(self, shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self._like.new_empty_strided(shape, stride, dtype=dtype)


def structure(module: nn.Module) -> Hashable:
    """What two modules share that compute the same of other weights."""
    parts = tuple((name, type(m), m.extra_repr()) for name, m in module.named_modules())
    tensors = (*module.named_parameters(), *module.named_buffers())
    return parts, tuple((name, t.shape, t.stride(), t.dtype, t.requires_grad) for name, t in tensors)


_aten = torch.ops.aten
SORTS = (_aten.sort.default, _aten.sort.stable, _aten.argsort.default, _aten.argsort.stable)

UNFILLED = (_aten.empty.memory_format, _aten.zeros.default)
"""What numbers are written into."""


class EveryPairKept(TorchDispatchMode):
    """Numbers are fake and indices real: scores come in order, and every comparison counts when a rollout reads it."""

    def __init__(self, once: Once):
        super().__init__()
        self.once = once

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _aten.nonzero.default and isinstance(args[0], FakeTensor):
            return torch.ones(args[0].shape).nonzero()
        out = func(*args, **(kwargs or {}))
        if func in SORTS and isinstance(args[0], FakeTensor):
            dim = next((x for x in args[1:] if type(x) is int), (kwargs or {}).get("dim", -1))
            index = torch.ones(args[0].shape, dtype=torch.int64).cumsum(dim) - 1
            return (out[0], index) if isinstance(out, tuple) else index
        if func in UNFILLED and out.is_floating_point() and not isinstance(out, FakeTensor):
            return self.once.empty(*out.shape, dtype=out.dtype)
        return out
