"""Blocks of a network with gradient: of those that are alike one runs, forward and backward, and the others repeat it.

What a block leaves behind is measured on inputs of its own: bytes that it needs on its way forward and backward, bytes
that its graph holds in between, and which of its inputs and outputs are among them. A repetition is one node of the
graph that holds as much for as long, and passes gradients of the same shapes on.
"""

# PyTorch calls trees of tensors Any
# mypy: disable-error-code="explicit-any"
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.utils import _pytree as pytree

from spo_fast.training.plan.counting import Counting


class Layout(NamedTuple):
    """Of a tensor, its storage apart."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor) -> Layout:
        """A tensor's own."""
        return cls(tuple(x.shape), x.stride(), x.dtype)


Empty = Callable[[Layout], Tensor]


@dataclass(frozen=True)
class Views:
    """Tensors that may lie in one storage, as the parts of a split do."""

    layouts: tuple[Layout, ...]
    places: tuple[tuple[int, int], ...]
    """Of each: its storage's number, and the offset there, in elements."""
    sizes: tuple[int, ...]
    """Of each storage, in bytes."""
    differentiable: tuple[bool, ...]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Views:
        """As these tensors are."""
        sizes: dict[int, tuple[int, int]] = {}
        for x in tensors:
            storage = x.untyped_storage()
            sizes.setdefault(storage._cdata, (len(sizes), storage.nbytes()))
        places = [(sizes[x.untyped_storage()._cdata][0], int(x.storage_offset())) for x in tensors]
        layouts = tuple(map(Layout.of, tensors))
        return cls(layouts, tuple(places), tuple(n for _, n in sizes.values()), tuple(x.requires_grad for x in tensors))

    def made(self, empty: Empty) -> list[Tensor]:
        """Such tensors."""
        bases = [empty(Layout((size,), (1,), torch.uint8)) for size in self.sizes]
        return [
            torch.as_strided(bases[number].view(layout.dtype), layout.shape, layout.stride, offset)
            for layout, (number, offset) in zip(self.layouts, self.places, strict=True)
        ]

    def fixed(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Those that no gradient comes from."""
        return [x for x, differentiable in zip(tensors, self.differentiable, strict=True) if not differentiable]


@dataclass(frozen=True)
class Cost:
    """Of a part of a call: bytes above those at its start, and FLOPs."""

    rise: int
    flops: int


@dataclass(frozen=True)
class Repetition:
    """What a block's call leaves behind."""

    outputs: Views
    tree: pytree.TreeSpec
    """Of the outputs, a leaf of which is a tensor or None."""
    is_tensor: tuple[bool, ...]
    """Of each leaf."""
    forward: Cost
    backward: Cost
    held: int
    """Bytes that the graph holds beside inputs and outputs."""
    inputs_held: tuple[int, ...]
    outputs_held: tuple[int, ...]
    gradients: tuple[Layout | None, ...]
    """Of the inputs and of the weights; None: there is none."""

    def again(self, live: Counting, empty: Empty, tensors: Sequence[Tensor]) -> object:
        """The outputs of such a call, of these inputs and weights."""
        outputs = iter(_Again.apply(self, live, empty, *tensors))  # type: ignore[no-untyped-call]
        return self.tree.unflatten([next(outputs) if here else None for here in self.is_tensor])


class _Context(FunctionCtx):
    """What the functions here leave for their backward."""

    told: Repetition
    live: Counting
    empty: Empty
    end: Callable[[Sequence[Tensor | None]], None]
    begin: Callable[[], None]
    layouts: list[Layout]


class _Again(torch.autograd.Function):
    """A block that is repeated."""

    @staticmethod
    def forward(ctx: _Context, told: Repetition, live: Counting, empty: Empty, *tensors: Tensor) -> tuple[Tensor, ...]:
        live.note(live.current_bytes + told.forward.rise)
        live.flops += told.forward.flops
        outputs = told.outputs.made(empty)
        ctx.mark_non_differentiable(*told.outputs.fixed(outputs))
        held = [empty(Layout((told.held,), (1,), torch.uint8))]
        held += [tensors[i] for i in told.inputs_held] + [outputs[i] for i in told.outputs_held]
        ctx.save_for_backward(*held)
        ctx.told, ctx.live, ctx.empty = told, live, empty
        return tuple(outputs)

    @staticmethod
    def backward(ctx: _Context, *_: Tensor) -> tuple[Tensor | None, ...]:
        told, live, empty = ctx.told, ctx.live, ctx.empty
        live.note(live.current_bytes + told.backward.rise)
        live.flops += told.backward.flops
        return None, None, None, *(None if layout is None else empty(layout) for layout in told.gradients)


class _Begin(torch.autograd.Function):
    """Inputs that nobody holds but the call which they are given to. end: takes their gradients."""

    @staticmethod
    def forward(
        ctx: _Context, empty: Empty, inputs: Views, end: Callable[[Sequence[Tensor | None]], None], _: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        made, ctx.end = inputs.made(empty), end
        ctx.mark_non_differentiable(*inputs.fixed(made))
        return tuple(made)

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.end(gradients)
        return None, None, None, None


class _End(torch.autograd.Function):
    """Outputs' gradients come into being here, so that nobody else holds them. begin: is called then."""

    @staticmethod
    def forward(ctx: _Context, empty: Empty, begin: Callable[[], None], *outputs: Tensor) -> Tensor:
        ctx.empty, ctx.begin, ctx.layouts = empty, begin, [Layout.of(x) for x in outputs]
        return empty(Layout((), (), torch.float32))

    @staticmethod
    def backward(ctx: _Context, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [ctx.empty(layout) for layout in ctx.layouts]
        ctx.begin()
        return None, None, *gradients


class Measurement:
    """Of one block's call. What is live, its peaks and its FLOPs are afterwards as they were before."""

    def __init__(self, live: Counting, empty: Empty):
        self.live, self.empty = live, empty
        self.begun, self.flops = 0, 0
        self.gradients: list[Layout | None] = []

    def repetition(
        self, function: Callable[..., object], inputs: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> Repetition:
        """What function(*inputs) leaves behind, and its backward."""
        live = self.live
        peaks, flops = dict(live.peaks), live.flops
        try:
            return self._repetition(function, inputs, weights)
        finally:
            live.peaks, live.flops = peaks, flops

    def _repetition(
        self, function: Callable[..., object], inputs: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> Repetition:
        live, self.gradients = self.live, [None] * len(inputs)
        door = self.empty(Layout((), (), torch.float32)).requires_grad_()
        before = live.current_bytes
        root, there, (outputs, tree, is_tensor), forward = self._forward(function, Views.of(inputs), door)
        inputs_held, outputs_held = (
            tuple(i for i, (address, _) in enumerate(of) if live.is_alive(address)) for of in there
        )
        kept = {address: size for of in there for address, size in of if live.is_alive(address)}
        between = live.current_bytes - before - sum(kept.values()) - live.rounded(root.nbytes)
        (_, *found) = torch.autograd.grad(root, [door, *weights], allow_unused=True)
        backward = Cost(live.peaks[live.phase_name] - self.begun, live.flops - self.flops)
        gradients = (*self.gradients, *(None if g is None else Layout.of(g) for g in found))
        return Repetition(outputs, tree, is_tensor, forward, backward, between, inputs_held, outputs_held, gradients)

    def _forward(
        self, function: Callable[..., object], inputs: Views, door: Tensor
    ) -> tuple[Tensor, list[list[tuple[int, int]]], tuple[Views, pytree.TreeSpec, tuple[bool, ...]], Cost]:
        """What the backward starts from, where inputs and outputs lie, what the outputs are like, and their cost."""
        live = self.live
        mine = _Begin.apply(self.empty, inputs, self._end, door)  # type: ignore[no-untyped-call]
        start, flops = live.current_bytes, live.flops
        live.peaks[live.phase_name] = start
        leaves, tree = pytree.tree_flatten(function(*mine))
        forward = Cost(live.peaks[live.phase_name] - start, live.flops - flops)
        outputs = [x for x in leaves if x is not None]
        there = [self._places(mine), self._places(outputs)]
        like = Views.of(outputs), tree, tuple(x is not None for x in leaves)
        root = _End.apply(self.empty, self._begin, *(x for x in outputs if x.requires_grad))  # type: ignore[no-untyped-call]
        return root, there, like, forward

    def _places(self, tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
        """Of each tensor's storage: its address and its bytes."""
        storages = [x.untyped_storage() for x in tensors]
        return [(storage._cdata, self.live.rounded(storage.nbytes())) for storage in storages]

    def _begin(self) -> None:
        self.begun, self.flops = self.live.current_bytes, self.live.flops
        self.live.peaks[self.live.phase_name] = self.begun

    def _end(self, gradients: Sequence[Tensor | None]) -> None:
        self.gradients = [None if g is None else Layout.of(g) for g in gradients]
