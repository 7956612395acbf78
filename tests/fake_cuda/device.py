"""A CUDA device of fake tensors: values where the host branches on them, and a watch on what crosses.

A fake tensor has no numbers. Those that an iteration reads to go on (which pairs count, which states a micro-batch
uses) are computed beside the fake ones, on the CPU: what is made of known numbers is known. A sort of unknown numbers
finds them in order, a comparison of them is true, and a number that is only reported is a little above 1, each another.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import spo_fast
from spo_fast.training.plan.counting import SORTS
from spo_fast.training.plan.once import Once

R = TypeVar("R")
PACKAGE = Path(spo_fast.__file__).parent
_aten = torch.ops.aten
MOST_KNOWN = 1 << 16  # numbers of a tensor that are computed beside it: indices and tables
UNFILLED = {_aten.empty, _aten.new_empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty_strided}
READS = {_aten._local_scalar_dense, _aten.equal}
SIZED_BY_VALUES = {
    *(_aten.nonzero, _aten._unique2, _aten.unique_dim, _aten.unique_consecutive, _aten.repeat_interleave),
    *(_aten.masked_select, _aten.bincount),
}


class Event(NamedTuple):
    """What crossed, and from which line of the package."""

    kind: str  # as test_fake_cuda.py explains: wait | to host | to device | sent | mixed | on the host
    op: str
    file: str  # in the package
    function: str
    line: int


def is_on(device_type: str, tensor: Tensor) -> bool:
    """Whether it says it is there, without asking the dispatcher."""
    return (tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device).type == device_type


def place() -> tuple[str, str, int]:
    """The innermost line of the package that is under way, whoever sends for it: file, function, line."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        sends = frame.f_code.co_name == "to_device"
        if PACKAGE in path.parents and "plan" not in path.parts and not sends:
            return str(path.relative_to(PACKAGE)), frame.f_code.co_qualname, frame.f_lineno
        frame = frame.f_back  # type: ignore[assignment]
    return "?", "?", 0


class FakeDevice(TorchDispatchMode):
    """Enter it inside a FakeTensorMode. `seen` counts (phase, event); `phase` is the trainer's timer."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[str, Event]] = Counter()
        self.current = ""
        self._numbers = itertools.count(1)
        self._spoiled: dict[int, Tensor] = {}  # storages of known numbers that unknown ones were written into

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Inside, events belong to this phase."""
        outer, self.current = self.current, name
        yield
        self.current = outer

    def note(self, kind: str, op: str) -> None:
        """An event of the present phase."""
        self.seen[self.current, Event(kind, op, *place())] += 1

    # ---------------------------------------------------------------------------------------------- numbers

    def known(self, tensor: Tensor) -> Tensor | None:
        """Its numbers, if they are known."""
        value = tensor.__dict__.get("known") if isinstance(tensor, FakeTensor) else tensor
        return None if value is None or value.untyped_storage()._cdata in self._spoiled else value

    def fake(self, value: Tensor, device: torch.device) -> Tensor:
        """A fake tensor of known numbers."""
        tensor = torch.empty(value.shape, dtype=value.dtype, device=device)
        tensor.known = value  # type: ignore[attr-defined]
        return tensor

    def numbers(self, tensor: Tensor) -> Tensor:
        """Known ones, or those that are made up where nothing but a report depends on them."""
        value = self.known(tensor)
        if value is not None:
            return value
        if tensor.dtype == torch.bool:
            return torch.ones(tensor.shape, dtype=torch.bool)
        if not tensor.is_floating_point():
            raise AssertionError(f"{':'.join(map(str, place()))}: the host reads integers that are not known")
        made_up = [1 + next(self._numbers) / 1024 for _ in range(tensor.numel())]
        return torch.tensor(made_up, dtype=tensor.dtype).view(tensor.shape)

    # ---------------------------------------------------------------------------------------------- operators

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):  # every second call
            return args[0].fake_device
        kwargs = kwargs or {}
        given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        packet = func._overloadpacket
        if packet in READS or packet in SIZED_BY_VALUES:
            if any(is_on("cuda", x) for x in given):
                self.note("wait", packet.__name__)
            return self._read(func, args, kwargs, given)
        out = func(*args, **kwargs)
        made = [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor)]
        self._watch(packet, given, made, kwargs)
        self._know(func, args, kwargs, given, made)
        return out

    def _read(self, func: Any, args: Any, kwargs: Any, given: list[Tensor]) -> Any:
        with torch._C._DisableTorchDispatch():
            args, kwargs = pytree.tree_map_only(Tensor, self.numbers, (args, kwargs))
            found = func(*args, **kwargs)
        return pytree.tree_map_only(Tensor, lambda x: self.fake(x, given[0].device), found)

    def _watch(self, packet: Any, given: list[Tensor], made: list[Tensor], kwargs: Any) -> None:
        if packet in (_aten._to_copy, _aten.copy_):
            if is_on("cuda", given[-1]) != is_on("cuda", made[0]):
                sent = kwargs.get("non_blocking") and "pinned" in given[-1].__dict__
                there = "sent" if sent else "to device"
                self.note("to host" if is_on("cpu", made[0]) else there, packet.__name__)
            return
        host = [x.ndim for x in given if is_on("cpu", x)]
        if any(host) and len(host) < len(given):
            self.note("mixed", packet.__name__)
        elif packet in (_aten.index, _aten.index_put_) and any(x.dtype == torch.bool for x in given[1:]):
            if not host:
                self.note("wait", packet.__name__)
        elif (not given or packet is _aten.lift_fresh) and any(x.ndim and is_on("cpu", x) for x in made):
            self.note("on the host", packet.__name__)

    def _know(self, func: Any, args: Any, kwargs: Any, given: list[Tensor], made: list[Tensor]) -> None:
        everything = all(self.known(x) is not None for x in given)
        if func._schema.is_mutable and not everything:
            for argument, x in zip(func._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    for part in pytree.tree_leaves(x):
                        if isinstance(part, Tensor) and (value := self.known(part)) is not None:
                            self._spoiled[value.untyped_storage()._cdata] = value
            return
        if func in SORTS and not everything:  # in order already
            dim = next((x for x in args[1:] if type(x) is int), kwargs.get("dim", -1))
            with torch._C._DisableTorchDispatch():
                made[-1].known = torch.ones(made[-1].shape, dtype=torch.int64).cumsum(dim) - 1  # type: ignore[attr-defined]
            return
        small = all(x.numel() <= MOST_KNOWN for x in (*given, *made))
        ours = func.namespace != "aten" and any(is_on("cuda", x) for x in given)  # a kernel of the device
        if not everything or not small or func._overloadpacket in UNFILLED or ours:
            return
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        with torch._C._DisableTorchDispatch():
            args, kwargs = pytree.tree_map_only(Tensor, self.known, (args, kwargs))
            found = pytree.tree_leaves(func(*args, **kwargs))
        for fake, value in zip(made, (x for x in found if isinstance(x, Tensor)), strict=True):
            if isinstance(fake, FakeTensor) and not func._schema.is_mutable:
                fake.known = value  # type: ignore[attr-defined]

    def tolist(self, tensor: Tensor) -> Any:
        """A list of a tensor's numbers: one copy to the host, as of a real one."""
        host = tensor.cpu()
        with torch._C._DisableTorchDispatch():
            return self.numbers(host).tolist()


class OnceWatched(Once):
    """As Once; a repeated call repeats its events, too. repeat=False: every call runs."""

    def __init__(self, watch: FakeDevice, repeat: bool):
        super().__init__(cuda=True, device="cuda")
        self.watch, self.repeat = watch, repeat
        self.checkpoints = True  # with gradient every block runs: its events are its own
        self._took: dict[Hashable, tuple[Counter[Event], Callable[[], object]]] = {}

    def run(self, key: Hashable, part: str, samples: int, function: Callable[[], R]) -> R:
        """function(), or its events and outputs when this key was first met."""
        if not self.repeat:
            return function()
        seen, phase = self.watch.seen, self.watch.current
        if key in self._took:
            events, outputs = self._took[key]
            seen.update({(phase, event): n for event, n in events.items()})
            return cast("R", outputs())
        before = seen.copy()
        out = function()
        leaves, tree = pytree.tree_flatten(out)
        assert all(x.device == self._like.device for x in leaves if isinstance(x, Tensor))
        made = [functools.partial(self.empty, *x.shape, dtype=x.dtype) if isinstance(x, Tensor) else x for x in leaves]
        events = Counter({event: n for (_, event), n in (seen - before).items()})
        self._took[key] = events, lambda: tree.unflatten([x() if callable(x) else x for x in made])
        return out
