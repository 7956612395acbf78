"""ops.joint_heads at the shapes of SD3.5-medium and FLUX.1, alone and with its backward, against float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_ada_norm import block_case, dtype_of
from benchmarks.shapes import STREAMS, StreamShape
from benchmarks.timing import Case
from spo_fast.ops.joint_heads import Stream, joint_heads, joint_heads_ref


def case(shape: StreamShape, device: str, modes: tuple[str, ...], backward: bool) -> Case:
    """A text and a picture; angles where the heads are FLUX's."""
    heads, D, T = shape.heads, shape.width // shape.heads, shape.text
    sizes = [(shape.batch, tokens, shape.width) for tokens in (T, shape.tokens - T) for _ in range(3)]
    generator = torch.Generator(device).manual_seed(9)
    weight = (1 + 0.2 * torch.randn(D, generator=generator, device=device)).to(dtype_of(device))
    angles = torch.randn(shape.tokens, D // 2, generator=generator, device=device)
    table = torch.stack([angles.cos(), angles.sin()]) if shape.rotary else None

    def streams(x: tuple[Tensor, ...]) -> list[Stream]:
        return [Stream(*x[i : i + 3], weight.to(x[0].dtype), weight.to(x[0].dtype)) for i in (0, 3)]

    def function(*x: Tensor) -> Any:
        return joint_heads(streams(x), heads, table)

    def definition(*x: Tensor) -> Any:
        return joint_heads_ref(streams(x), heads, table, 1e-6)

    def truth(*x: Tensor) -> Any:
        q, k, v = (torch.cat([x[i], x[i + 3]], 1).unflatten(-1, (heads, D)) for i in range(3))
        q, k = (y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double() for y in (q, k))
        if table is not None:
            turn = torch.complex(*table.double())[:, None]
            q, k = (
                torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2))) * turn).flatten(-2) for y in (q, k)
            )
        return q, k, v

    elements = 14 if backward else 6  # q, k, v read and written; q, k and three gradients, three written
    return block_case("joint_heads", shape, device, modes, backward, sizes, function, definition, truth, elements)


def cases(size: str, device: str, modes: tuple[str, ...] = ()) -> list[Case]:
    return [case(shape, device, modes, backward) for shape in STREAMS[size] for backward in (False, True)]
