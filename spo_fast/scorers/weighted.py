"""A weighted sum of scorers, e.g. the SPM plus a little PickScore, or each within its own range of timesteps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spo_fast.config.scorers import ALWAYS
from spo_fast.method.experience import children_told, group_advantages
from spo_fast.scorers.base import Scorer, sees_pixels

if TYPE_CHECKING:
    from spo_fast.method.experience import Candidates, Text


class WeightedSum:
    """sum_i weight_i * scorer_i(candidates), on the scorers' own scales.

    Parts that judge pixels (they have `score_pixels`) share the decoded images: each latent goes through the VAE once,
    chunk by chunk, for all of them. Of ranges of timesteps a part judges within its own only, and costs nothing
    elsewhere.
    """

    def __init__(
        self, scorers: Sequence[Scorer], weights: Sequence[float], ranges: Sequence[tuple[int, int]] | None = None
    ):
        if not scorers or len(scorers) != len(weights):
            raise ValueError(
                f"A weighted sum needs scorers and as many weights; got {len(scorers)} and {len(weights)}."
            )
        self.scorers, self.weights = tuple(scorers), tuple(weights)
        self.ranges = tuple(ranges or [ALWAYS] * len(scorers))
        self.asks_when = any(part != ALWAYS for part in self.ranges)
        """Whether it must be told the timestep on the host (Candidates.at)."""
        kinds = {getattr(scorer, "judges", "x0") for scorer in scorers}
        if len(kinds) > 1:
            raise ValueError(
                "a weighted sum cannot mix lrm, which judges noisy latents before the UNet, with scorers of x0: "
                "name lrm alone in --scorer, or leave it out."
            )
        self.judges = kinds.pop()
        self.children_told = children_told(scorers[0])

    def encode(self, prompts: list[str]) -> Text:
        """A tuple with what each scorer's own encode returned."""
        return tuple(scorer.encode(prompts) for scorer in self.scorers)

    def judging(self, t: int) -> list[int]:
        """Numbers of the parts that judge at a timestep. Raises ValueError if none does."""
        found = [i for i, (low, high) in enumerate(self.ranges) if low <= t <= high]
        if not found:
            raise ValueError(
                f"no scorer judges at t = {t}: the ranges of --scorer are "
                f"{', '.join(f'{low}-{high}' for low, high in self.ranges)}. Widen one; finished pictures are at t = 0."
            )
        return found

    @torch.no_grad()
    def parts(self, candidates: Candidates) -> dict[int, Tensor]:  # (K*B,) float32 each, k-major
        """Part's number -> its scores, of those that judge here; every latent is decoded once at most."""
        at = candidates.at
        if self.asks_when and at is None:
            at = int(candidates.t)
        judging = self.judging(0 if at is None else at)
        x0, text = candidates.x0, candidates.text
        assert isinstance(text, tuple)  # encode's
        found = {i: torch.zeros(len(x0), dtype=torch.float32, device=x0.device) for i in judging}
        of_pixels = {i: scorer for i in judging if sees_pixels(scorer := self.scorers[i])}
        for rows, pixels in candidates.pixel_chunks() if of_pixels else ():
            for i, scorer in of_pixels.items():
                own = text[i]
                assert isinstance(own, Tensor)  # PixelScorer.encode's
                found[i][rows] = scorer.score_pixels(pixels, candidates.t, own[rows])
        for i in judging:
            if i not in of_pixels:
                found[i] += self.scorers[i](replace(candidates, text=text[i]))
        return found

    def __call__(self, candidates: Candidates) -> Tensor:  # (K*B,) float32, k-major
        """The sum in float32."""
        return self.total(self.parts(candidates))

    def total(self, parts: dict[int, Tensor]) -> Tensor:
        """Their weighted sum."""
        return torch.stack([self.weights[i] * scores for i, scores in parts.items()]).sum(0)


class Normalised:
    """A weighted sum whose parts are first brought to mean 0 and deviation 1 over a prompt's candidates: none outweighs
    the others by its scale, as in GRPO with several rewards. `raw` keeps the sums as they would have been."""

    def __init__(self, scorer: WeightedSum):
        self.scorer, self.judges, self.asks_when = scorer, scorer.judges, scorer.asks_when
        self.children_told = scorer.children_told
        self.raw: list[Tensor] = []

    def __call__(self, candidates: Candidates) -> Tensor:  # (K*B,) float32, k-major
        """The sum of the normalised scores."""
        parts = self.scorer.parts(candidates)
        self.raw.append(self.scorer.total(parts))
        K = candidates.num_candidates
        return self.scorer.total({i: group_advantages(s.view(K, -1)).flatten() for i, s in parts.items()})
