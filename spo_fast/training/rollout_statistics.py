"""What a rollout's scores and pictures tell about it."""

from __future__ import annotations

import torch
from torch import Tensor

from spo_fast.method.experience import Rows
from spo_fast.method.protocols import Decode
from spo_fast.training.processes import Group


def gaps(scores: Tensor) -> dict[str, Tensor]:  # (J, K, B) scores of J comparisons of B prompts
    """How far the best and the worst candidate are apart, and the threshold that would keep a third of the pairs."""
    gap = (scores.amax(1) - scores.amin(1)).flatten()
    # softmax([s_w, s_l]) differs by tanh of half the gap
    return {"score_gap": gap.mean(), "third_threshold": torch.quantile((gap / 2).tanh().float(), 2 / 3)}


def of_scores(scores: Tensor, num_candidates: int, prompts: int) -> dict[str, Tensor]:
    """Mean, deviation and gaps of everybody's scores; nothing of labelled pairs, which have none."""
    if not len(scores):
        return {}
    return {"score_mean": scores.mean(), "score_std": scores.std(), **gaps(scores.view(-1, num_candidates, prompts))}


class Saturation:
    """A decoder that remembers how colourful its images were: mean over pixels of max - min of R, G, B in [0, 1]."""

    def __init__(self, decode: Decode) -> None:
        self.decode = decode
        self._means: list[Tensor] = []

    def __call__(self, latents: Tensor) -> Tensor:
        """(N, C, h, w) -> pixels (N, 3, H, W) as the decoder has them."""
        pixels = self.decode(latents)
        shown = (pixels.float() / 2 + 0.5).clamp(0, 1)
        self._means.append((shown.amax(1) - shown.amin(1)).mean((1, 2)))
        return pixels

    def record(self, group: Group, prompts: Rows) -> dict[str, Tensor]:
        """Of everybody's images; prompts: those of this process's that count, none or all."""
        if not self._means:
            return {}
        own = torch.cat(self._means)
        return {"saturation": torch.cat(group.gather(own if prompts.stop > prompts.start else own[:0])).mean()}
