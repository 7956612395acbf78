"""A metric by name: a scorer of pictures, a true score of the toy's world, or the image statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from spo_fast.config.scorers import TRUE_SCORES, find_scorer
from spo_fast.data.prompt_sets import Wanted
from spo_fast.evaluation.image_statistics import image_statistics
from spo_fast.scorers.registry import load_metric
from spo_fast.scorers.spm import Tokenize

Metric = Callable[[Tensor, list[str]], dict[str, Tensor]]
"""Pictures (B, 3, H, W) in [-1, 1] and their prompts -> name -> (B,)."""


def make_metric(
    name: str,  # a scorer, one of TRUE_SCORES, or looks: the image statistics
    paths: Mapping[str, str | Path],  # of scorers' weights
    tokenize: Tokenize,
    device: torch.device,
    dtype: torch.dtype,
    wanted: Mapping[str, Wanted] | None = None,  # of geneval: see load_scorer
) -> Metric:
    """Pictures and prompts -> scores by name. Loads what the metric needs."""
    if name == "looks":
        return lambda pixels, prompts: image_statistics(pixels)
    if name in TRUE_SCORES:
        from spo_fast.data import toy_world

        def true_score(pixels: Tensor, prompts: list[str]) -> dict[str, Tensor]:
            if odd := next((prompt for prompt in prompts if prompt not in toy_world.CAPTIONS), None):
                raise ValueError(f"metric {name} knows captions of the toy's world only, not {odd!r:.60}.")
            if pixels.shape[-2:] != (toy_world.SIZE, toy_world.SIZE):
                raise ValueError(f"metric {name} is of pictures of {toy_world.SIZE} pixels: leave out --resolution.")
            truths = {"layout": lambda: toy_world.layout(pixels, prompts).all(1)}
            truths["aesthetics"] = lambda: toy_world.aesthetics(pixels)
            return {name: truths[name]()}

        return true_score
    scorer = load_metric(name, paths, tokenize, device, dtype, wanted)
    scale = 100 if find_scorer(name).percent else 1

    @torch.no_grad()
    def score(pixels: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        now = torch.zeros((), dtype=torch.long, device=device)
        return {name: scale * scorer.score_pixels(pixels.to(device), now, scorer.encode(prompts))}

    return score
