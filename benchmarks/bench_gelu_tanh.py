"""ops.gelu_tanh at the shapes of SD3.5-medium's feed-forward and FLUX.1's single blocks, against float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.bench_ada_norm import block_case
from benchmarks.shapes import STREAMS, StreamShape
from benchmarks.timing import Case
from spo_fast.ops.gelu_tanh import gelu_tanh, gelu_tanh_ref


def case(shape: StreamShape, device: str, modes: tuple[str, ...], backward: bool) -> Case:
    """FLUX's stands behind the attention's output."""
    rows, beside = (shape.batch, shape.tokens), shape.rotary
    sizes = [(*rows, 4 * shape.width), *[(*rows, shape.width)] * beside]

    def function(h: Tensor, before: Tensor | None = None) -> Tensor:
        return gelu_tanh(h, before=before)

    def definition(h: Tensor, before: Tensor | None = None) -> Tensor:
        return gelu_tanh_ref(h, before=before)

    def truth(h: Tensor, before: Tensor | None = None) -> Tensor:
        y = h * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))
        return y if before is None else torch.cat([before, y], -1)

    elements = 8 + 2 * beside + backward * 12
    return block_case("gelu_tanh", shape, device, modes, backward, sizes, function, definition, truth, elements)


def cases(size: str, device: str, modes: tuple[str, ...] = ()) -> list[Case]:
    return [case(shape, device, modes, backward) for shape in STREAMS[size] for backward in (False, True)]
