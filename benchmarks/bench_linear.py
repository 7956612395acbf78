"""ops.linear, forward and with the gradient of its input, at frozen layers of SD-1.5 and SDXL; on a CPU."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench_group_norm_silu import compiled, with_gradient
from benchmarks.bench_transition import contenders
from benchmarks.shapes import LoraShape
from benchmarks.timing import Case
from spo_fast.ops.linear import linear


def case(shape: LoraShape, dtype: torch.dtype, device: str, modes: tuple[str, ...], backward: bool) -> Case:
    """A layer's shape without its LoRA."""
    rows, columns, M = shape.rows, shape.columns, shape.batch * shape.tokens

    def make(seed: int) -> tuple:
        generator = torch.Generator(device).manual_seed(seed)
        draw = functools.partial(torch.randn, generator=generator, device=device)
        x, dy = draw(shape.batch, shape.tokens, columns).to(dtype), draw(shape.batch, shape.tokens, rows).to(dtype)
        return x.requires_grad_(backward), (draw(rows, columns) / columns**0.5).to(dtype), draw(rows).to(dtype), dy

    def call(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> Any:
        return with_gradient(linear(x, weight, bias), x, dy, backward)

    def truth(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> Any:
        y = torch.einsum("bti,oi->bto", x.detach().double(), weight.double()) + bias.double()
        return (y, torch.einsum("bto,oi->bti", dy.double(), weight.double())) if backward else y

    runnable, skipped = contenders("linear", call, F.linear, device, ())
    if modes:
        skipped.pop("compile")
        forward = compiled(F.linear, modes)
        runnable["compile"] = lambda x, weight, bias, dy: with_gradient(forward(x, weight, bias), x, dy, backward)
    flops = 2 * M * rows * columns * (2 if backward else 1)
    bytes_moved = (M * (rows + columns) + rows * columns) * dtype.itemsize * (2 if backward else 1)
    name = f"linear {shape.name} {'forward+backward' if backward else 'forward'}"
    shapes = {"batch": shape.batch, "tokens": shape.tokens, "I": columns, "O": rows}
    return Case(name, str(dtype)[6:], shapes, bytes_moved, make, truth, runnable, skipped, flops)
