"""ops.merge_lora at the adapted layers of SDXL and SD-1.5: the float32 product and the stochastic rounding."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_transition import contenders
from benchmarks.shapes import LoraShape, lora_layer_shapes
from benchmarks.timing import Case
from spo_fast.ops.merge_lora import merge_lora, merge_ref

SCALE = 1.0


def merge_case(shape: LoraShape, dtype: torch.dtype, device: str, modes: tuple[str, ...]) -> Case:
    rows, columns, r = shape.rows, shape.columns, shape.rank

    def make(seed: int) -> tuple:
        generator = torch.Generator(device).manual_seed(seed)
        draw = functools.partial(torch.randn, generator=generator, device=device)
        weight = (0.02 * draw(rows, columns)).to(dtype)
        key = torch.arange(5, device=device) + seed
        return weight, 0.01 * draw(r, columns), 0.01 * draw(rows, r), key, torch.empty_like(weight)

    def call(weight: Tensor, lora_A: Tensor, lora_B: Tensor, key: Tensor, out: Tensor) -> Any:
        return merge_lora(weight, lora_A, lora_B, SCALE, key, out=out)

    def definition(weight: Tensor, lora_A: Tensor, lora_B: Tensor, key: Tensor, out: Tensor) -> Any:
        merge_ref(weight, (SCALE * lora_B) @ lora_A, key, out)
        return out

    def truth(weight: Tensor, lora_A: Tensor, lora_B: Tensor, key: Tensor, out: Tensor) -> Any:
        return weight.double() + SCALE * lora_B.double() @ lora_A.double()

    runnable, skipped = contenders("merge_lora", call, definition, device, modes)
    # read W, A, B; write out: the product s B A need not exist
    bytes_moved = 2 * rows * columns * dtype.itemsize + 4 * r * (rows + columns)
    shapes = {"O": rows, "I": columns, "rank": r}
    return Case(f"merge_lora {shape.name}", str(dtype)[6:], shapes, bytes_moved, make, truth, runnable, skipped)


def cases(size: str, device: str, modes: tuple[str, ...] = ()) -> list[Case]:
    dtype = torch.float16 if device == "cuda" else torch.bfloat16
    return [merge_case(shape, dtype, device, modes) for shape in lora_layer_shapes(size)]
