"""ops.ada_norm at the shapes of SD3.5-medium's and FLUX.1's streams, alone and with its backward, against float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_group_norm_silu import compiled
from benchmarks.bench_transition import contenders
from benchmarks.shapes import STREAMS, StreamShape
from benchmarks.timing import Case
from spo_fast.ops.ada_norm import ada_norm, ada_norm_ref


def dtype_of(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def block_case(
    op: str,
    shape: StreamShape,
    device: str,
    modes: tuple[str, ...],
    backward: bool,
    sizes: list[tuple[int, ...]],  # of what has a gradient
    function: Callable[..., Any],
    definition: Callable[..., Any],
    truth: Callable[..., Any],
    elements: int,  # moved a token and channel, forward and then both
) -> Case:
    """A case of an op of a transformer's block, whose functions take these tensors and return one or several."""
    dtype = dtype_of(device)

    def make(seed: int) -> tuple:
        generator = torch.Generator(device).manual_seed(seed)
        draw = functools.partial(torch.randn, generator=generator, device=device, dtype=dtype)
        return tuple(draw(size).requires_grad_(backward) for size in sizes)

    def run(function: Callable[..., Any], *inputs: Tensor) -> Any:
        out = function(*inputs)
        out = out if isinstance(out, tuple) else (out,)
        if not backward:
            return tuple(y.detach() for y in out)
        return (*(y.detach() for y in out), *torch.autograd.grad(out, inputs, [torch.ones_like(y) for y in out]))

    def exact(*inputs: Tensor) -> Any:
        return run(truth, *(x.detach().double().requires_grad_(backward) for x in inputs))

    runnable, skipped = contenders(op, functools.partial(run, function), definition, device, ())
    if modes:
        skipped.pop("compile")
        runnable["compile"] = functools.partial(run, compiled(definition, modes))
    name = f"{op} {shape.name} {'forward+backward' if backward else 'forward'}"
    moved = elements * shape.batch * shape.tokens * shape.width * dtype.itemsize
    return Case(name, str(dtype)[6:], vars(shape).copy(), moved, make, exact, runnable, skipped)


def case(shape: StreamShape, device: str, modes: tuple[str, ...], backward: bool) -> Case:
    """One residual, one norm; the modulations are frozen."""
    stream, row = (shape.batch, shape.tokens, shape.width), (shape.batch, shape.width)
    generator = torch.Generator(device).manual_seed(9)
    gate, shift, scale = (torch.randn(row, generator=generator, device=device) for _ in range(3))

    def function(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return ada_norm(x, [(shift.to(x.dtype), scale.to(x.dtype))], [(gate.to(x.dtype), y)])

    def definition(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return ada_norm_ref(x, [(gate.to(x.dtype), y)], [(shift.to(x.dtype), scale.to(x.dtype))], 1e-6)

    def truth(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        g, b, s = (v.to(dtype_of(device)).double()[:, None] for v in (gate, shift, scale))
        h = x + g * y
        centred = h - h.mean(-1, keepdim=True)
        return h, centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + s) + b

    elements = 9 if backward else 4  # x, y, h, n; h, dh, dn, dx, dy
    return block_case("ada_norm", shape, device, modes, backward, [stream] * 2, function, definition, truth, elements)


def cases(size: str, device: str, modes: tuple[str, ...] = ()) -> list[Case]:
    return [case(shape, device, modes, backward) for shape in STREAMS[size] for backward in (False, True)]
