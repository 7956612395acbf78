"""A CUDA graph's rules without CUDA: the aten calls of a function, recorded once and repeated on the same storages."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from spo_fast.models.graphs import Graphs
from spo_fast.training import loop


class Tape(TorchDispatchMode):
    """What was called on which tensors. Python between the calls is gone when `replay` repeats them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in ("aten::_local_scalar_dense", "aten::nonzero"):
            raise RuntimeError(f"{func.name()} waits for the device: a graph cannot hold it")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, recorded in self.calls:
            if func.is_view:
                continue  # a view of a storage that is rewritten in place shows the new contents
            new = func(*args, **kwargs)
            pairs = zip(tensors(recorded), tensors(new), strict=True)
            for old, value in pairs:
                if old is not value and old.untyped_storage()._cdata != value.untyped_storage()._cdata:
                    old.copy_(value)


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


class Recorder:
    """As spo_fast.models.graphs.Capture."""

    beside = staticmethod(contextlib.nullcontext)

    def warm_up(self, function: Any) -> None:
        """Nothing here needs it, but it tells which weights a backward reaches."""
        function()

    def record(self, function: Any) -> tuple[Any, Any]:
        """What replays the call, and what it returned."""
        with Tape() as tape:
            outputs = function()
        return tape.replay, outputs


capture = Recorder()


def recording(monkeypatch: pytest.MonkeyPatch) -> list[Graphs]:
    """From now on runs record by the tape; what they record is appended to the list returned."""
    runs: list[Graphs] = []
    record_graphs = loop.Run.record_graphs

    def recorded_graphs(self: loop.Run, _: object) -> None:
        record_graphs(self, capture)
        runs.append(self.policy.graphs)

    monkeypatch.setattr(loop.Run, "record_graphs", recorded_graphs)
    return runs
