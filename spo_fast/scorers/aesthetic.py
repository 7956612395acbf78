"""LAION's aesthetic predictor (improved-aesthetic-predictor): CLIP ViT-L/14's unit image embedding through an MLP."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from spo_fast.data.weights import fill, read_tensors
from spo_fast.ops.linear import take_linear
from spo_fast.scorers.clip import Clip, unit
from spo_fast.scorers.clip_files import find_weights, load_clip
from spo_fast.scorers.preprocess import PictureScorer, cropped, score_head


class AestheticScorer(PictureScorer):
    """About 1 to 10, whatever the prompt. The head stays float32."""

    def __init__(self, clip: Clip, head: torch.nn.Module, dtype: torch.dtype = torch.float32):
        self.clip, self.dtype = take_linear(clip.set_compute_dtype(dtype).requires_grad_(False).eval()), dtype
        self.head = head.to(clip.logit_scale.device).requires_grad_(False).eval()

    def encode(self, prompts: list[str]) -> Tensor:  # (P, 0)
        """Nothing: no prompt is read."""
        return self.clip.logit_scale.new_empty(len(prompts), 0)

    def score_pixels(self, pixels: Tensor, t: Tensor, text: Tensor) -> Tensor:  # (N, 3, H, W) -> (N,) float32
        """The head's score of CLIP's unit embedding."""
        x = cropped(pixels, self.clip.config.image_size, self.dtype)
        return self.head(unit(self.clip.get_image_features(x)))[:, 0]


def load_aesthetic(
    path: str | Path,
    tokenize: object,  # no prompt is read
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    clip: str | Path,  # CLIP ViT-L/14
) -> AestheticScorer:
    """sac+logos+ava1-l14-linearMSE.pth. Raises ValueError if it is another file, or for another CLIP."""
    towers = load_clip(clip, time_conditioned=False, device=device, dtype=dtype)
    head = score_head(towers.config.projection_dim)
    file = find_weights(Path(path))
    tensors = {key.removeprefix("layers."): value for key, value in read_tensors(file).items()}
    hint = "Give sac+logos+ava1-l14-linearMSE.pth (--aesthetic_path) and CLIP ViT-L/14 (--clip_path)."
    return AestheticScorer(towers, fill(head, tensors, file, torch.float32, hint=hint), dtype)
