"""ops.geglu at the shapes of real UNet forwards, alone and with its backward, against float64."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_group_norm_silu import compiled, with_gradient
from benchmarks.bench_transition import contenders
from benchmarks.shapes import LayerShape, layer_shapes
from benchmarks.timing import Case
from spo_fast.ops.geglu import geglu, geglu_ref


def case(shape: LayerShape, dtype: torch.dtype, device: str, modes: tuple[str, ...], backward: bool) -> Case:
    def make(seed: int) -> tuple:
        generator = torch.Generator(device).manual_seed(seed)
        h = torch.randn(shape.x, generator=generator, device=device, dtype=dtype).requires_grad_(backward)
        grad_shape = (*shape.x[:-1], shape.x[-1] // 2)
        return h, torch.randn(grad_shape, generator=generator, device=device, dtype=dtype)

    def call(h: Tensor, grad_y: Tensor) -> Any:
        return with_gradient(geglu(h), h, grad_y, backward)

    def truth(h: Tensor, grad_y: Tensor) -> Any:
        wide = h.detach().double().requires_grad_(backward)
        a, g = wide.chunk(2, -1)
        return with_gradient(a * g * torch.special.erfc(-g / 2**0.5) / 2, wide, grad_y.double(), backward)

    runnable, skipped = contenders("geglu", call, geglu_ref, device, ())
    if modes:
        skipped.pop("compile")
        forward = compiled(geglu_ref, modes)
        runnable["compile"] = lambda h, grad_y: with_gradient(forward(h), h, grad_y, backward)
    # h read, y written; backward reads h and dy and writes dh
    bytes_moved = math.prod(shape.x) * dtype.itemsize * (8 if backward else 3) // 2
    name = f"geglu {shape.name} {'forward+backward' if backward else 'forward'}"
    shapes = {"h": shape.x, "calls": shape.calls}
    return Case(name, str(dtype)[6:], shapes, bytes_moved, make, truth, runnable, skipped)


def cases(size: str, device: str, modes: tuple[str, ...] = ()) -> list[Case]:
    dtype = torch.float16 if device == "cuda" else torch.float32
    shapes = layer_shapes("geglu", size)
    return [case(shape, dtype, device, modes, backward) for shape in shapes for backward in (False, True)]
