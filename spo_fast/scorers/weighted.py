"""A weighted sum of scorers, e.g. the SPM plus a little PickScore."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spo_fast.scorers.base import Scorer, sees_pixels

if TYPE_CHECKING:
    from spo_fast.method.experience import Candidates, Text


class WeightedSum:
    """sum_i weight_i * scorer_i(candidates), on the scorers' own scales.

    Parts that judge pixels (they have `score_pixels`) share the decoded images: each latent goes through the VAE once,
    chunk by chunk, for all of them.
    """

    def __init__(self, scorers: Sequence[Scorer], weights: Sequence[float]):
        if not scorers or len(scorers) != len(weights):
            raise ValueError(
                f"A weighted sum needs scorers and as many weights; got {len(scorers)} and {len(weights)}."
            )
        self.scorers, self.weights = tuple(scorers), tuple(weights)
        kinds = {getattr(scorer, "judges", "x0") for scorer in scorers}
        if len(kinds) > 1:
            raise ValueError(
                "a weighted sum cannot mix lrm, which judges noisy latents before the UNet, with scorers of x0: "
                "name lrm alone in --scorer, or leave it out."
            )
        self.judges = kinds.pop()

    def encode(self, prompts: list[str]) -> Text:
        """A tuple with what each scorer's own encode returned."""
        return tuple(scorer.encode(prompts) for scorer in self.scorers)

    @torch.no_grad()
    def __call__(self, candidates: Candidates) -> Tensor:  # (K*B,) float32, k-major
        """The sum in float32; every latent is decoded once at most."""
        x0 = candidates.x0
        total = torch.zeros(len(x0), dtype=torch.float32, device=x0.device)
        parts = list(zip(self.weights, self.scorers, candidates.text, strict=True))
        of_pixels = [(weight, scorer, text) for weight, scorer, text in parts if sees_pixels(scorer)]
        of_latents = [(weight, scorer, text) for weight, scorer, text in parts if not sees_pixels(scorer)]
        for rows, pixels in candidates.pixel_chunks() if of_pixels else ():
            for weight, scorer, text in of_pixels:
                total[rows] += weight * scorer.score_pixels(pixels, candidates.t, text[rows])
        for weight, judge, text in of_latents:
            total += weight * judge(replace(candidates, text=text))
        return total
