"""ops.group_norm_silu at the shapes of real UNet and VAE forwards, alone and with its backward, against float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_transition import contenders
from benchmarks.shapes import LayerShape, layer_shapes
from benchmarks.timing import Case
from spo_fast.ops.group_norm_silu import group_norm_silu, group_norm_silu_ref

EPS = 1e-5


def with_gradient(y: Tensor, x: Tensor, grad_y: Tensor, backward: bool) -> Any:
    return (y.detach(), torch.autograd.grad(y, x, grad_y)[0]) if backward else y.detach()


def compiled(function: Callable[..., Tensor], modes: tuple[str, ...]) -> Callable[..., Tensor]:
    options: dict[str, Any] = {} if modes[0] == "default" else {"mode": modes[0]}
    return torch.compile(function, fullgraph=True, dynamic=False, **options)


def case(
    shape: LayerShape, dtype: torch.dtype, device: str, modes: tuple[str, ...], channels_last: bool, backward: bool
) -> Case:
    layout, channels = torch.channels_last if channels_last else torch.contiguous_format, shape.x[1]

    def make(seed: int) -> tuple:
        generator = torch.Generator(device).manual_seed(seed)
        x, grad_y = (torch.randn(shape.x, generator=generator, device=device, dtype=dtype) for _ in range(2))
        weight, bias = (torch.randn(channels, generator=generator, device=device, dtype=dtype) for _ in range(2))
        x = (0.5 + 2 * x).contiguous(memory_format=layout).requires_grad_(backward)
        return x, 1 + 0.2 * weight, 0.2 * bias, grad_y.contiguous(memory_format=layout)

    def call(x: Tensor, weight: Tensor, bias: Tensor, grad_y: Tensor) -> Any:
        y = group_norm_silu(x, weight, bias, shape.groups, EPS, silu=shape.silu)
        return with_gradient(y, x, grad_y, backward)

    def definition(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return group_norm_silu_ref(x, weight, bias, shape.groups, EPS, shape.silu, channels_last)

    def truth(x: Tensor, weight: Tensor, bias: Tensor, grad_y: Tensor) -> Any:
        wide = x.detach().double().requires_grad_(backward)
        grouped = wide.reshape(x.shape[0], shape.groups, -1)
        centred = grouped - grouped.mean(-1, keepdim=True)
        z = (centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()).reshape(x.shape)
        z = z * weight.double().view(-1, 1, 1) + bias.double().view(-1, 1, 1)
        return with_gradient(z * z.sigmoid() if shape.silu else z, wide, grad_y.double(), backward)

    runnable, skipped = contenders("group_norm_silu", call, definition, device, ())
    if modes:
        skipped.pop("compile")
        forward = compiled(definition, modes)
        runnable["compile"] = lambda x, w, b, grad_y: with_gradient(forward(x, w, b), x, grad_y, backward)
    # x read, y written; backward reads x and dy and writes dx. Statistics need a second read: 100 % is out of reach
    bytes_moved = math.prod(shape.x) * dtype.itemsize * (5 if backward else 2)
    direction = "forward+backward" if backward else "forward"
    name = f"group_norm_silu {shape.name} {'channels-last' if channels_last else 'NCHW'} {direction}"
    shapes = {"x": shape.x, "groups": shape.groups, "silu": shape.silu, "calls": shape.calls}
    return Case(name, str(dtype)[6:], shapes, bytes_moved, make, truth, runnable, skipped)


def cases(size: str, device: str, modes: tuple[str, ...] = ()) -> list[Case]:
    """Channels-last, as convolutions want it; NCHW of each network's first shape. A VAE has no backward."""
    dtype, out, seen = torch.float16 if device == "cuda" else torch.float32, [], set()
    for shape in layer_shapes("group_norm_silu", size):
        network = shape.name.split()[0]
        for channels_last in (True,) if network in seen else (True, False):
            for backward in (False,) if "VAE" in shape.name else (False, True):
                out.append(case(shape, dtype, device, modes, channels_last, backward))
        seen.add(network)
    return out
