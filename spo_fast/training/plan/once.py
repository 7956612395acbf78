"""Networks without weights, each of whose calls runs once for every set of shapes."""

# PyTorch calls trees of tensors Any
# mypy: disable-error-code="explicit-any"
from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from typing import ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from spo_fast.training.plan.counters import CUDA_BLOCK
from spo_fast.training.plan.counting import Counting
from spo_fast.training.plan.repeated import Layout, Measurement, Repetition

P = ParamSpec("P")
R = TypeVar("R")
M = TypeVar("M", bound=nn.Module)

INITIALISERS = (  # of torch.nn.init
    *("normal_", "uniform_", "trunc_normal_", "kaiming_normal_", "kaiming_uniform_", "xavier_uniform_"),
    *("zeros_", "ones_", "constant_"),
)


@contextlib.contextmanager
def shapes_alone() -> Iterator[None]:
    """Inside, networks are built on the meta device, and torch.nn.init leaves their weights, which have no numbers."""
    plain = {name: getattr(nn.init, name) for name in INITIALISERS}
    try:
        for name in plain:
            setattr(nn.init, name, _left)
        with torch.device("meta"):
            yield
    finally:
        for name, function in plain.items():
            setattr(nn.init, name, function)


def _left(tensor: Tensor, *_: object, **__: object) -> Tensor:
    return tensor


class Once:
    """Makes fake weights, and runs calls of networks: the first with new shapes as it is, later ones as its repetition.

    Fake tensors have a shape, a type and a storage that takes no memory. What is computed of one is one; all else, as
    the indices of an experience, is real. cuda: storages take as many bytes as there. device: where the weights lie.
    """

    def __init__(self, cuda: bool = False, device: str = "cpu"):
        self.device = torch.device(device)
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.live = Counting(CUDA_BLOCK if cuda else 1, self.mode, self.empty)
        self.tally: dict[str, Counter[str]] = {}
        """Part of a run -> samples and flops."""
        self.setting: Hashable = None
        self.checkpoints = False
        # a call's bytes on its way, its FLOPs, its outputs anew
        self._seen: dict[Hashable, tuple[int, int, Callable[[], object]]] = {}
        self._repetitions: dict[Hashable, Repetition] = {}
        with self.mode:
            self._like = torch.empty(0, device=self.device)

    def start(self, setting: Hashable, checkpoints: bool = False) -> Counting:
        """Count anew. setting: what the calls depend on besides their shapes. checkpoints: a backward computes blocks
        again, up to what it needs, which no repetition knows."""
        self.checkpoints = checkpoints
        self.live, self.tally, self.setting = Counting(self.live.block, self.mode, self.empty), {}, setting
        return self.live

    def weights(self, module: M, dtype: torch.dtype | None = None) -> M:
        """The module of the meta device with fake weights, of this type or their own."""
        with self.mode:
            for part in module.modules():
                for name, p in part._parameters.items():
                    if p is not None:
                        part._parameters[name] = self._parameter(p, dtype or p.dtype)
                for name, b in part._buffers.items():
                    if b is not None:
                        part._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device=self.device)
        return module.eval()

    def _parameter(self, like: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
        """As nn.Parameter makes one of a fake tensor, without detaching it first: one operation less a weight."""
        values = torch.empty(like.shape, dtype=dtype, device=self.device).requires_grad_(like.requires_grad)
        values._is_param = True  # type: ignore[attr-defined]
        return cast(nn.Parameter, values)

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
        """function(), or what it left behind when this key was first met: its outputs, peak and FLOPs. They are
        counted inside `with live` alone."""
        out, flops = self._repeat(key, function)
        self.tally.setdefault(part, Counter()).update(samples=samples, flops=flops)
        return out

    def repeat_blocks(self, network: nn.Module, blocks: tuple[type[nn.Module], ...]) -> None:
        """Of the network's blocks that are alike, one runs, for each set of inputs; its outputs must be tensors that
        share nothing with its inputs."""
        for block in (m for m in network.modules() if isinstance(m, blocks)):
            block.forward = self._block(block, block.forward, structure(block))

    def _block(self, block: nn.Module, function: Callable[..., object], like: Hashable) -> Callable[..., object]:
        weights = [p for p in block.parameters() if p.requires_grad]

        def call(*args: object, **kwargs: object) -> object:
            if torch.is_grad_enabled() and self.checkpoints:
                return function(*args, **kwargs)
            leaves, tree = pytree.tree_flatten((args, kwargs))
            tensors = [x for x in leaves if isinstance(x, Tensor)]
            told = [(*Layout.of(x), x.requires_grad) if isinstance(x, Tensor) else x for x in leaves]
            key = (like, self.live.phase_name, self.setting, *told)
            if not (torch.is_grad_enabled() and any(x.requires_grad for x in (*tensors, *weights))):
                return self._repeat(key, lambda: function(*args, **kwargs))[0]

            def again(*others: Tensor) -> object:
                rest = iter(others)
                args, kwargs = tree.unflatten([next(rest) if isinstance(x, Tensor) else x for x in leaves])
                return function(*args, **kwargs)

            key = (*key, any(getattr(m, "recompute", False) for m in block.modules()))
            if key not in self._repetitions:
                measurement = Measurement(self.live, self._empty_like)
                self._repetitions[key] = measurement.repetition(again, tensors, weights)
            return self._repetitions[key].again(self.live, self._empty_like, [*tensors, *weights])

        return call

    def _repeat(self, key: Hashable, function: Callable[[], R]) -> tuple[R, int]:
        """(function() or its outputs anew, its FLOPs)."""
        if key in self._seen:
            rise, flops, outputs = self._seen[key]
            self.live.note(self.live.current_bytes + rise)
            self.live.flops += flops
            return cast("R", outputs()), flops
        before = self.live.flops
        out, rise = self.live.rise(function)
        flops = self.live.flops - before
        leaves, tree = pytree.tree_flatten(out)
        made = [functools.partial(self._empty_like, Layout.of(x)) if isinstance(x, Tensor) else x for x in leaves]
        self._seen[key] = rise, flops, lambda: tree.unflatten([x() if callable(x) else x for x in made])
        return out, flops

    def _empty_like(self, layout: Layout) -> Tensor:
        return self._like.new_empty_strided(layout.shape, layout.stride, dtype=layout.dtype)


def structure(module: nn.Module) -> Hashable:
    """What two modules share that compute the same of other weights."""
    parts = tuple((name, type(m), m.extra_repr()) for name, m in module.named_modules())
    tensors = (*module.named_parameters(), *module.named_buffers())
    return parts, tuple((name, t.shape, t.stride(), t.dtype, t.requires_grad) for name, t in tensors)
