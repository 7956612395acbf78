"""CUDA graphs of calls that repeat with the same shapes: captured once, replayed with new inputs.

A replay repeats the kernels that were launched while it was recorded, on the same storages: what Python decided then is
decided for good, and only the contents of tensors can change. So inputs are copied into storages of the graph's own,
weights and tables are read where they lie (an optimizer step in place is seen), and noise comes from keys that are
inputs (method/noise.py).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

P = ParamSpec("P")
R = TypeVar("R")
Capture = Callable[[Callable[[], object]], tuple[Callable[[], object], object]]
"""A call without arguments -> what replays it, and what it returned, which every replay rewrites."""


@dataclass
class _Captured:
    inputs: list[Tensor]  # refilled before each replay
    replay: Callable[[], object]
    outputs: object  # rewritten by each replay
    filled: list[tuple[weakref.ref[Tensor], int]]  # what each input was last filled with: the tensor and its version

    def fill(self, tensors: list[Tensor]) -> None:
        """Copy what is not there already: what a rollout's prompts gave is the same at every step."""
        now = [(weakref.ref(v), v._version) for v in tensors]
        new = [i for i, was in enumerate(self.filled) if was[0]() is not tensors[i] or was[1] != now[i][1]]
        if new:
            torch._foreach_copy_([self.inputs[i] for i in new], [tensors[i] for i in new])
        self.filled = now


class Graphs:
    """Wraps functions so that a call whose shapes came before is a replay. capture: None never captures.

    The first call with new shapes runs as it is, which also warms up what chooses kernels by timing them; the second is
    captured. So shapes that come once (an epoch's short last batch) cost no graph.
    """

    def __init__(self, capture: Capture | None):
        self.capture = capture
        self._seen: set[Hashable] = set()
        self._captured: dict[Hashable, _Captured] = {}

    def __len__(self) -> int:
        return len(self._captured)

    def wrap(self, name: str, function: Callable[P, R]) -> Callable[P, R]:
        """A function of tensors (in tuples and dicts, with constants among them) -> the same function, replayed.

        Without gradient. It must not read from the device or change its inputs. Outputs are copies: no later call
        rewrites them.
        """
        if self.capture is None:
            return function

        @torch.no_grad()
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            leaves, spec = pytree.tree_flatten((args, kwargs))
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            # strides too: kernels were chosen for them
            key = (name, spec, *((v.shape, v.stride(), v.dtype) if isinstance(v, Tensor) else v for v in leaves))
            if key not in self._captured:
                if key not in self._seen:
                    self._seen.add(key)
                    return function(*args, **kwargs)
                self._captured[key] = self._record(function, leaves, spec)
            captured = self._captured[key]
            captured.fill(tensors)
            captured.replay()
            return pytree.tree_map_only(Tensor, Tensor.clone, captured.outputs)

        return call

    def _record(self, function: Callable[..., object], leaves: list[object], spec: pytree.TreeSpec) -> _Captured:
        assert self.capture is not None
        static = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(static, spec)
        replay, outputs = self.capture(lambda: function(*args, **kwargs))
        inputs = [leaf for leaf in static if isinstance(leaf, Tensor)]
        return _Captured(inputs, replay, outputs, [(weakref.ref(v), -1) for v in inputs])


class CudaCapture:
    """Records CUDA graphs that share one memory pool: none of their outputs outlives the next replay."""

    def __init__(self, device: torch.device, warmups: int = 1):
        self.device, self.warmups = device, warmups
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], object]) -> tuple[Callable[[], object], object]:
        """(what replays the call, what it returned)."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # libraries set themselves up per stream, and may not while recording
                for _ in range(self.warmups):
                    function()
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph, pool=self.pool):
                outputs = function()
        return graph.replay, outputs
