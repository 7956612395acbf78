"""ops.lora_linear, forward and with gradients, at the adapted layers of SDXL (rank 64) and SD-1.5 (rank 4)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.nn.functional import linear

from benchmarks.bench_transition import contenders
from benchmarks.shapes import LoraShape, lora_layer_shapes
from benchmarks.timing import Case
from spo_fast.ops.lora_linear import lora_linear, lora_linear_ref

SCALE = 1.0


def lora_linear_case(shape: LoraShape, dtype: torch.dtype, device: str, modes: tuple[str, ...], backward: bool) -> Case:
    """`plain`: the definition with PyTorch's own autograd; eager accumulates the base on the LoRA's part."""
    rows, columns, r, M = shape.rows, shape.columns, shape.rank, shape.batch * shape.tokens

    def make(seed: int) -> tuple:
        generator = torch.Generator(device).manual_seed(seed)
        draw = functools.partial(torch.randn, generator=generator, device=device)
        x, dy = draw(shape.batch, shape.tokens, columns).to(dtype), draw(shape.batch, shape.tokens, rows).to(dtype)
        weight, bias = (draw(rows, columns) / columns**0.5).to(dtype), draw(rows).to(dtype)
        trained = draw(r, columns) / columns**0.5, draw(rows, r) / (4 * r**0.5)  # float32 masters
        return x.requires_grad_(backward), weight, bias, *(v.requires_grad_(backward) for v in trained), dy

    def with_gradients(function: Any, x, weight, bias, lora_A, lora_B, dy) -> Any:
        y = function(x, weight, bias, lora_A, lora_B, SCALE)
        return (y.detach(), *torch.autograd.grad(y, (x, lora_A, lora_B), dy)) if backward else y

    def truth(x, weight, bias, lora_A, lora_B, dy) -> Any:
        merged = weight.double() + SCALE * lora_B.detach().double() @ lora_A.detach().double()
        y = linear(x.detach().double(), merged, bias.double())
        if not backward:
            return y
        dW = dy.double().flatten(0, 1).t() @ x.detach().double().flatten(0, 1)
        down, up = SCALE * lora_B.detach().double().t() @ dW, SCALE * dW @ lora_A.detach().double().t()
        return y, dy.double() @ merged, down, up

    runnable, skipped = contenders("lora_linear", functools.partial(with_gradients, lora_linear), None, device, ())
    runnable["plain"] = functools.partial(with_gradients, lora_linear_ref)
    if modes:
        skipped.pop("compile")
        options: dict[str, Any] = {} if modes[0] == "default" else {"mode": modes[0]}
        compiled = torch.compile(lora_linear_ref, fullgraph=True, dynamic=False, **options)
        runnable["compile"] = functools.partial(with_gradients, compiled)
    width = dtype.itemsize
    bytes_moved = M * (columns + rows) * width + (rows * columns + rows) * width + 4 * r * (rows + columns)
    flops = 2 * M * (rows * columns + r * (rows + columns))
    if backward:  # x and dy read, dx written, W read again, masters' gradients written; base, LoRA and masters
        bytes_moved += M * (2 * columns + rows) * width + rows * columns * width + 8 * r * (rows + columns)
        flops += 2 * M * (rows * columns + 2 * r * (rows + columns))
    name = f"lora_linear {shape.name} {'forward+backward' if backward else 'forward'}"
    shapes = {"batch": shape.batch, "tokens": shape.tokens, "I": columns, "O": rows, "rank": r}
    return Case(name, str(dtype)[6:], shapes, bytes_moved, make, truth, runnable, skipped, flops)


def cases(size: str, device: str, modes: tuple[str, ...] = ()) -> list[Case]:
    dtype = torch.float16 if device == "cuda" else torch.float32
    shapes = lora_layer_shapes(size)
    return [lora_linear_case(s, dtype, device, modes, backward) for s in shapes for backward in (False, True)]
