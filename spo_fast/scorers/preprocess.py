"""What scorers of finished pictures share: preprocessing as PIL and torchvision do it, and judging decoded candidates.

Their resize is bicubic (a = -0.5) with antialias; here it runs on floating pixels and skips PIL's rounding to bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spo_fast.ops.resize_normalize import normalise_channels

if TYPE_CHECKING:
    from spo_fast.method.experience import Candidates

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # RGB, of pixels in [0, 1]
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class PictureScorer:
    """Judges candidates by their decoded pictures, a few at a time."""

    def score_pixels(self, pixels: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """As PixelScorer's."""
        raise NotImplementedError

    @torch.no_grad()
    def __call__(self, candidates: Candidates) -> Tensor:  # (K*B,) float32, k-major
        """Of the decoded x0, a chunk at a time."""
        x0, text = candidates.x0, candidates.text
        assert isinstance(text, Tensor)
        scores = torch.empty(len(x0), dtype=torch.float32, device=x0.device)
        for rows, pixels in candidates.pixel_chunks():
            scores[rows] = self.score_pixels(pixels, candidates.t, text[rows])
        return scores


def resized(pixels: Tensor, height: int, width: int) -> Tensor:  # (B, 3, H, W) about [-1, 1] -> float32 in [0, 1]
    """Bicubic with antialias, clamped before and after."""
    x = (pixels.float() / 2 + 0.5).clamp(0, 1)
    return F.interpolate(x, size=(height, width), mode="bicubic", antialias=True).clamp(0, 1)


def cropped(
    pixels: Tensor,  # (B, 3, H, W) about [-1, 1]
    size: int,
    dtype: torch.dtype = torch.float32,
    *,
    to_even: bool = True,
) -> Tensor:  # (B, 3, size, size), CLIP's statistics
    """Short side to `size`, centre crop: CLIP, PickScore, the aesthetic predictor, ImageReward.

    to_even: half a pixel of margin is rounded to even, as torchvision does; False: down, as CLIPImageProcessor does.
    """
    h, w = pixels.shape[-2:]
    h, w = (size * h // min(h, w), size * w // min(h, w))  # rounded down
    top, left = (round(m / 2) if to_even else m // 2 for m in (h - size, w - size))
    x = resized(pixels, h, w)[..., top : top + size, left : left + size]
    return normalise_channels(x, CLIP_MEAN, CLIP_STD).to(dtype)


def padded(
    pixels: Tensor,  # (B, 3, H, W) about [-1, 1]
    size: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # (B, 3, size, size), CLIP's statistics
    """Long side to `size`, the rest black: HPSv2. (Its code leaves pictures that need no resize unpadded.)"""
    h, w = pixels.shape[-2:]
    h, w = (max(1, round(side * (size / max(pixels.shape[-2:])))) for side in (h, w))
    top, left = (size - h) // 2, (size - w) // 2
    x = F.pad(resized(pixels, h, w), (left, size - w - left, top, size - h - top))
    return normalise_channels(x, CLIP_MEAN, CLIP_STD).to(dtype)


def score_head(width: int) -> nn.Sequential:
    """MLP width-1024-128-64-16-1 without activations: the aesthetic predictor's and ImageReward's, dropout left out."""
    skip = nn.Identity()  # holds the places of dropout, for the checkpoints' names
    sizes = [nn.Linear(width, 1024), skip, nn.Linear(1024, 128), skip, nn.Linear(128, 64), skip]
    return nn.Sequential(*sizes, nn.Linear(64, 16), nn.Linear(16, 1))
