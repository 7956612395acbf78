"""CUDA graphs of calls that repeat with the same shapes: captured once, replayed with new inputs.

A replay repeats the kernels that were launched while it was recorded, on the same storages: what Python decided then is
decided for good, and only the contents of tensors can change. So inputs are copied into storages of the graph's own,
weights and tables are read where they lie (an optimizer step in place is seen), gradients are added where they lie, and
noise comes from keys that are inputs (method/noise.py).

All graphs share one pool of memory, in which nothing may outlive the next replay: inputs lie outside, outputs are
copied out. So a run that is replayed needs what its largest call needs, once, and not the sum of its calls.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ParamSpec, Protocol, TypeAlias, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.utils import _pytree as pytree

P = ParamSpec("P")
R = TypeVar("R")
Replay: TypeAlias = Callable[[], object]
MOST = 64
"""Graphs of a run: shapes that come after so many others run as they are."""


class Capture(Protocol):
    """What records calls. Tests have one that needs no GPU."""

    def beside(self) -> AbstractContextManager[None]:
        """Inside, calls run as they are, in the graphs' memory, which no replay may use meanwhile."""
        ...

    def warm_up(self, function: Callable[[], object]) -> None:
        """Run what is recorded next: libraries set themselves up for each stream, and may not while recording."""
        ...

    def record(self, function: Callable[[], object]) -> tuple[Replay, object]:
        """What replays the call, and what it returned, which every replay rewrites."""
        ...


class Weights(Protocol):
    """Whose gradients a replayed backward adds to."""

    @property
    def network_weights(self) -> list[Tensor]:
        """What the network computes with."""
        ...

    def hold_gradients(self, reached: Sequence[bool] = ()) -> None:
        """The gradients' storages of those that a backward reaches are there, and stay, from now on."""
        ...


class _Input:
    """A storage that graphs read, refilled before each replay."""

    def __init__(self, like: Tensor):
        self.tensor = like.clone()
        self.source, self.version = weakref.ref(like), like._version

    def holds(self, tensor: Tensor) -> bool:
        """Whether the tensor's numbers are in it already."""
        return self.source() is tensor and self.version == tensor._version

    def note(self, tensor: Tensor) -> None:
        """They are now."""
        self.source, self.version = weakref.ref(tensor), tensor._version


@dataclass
class _Captured:
    inputs: list[_Input]
    replay: Replay
    outputs: object  # rewritten by each replay
    gradients: list[Tensor]  # of the outputs, refilled before each replay of the backward
    replay_backward: Replay | None = None

    def fill(self, tensors: list[Tensor]) -> None:
        """Copy what is not there already: what a rollout's prompts gave is the same at every step."""
        new = [(i, v) for i, v in zip(self.inputs, tensors, strict=True) if not i.holds(v)]
        if new:
            torch._foreach_copy_([i.tensor for i, _ in new], [v for _, v in new])
        for i, v in new:
            i.note(v)


class Graphs:
    """Wraps functions so that a call whose shapes came before is a replay. capture: None never captures.

    The first call with new shapes runs as it is, which also warms up what chooses kernels by timing them; the second is
    captured. So shapes that come once (an epoch's short last batch) cost no graph. waits: nothing is captured until it
    is set to False, which a run does once an iteration has ended: what is compiled or made once, has been then, outside
    of the graphs' memory. A wrapped function that another one calls is a part of that one.
    """

    def __init__(self, capture: Capture | None, waits: bool = False):
        self.capture, self.waits = capture, waits
        self.turn = 0
        """Calls so far: what one left in the graphs' memory is gone at the next."""
        self.first_calls_beside = True
        """New shapes run in the graphs' memory too. Not where they are compiled: constants would be made there."""
        self._seen: set[Hashable] = set()
        self._captured: dict[Hashable, _Captured] = {}
        self._inputs: list[_Input] = []  # of all of them
        self._inside = False

    def __len__(self) -> int:
        return len(self._captured)

    def wrap(self, name: str, function: Callable[P, R]) -> Callable[P, R]:
        """A function of tensors (in tuples and dicts, with constants among them) -> the same function, replayed.

        Without gradient. It must not read from the device or change its inputs, and may run more often than it is
        called: it must not add to anything. Outputs are copies: no later call rewrites them.
        """
        if self.capture is None:
            return function

        @torch.no_grad()
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if self._inside:
                return function(*args, **kwargs)
            captured = self._find(name, function, args, kwargs, None)
            if captured is None:
                return self._first(function, args, kwargs)
            self.turn += 1
            captured.replay()
            return cast("R", pytree.tree_map_only(Tensor, Tensor.clone, captured.outputs))

        return call

    def wrap_trained(self, name: str, function: Callable[P, R], weights: Weights) -> Callable[P, R]:
        """The same with a gradient: the backward of what is returned is replayed, and adds to the weights' gradients.

        It must run before any other call. Inputs get no gradient. All tensors of what it returns have one.
        """
        if self.capture is None:
            return function

        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if self._inside:
                return function(*args, **kwargs)
            if not self.waits:
                weights.hold_gradients()  # where they are added, whatever was done since
            captured = self._find(name, function, args, kwargs, weights)
            if captured is None:
                return self._first(function, args, kwargs)
            anchor = torch.zeros((), device=captured.gradients[0].device, requires_grad=True)
            outputs = iter(_Replayed.apply(anchor, self, captured))
            return cast("R", pytree.tree_map_only(Tensor, lambda _: next(outputs), captured.outputs))

        return call

    def _find(
        self,
        name: str,
        function: Callable[..., object],
        args: tuple[object, ...],
        kwargs: dict[str, object],
        weights: Weights | None,
    ) -> _Captured | None:
        """What was captured of such a call, its inputs filled; None if it is to run as it is."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        # strides too: kernels were chosen for them
        key = (
            name,
            weights is None,
            spec,
            *((v.shape, v.stride(), v.dtype) if isinstance(v, Tensor) else v for v in leaves),
        )
        if key not in self._captured:
            if key not in self._seen or self.waits or len(self) >= MOST:
                self._seen.add(key)
                return None
            with self._within():
                self._captured[key] = self._record(function, leaves, spec, weights)
        captured = self._captured[key]
        captured.fill(_tensors(leaves))
        return captured

    @contextlib.contextmanager
    def _within(self) -> Iterator[None]:
        self._inside = True
        try:
            yield
        finally:
            self._inside = False

    def _first(self, function: Callable[..., R], args: tuple[object, ...], kwargs: dict[str, object]) -> R:
        self.turn += 1
        assert self.capture is not None
        if self.waits or not self.first_calls_beside:
            with self._within():
                return function(*args, **kwargs)
        with self._within(), self.capture.beside():
            outputs = function(*args, **kwargs)
        return cast("R", pytree.tree_map_only(Tensor, Tensor.clone, outputs))

    def _record(
        self, function: Callable[..., object], leaves: list[object], spec: pytree.TreeSpec, weights: Weights | None
    ) -> _Captured:
        assert self.capture is not None
        inputs: list[_Input] = []
        for v in _tensors(leaves):
            inputs.append(self._input(v, inputs))
        there = iter(inputs)
        static = [next(there).tensor if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(static, spec)

        reached: list[bool] = []

        def once() -> None:
            outputs = function(*args, **kwargs)
            if weights is not None:
                made, of = _tensors(outputs), weights.network_weights
                found = torch.autograd.grad(made, of, list(map(torch.zeros_like, made)), allow_unused=True)
                reached.extend(gradient is not None for gradient in found)

        self.capture.warm_up(once)
        if weights is not None:
            weights.hold_gradients(reached)
        gradients: list[Tensor] = []
        replay_backward: Replay | None = None
        replay, outputs = self.capture.record(lambda: function(*args, **kwargs))
        if weights is not None:
            made = _tensors(outputs)
            gradients = [torch.zeros_like(v) for v in made]
            replay_backward, _ = self.capture.record(lambda: torch.autograd.backward(made, gradients))
            outputs = pytree.tree_map_only(Tensor, Tensor.detach, outputs)
        return _Captured(inputs, replay, outputs, gradients, replay_backward)

    def _input(self, tensor: Tensor, taken: list[_Input]) -> _Input:
        """Calls that are given one tensor share its storage: a rollout's text is large. taken: by the same call."""
        found = next((i for i in self._inputs if i.holds(tensor) and i not in taken), None)
        if found is None:
            self._inputs.append(found := _Input(tensor))
        return found


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


class _Context(FunctionCtx):
    graphs: Graphs
    captured: _Captured
    turn: int


class _Replayed(torch.autograd.Function):
    """A captured call, as one operation of autograd's."""

    @staticmethod
    def forward(ctx: _Context, anchor: Tensor, graphs: Graphs, captured: _Captured) -> tuple[Tensor, ...]:
        graphs.turn += 1
        ctx.graphs, ctx.captured, ctx.turn = graphs, captured, graphs.turn
        captured.replay()
        return tuple(v.clone() for v in _tensors(captured.outputs))

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[None, ...]:  # type: ignore[override]
        if ctx.turn != ctx.graphs.turn or ctx.captured.replay_backward is None:
            raise RuntimeError("a replayed call's backward must run once, before the next call: what it saved is gone")
        ctx.graphs.turn += 1
        torch._foreach_copy_(ctx.captured.gradients, list(gradients))
        ctx.captured.replay_backward()
        return (None,) * 3


class CudaCapture:
    """Records CUDA graphs that share one memory pool and one stream."""

    def __init__(self, device: torch.device):
        self.device = device
        self.pool = torch.cuda.MemPool()
        self._pool = cast("torch.cuda._POOL_HANDLE", self.pool.id)
        self.stream = torch.cuda.Stream(device)

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """As Capture.beside. Memory belongs to a stream, and a backward on a thread of its own would take other."""
        torch.cuda.empty_cache()  # when a pool is full, PyTorch frees nothing of what other memory it holds in reserve
        with torch.cuda.device(self.device):
            self.stream.wait_stream(torch.cuda.current_stream())
            with (
                torch.cuda.stream(self.stream),
                torch.cuda.use_mem_pool(self.pool),
                torch.autograd.set_multithreading_enabled(False),
            ):
                yield
            torch.cuda.current_stream().wait_stream(self.stream)

    def warm_up(self, function: Callable[[], object]) -> None:
        """As Capture.warm_up."""
        with self.beside():
            function()

    def record(self, function: Callable[[], object]) -> tuple[Replay, object]:
        """As Capture.record."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph, pool=self._pool, stream=self.stream):
            outputs = function()
        return graph.replay, outputs
