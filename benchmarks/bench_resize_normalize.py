"""ops.resize_normalize: decoded pixels to a scorer's input, at the batches of a rollout, against float64."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench_transition import contenders
from benchmarks.shapes import ScorerShape, scorer_shapes
from benchmarks.timing import Case
from spo_fast.ops.resize_normalize import resize_normalize, resize_normalize_ref
from spo_fast.scorers.preprocess import CLIP_MEAN, CLIP_STD


def resize_normalize_case(
    shape: ScorerShape, dtype: torch.dtype, device: str, modes: tuple[str, ...], channels_last: bool = False
) -> Case:
    """Square images; pixels and output in `dtype`."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    N, H, S = shape.images, shape.pixels, shape.side

    def make(seed: int) -> tuple:
        generator = torch.Generator(device).manual_seed(seed)
        pixels = torch.randn((N, 3, H, H), generator=generator, device=device).mul_(0.5).to(dtype)
        return (pixels.contiguous(memory_format=layout),)

    def call(pixels: Tensor) -> Tensor:
        return resize_normalize(pixels, S, CLIP_MEAN, CLIP_STD, dtype)

    def definition(pixels: Tensor) -> Tensor:
        return resize_normalize_ref(pixels, S, CLIP_MEAN, CLIP_STD, dtype)

    def truth(pixels: Tensor) -> Any:  # image by image: float64 pixels of a whole batch would not fit
        def one(image: Tensor) -> Tensor:
            x = F.interpolate(image.double().unsqueeze(0), size=(S, S), mode="bicubic", align_corners=False)
            mean, std = (
                torch.tensor(v, dtype=torch.float64, device=device).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD)
            )
            return ((x / 2 + 0.5).clamp(0, 1) - mean) / std

        return torch.cat([one(image) for image in pixels])

    runnable, skipped = contenders("resize_normalize", call, definition, device, modes)
    # every source pixel (in float32 of 512 pixels all sectors hold a tap, of 1024 pixels 88 %), every output once
    bytes_moved = 3 * N * (H * H + S * S) * dtype.itemsize
    shapes = {"N": N, "pixels": H, "side": S}
    name = f"resize_normalize {shape.name}{' channels-last' if channels_last else ''}"
    return Case(name, str(dtype)[6:], shapes, bytes_moved, make, truth, runnable, skipped)


def cases(size: str, device: str, modes: tuple[str, ...] = ()) -> list[Case]:
    """16-bit pixels, as the VAE leaves them on a GPU; float32 on a CPU."""
    dtype = torch.float16 if device == "cuda" else torch.float32
    return [resize_normalize_case(shape, dtype, device, modes) for shape in scorer_shapes(size)]
