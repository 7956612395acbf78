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


def spread(scores: Tensor) -> dict[str, Tensor]:  # (J, K, B)
    """Mean deviation of a prompt's K scores, and the share of such groups whose scores are all alike: they teach no
    method anything."""
    flat = scores.amax(1) == scores.amin(1)
    return {"group_std": scores.std(1, correction=0).mean(), "flat_groups": flat.to(scores.dtype).mean()}


def of_scores(scores: Tensor, compared: Tensor, num_candidates: int, prompts: int) -> dict[str, Tensor]:
    """Mean, deviation and spread of everybody's scores, gaps of what stood for them where candidates were compared;
    nothing of labelled pairs, which have none."""
    if not len(scores):
        return {}
    groups, by_gap = (x.view(-1, num_candidates, prompts) for x in (scores, compared))
    return {"score_mean": scores.mean(), "score_std": scores.std(), **gaps(by_gap), **spread(groups)}


THUMBNAIL = 8  # pixels a side


class Pictures:
    """A decoder that remembers of its pictures how colourful they were, mean over pixels of max - min of R, G, B in
    [0, 1], and what they look like from afar."""

    def __init__(self, decode: Decode) -> None:
        self.decode = decode
        self._means: list[Tensor] = []
        self._thumbnails: list[Tensor] = []

    def __call__(self, latents: Tensor) -> Tensor:
        """(N, C, h, w) -> pixels (N, 3, H, W) as the decoder has them."""
        pixels = self.decode(latents)
        shown = (pixels.float() / 2 + 0.5).clamp(0, 1)
        self._means.append((shown.amax(1) - shown.amin(1)).mean((1, 2)))
        side = (min(THUMBNAIL, shown.shape[2]), min(THUMBNAIL, shown.shape[3]))
        self._thumbnails.append(torch.nn.functional.adaptive_avg_pool2d(shown, side).flatten(1))
        return pixels

    def record(self, group: Group, prompts: Rows, num_candidates: int) -> dict[str, Tensor]:
        """Of everybody's pictures; prompts: those of this process's that count, none or all.

        diversity: root mean square difference of two thumbnails of a prompt's candidates, a mean over all pairs of
        them. It falls towards 0 as a policy draws one picture a prompt.
        """
        if not self._means:
            return {}
        K, size = num_candidates, max(prompts.stop - prompts.start, 1)
        seen = torch.cat(self._thumbnails).unflatten(0, (-1, K, size))  # (J, K, B, pixels)
        pairs = (seen[:, :, None] - seen[:, None]).square().mean(-1).sqrt()  # (J, K, K, B)
        own = {"saturation": torch.cat(self._means), "diversity": pairs.sum((1, 2)).flatten() / (K * (K - 1))}
        kept = slice(None if prompts.stop > prompts.start else 0)
        return {name: torch.cat(group.gather(values[kept])).mean() for name, values in own.items()}
