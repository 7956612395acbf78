"""The weights that change, with float32 masters, and the gradients that reach them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spo_fast.models.sharded import SAMPLES, Shards


@dataclass
class Average:
    """A moving average of whole masters: decay * average + (1 - decay) * master at each optimizer step."""

    tensors: list[Tensor]
    decay: float


@dataclass
class _Sum:
    """A whole gradient, of weights whose masters are kept in parts."""

    grad: Tensor | None = None


class TrainedWeights:
    """The weights of a network that change, with float32 masters where the network computes in 16 bits.

    Optimizers work on `masters`; gradients arrive there by hooks, and `copy_to_network` takes the result there.
    """

    def __init__(self, named: list[tuple[str, nn.Parameter]]):
        self.names = [name for name, _ in named]
        self._weights = [p for _, p in named]  # what the network computes with
        wide = (torch.float32, torch.float64)
        with torch.no_grad():
            self.masters: list[Tensor] = [p if p.dtype in wide else nn.Parameter(p.float()) for p in self._weights]
        self._hooks = [
            p.register_post_accumulate_grad_hook(_add_to(master))
            for p, master in zip(self._weights, self.masters, strict=True)
            if p is not master
        ]
        self.shards: Shards | None = None
        """If `masters` are this process's parts only; gradients arrive in `_sums` then, whole."""
        self.kept: dict[str, Average] = {}
        """Of AVERAGES (sharded.py) those that are wanted."""
        self.finished: Callable[[], list[Tensor] | None] = lambda: None
        """What is exported, and drawn for validation, in the masters' place; None: they themselves."""
        self._held: dict[int, Tensor] = {}  # gradients' storages, once they are to stay, by the master's number

    @property
    def averages(self) -> list[Tensor] | None:
        """Those that a method samples from, if they are kept."""
        return self.kept[SAMPLES].tensors if SAMPLES in self.kept else None

    @property
    def network_weights(self) -> list[Tensor]:
        """What the network computes with."""
        return list(self._weights)

    @property
    def holds_gradients(self) -> bool:
        """Whether gradients stay when a step has used them, as zeros."""
        return bool(self._held)

    @torch.no_grad()
    def hold_gradients(self, reached: Sequence[bool] = ()) -> None:
        """From now on each master that a backward reaches has a gradient, in a storage that stays: CUDA graphs add to
        it. Others, and those of which it has not been said, have none: an optimizer leaves their weights alone."""
        for i, here in enumerate(reached):
            if here and i not in self._held:
                master = self.masters[i]
                self._held[i] = torch.zeros_like(master) if master.grad is None else master.grad
        for i, held in self._held.items():
            master = self.masters[i]
            if master.grad is not held:
                held.zero_() if master.grad is None else held.copy_(master.grad)
                master.grad = held

    def drop_gradients(self) -> None:
        """After an optimizer step."""
        for i, master in enumerate(self.masters):
            master.grad = self._held.get(i)
        if self._held:
            torch._foreach_zero_(list(self._held.values()))

    def shard(self) -> None:
        """Keep this process's part of the masters only. Call it before averages and an optimizer are made."""
        for hook in self._hooks:
            hook.remove()
        self._sums: list[Tensor | _Sum] = []
        for p, master in zip(self._weights, self.masters, strict=True):
            self._sums.append(p if p is master else _Sum())
            if p is not master:
                p.register_post_accumulate_grad_hook(_add_to(self._sums[-1]))
        self.shards = Shards(self.names, self.masters)
        self.masters = self.shards.own

    def reduce_gradients(self) -> None:
        """Sharded: the gradients of all processes are added up and dealt out to the masters' parts."""
        assert self.shards is not None

        def take(i: int) -> Tensor:
            grad, self._sums[i].grad = self._sums[i].grad, None
            return torch.zeros_like(self._weights[i], dtype=self.masters[i].dtype) if grad is None else grad

        self.shards.reduce_gradients(take)

    @torch.no_grad()
    def _each(self, take: Callable[[int, Tensor], None]) -> None:
        """take(i, master) of each whole master."""
        if self.shards is not None:
            with torch.enable_grad():  # the gradients go back the way the masters came
                self.shards.gather(take)
            return
        for i, master in enumerate(self.masters):
            take(i, master)

    def _copy(self, i: int, master: Tensor) -> None:
        if self._weights[i] is not master:
            self._weights[i].copy_(master)

    def copy_to_network(self) -> None:
        """Copy the masters into the network after an optimizer step; their averages, if kept, follow."""
        if self.shards is None:
            self.copy_masters()
            self.average()
            return

        def take(i: int, master: Tensor) -> None:
            self._copy(i, master)
            for average in self.kept.values():
                average.tensors[i].lerp_(master, 1 - average.decay)

        self._each(take)

    @torch.no_grad()
    def move_averages(self, decay: float) -> None:
        """average = decay * average + (1 - decay) * master, now, beside what `keep_averages` does at each step."""
        assert self.averages is not None, "call keep_averages first"
        averages = self.averages

        def take(i: int, master: Tensor) -> None:
            averages[i].lerp_(master, 1 - decay)

        self._each(take)

    @torch.no_grad()
    def copy_masters(self) -> None:
        """The network computes with them, whole ones, from now on."""
        for i, master in enumerate(self.masters):
            self._copy(i, master)

    @torch.no_grad()
    def average(self) -> None:
        """Move the averages, if kept, towards whole masters."""
        for average in self.kept.values():
            if average.decay < 1:
                torch._foreach_lerp_(average.tensors, self.masters, 1 - average.decay)

    def keep_averages(self, decay: float, name: str = SAMPLES) -> None:
        """From now on: average = decay * average + (1 - decay) * master at each optimizer step."""
        # parts are cut from masters that the network begins with
        whole = self.masters if self.shards is None else self._weights
        dtypes = [master.dtype for master in self.masters]
        tensors = [p.detach().to(dtype, copy=True) for p, dtype in zip(whole, dtypes, strict=True)]
        self.kept[name] = Average(tensors, decay)

    def export_average(self, name: str) -> None:
        """What is exported is this average from now on."""
        self.finished = lambda: self.kept[name].tensors

    def state_dict(self) -> dict[str, Tensor]:
        """The trained weights (masters, or this process's parts of them) by their names in the network."""
        return {name: master.detach() for name, master in zip(self.names, self.masters, strict=True)}

    def computed_weights(self) -> dict[str, Tensor]:
        """What the network computes with, by the same names; whole."""
        return {name: p.detach() for name, p in zip(self.names, self._weights, strict=True)}

    @torch.no_grad()
    def _fill(self, values: list[Tensor]) -> None:
        for p, value in zip(self._weights, values, strict=True):
            p.copy_(value)

    @contextlib.contextmanager
    def _filled(self, values: list[Tensor]) -> Iterator[None]:
        now = [p.detach().clone() for p in self._weights]
        self._fill(values)
        try:
            yield
        finally:
            self._fill(now)

    @contextlib.contextmanager
    def exported(self) -> Iterator[None]:
        """Inside, the network computes with what is exported."""
        finished = self.finished()
        with contextlib.nullcontext() if finished is None else self._filled(finished):
            yield

    def whole(self) -> dict[str, Tensor]:
        """What is exported, whole and in host memory. Of parts all processes call it, and only process 0 gets them."""
        found: dict[str, Tensor] = {}

        def take(i: int, master: Tensor) -> None:
            if self.shards is None or self.shards.mesh.get_rank() == 0:
                found[self.names[i]] = master.detach().to("cpu", copy=self.shards is not None).contiguous()

        if (finished := self.finished()) is None:
            self._each(take)
        for i, value in enumerate(finished or ()):
            take(i, value)
        return found

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Exactly the weights of `state_dict`; missing, extra or misshapen ones raise ValueError."""
        self._read(state, self.masters)
        self._each(self._copy)

    @torch.no_grad()
    def size(self) -> Tensor:  # ()
        """Norm of the masters, or of this process's parts of them. Nothing is read from the device."""
        return torch.nn.utils.get_total_norm(self.masters)

    def average_state_dict(self, name: str = SAMPLES) -> dict[str, Tensor]:
        """Moving averages by the names of `state_dict`; empty if none are kept."""
        return dict(zip(self.names, self.kept[name].tensors, strict=True)) if name in self.kept else {}

    @torch.no_grad()
    def load_average_state_dict(self, state: dict[str, Tensor], name: str = SAMPLES) -> None:
        """The moving averages, as a checkpoint has them."""
        self._read(state, self.kept[name].tensors)

    def _read(self, state: dict[str, Tensor], into: list[Tensor]) -> None:
        if set(state) != set(self.names):
            odd = sorted(set(state) ^ set(self.names))
            raise ValueError(
                f"these trained weights belong to another network or adapter: {len(odd)} names differ, such as {odd[0]}"
            )
        for name, value in zip(self.names, into, strict=True):
            if state[name].shape != value.shape:
                raise ValueError(
                    f"{name} has shape {tuple(state[name].shape)}, expected {tuple(value.shape)}: "
                    "use the same rank as the run that saved it"
                )
            value.copy_(state[name])


def _add_to(master: Tensor | _Sum) -> Callable[[Tensor], None]:
    def hook(p: Tensor) -> None:
        assert p.grad is not None
        grad = p.grad.float()
        master.grad = grad if master.grad is None else master.grad.add_(grad)
        p.grad = None

    return hook
