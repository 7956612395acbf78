"""Numbers to decide by: means with intervals, win rates, and what a picture looks like whatever its score."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from spo_fast.models import TRUE_SCORES
from spo_fast.scorers import load_metric
from spo_fast.scorers.clip_scorers import Tokenize

RESAMPLES = 2000
RISE = 0.25  # of a look against the base model's, above which it is called a sign of reward hacking

# model -> row -> metric -> the mean its authors report: SPO's tables (arXiv 2406.04314), Pick-a-Pic's 500 prompts;
# geneval in percent on its own prompts
COLUMNS = ("pickscore", "hpsv2", "image_reward", "aesthetic")
PUBLISHED: dict[str, dict[str, dict[str, float]]] = {
    "sdxl": {
        "SDXL": dict(zip(COLUMNS, (21.95, 26.95, 0.538, 5.950), strict=True)) | {"geneval": 53.43},
        "Diffusion-DPO": dict(zip(COLUMNS, (22.64, 29.31, 0.944, 6.015), strict=True)) | {"geneval": 59.58},
        "MaPO": dict(zip(COLUMNS, (22.11, 28.22, 0.717, 6.096), strict=True)),
        "SPO": dict(zip(COLUMNS, (23.06, 31.80, 1.080, 6.364), strict=True)) | {"geneval": 55.20},
    },
    "sd15": {
        "SD-1.5": dict(zip(COLUMNS, (20.53, 23.79, -0.163, 5.365), strict=True)),
        "DDPO": dict(zip(COLUMNS, (21.06, 24.91, 0.082, 5.591), strict=True)),
        "Diffusion-DPO": dict(zip(COLUMNS, (20.98, 25.05, 0.112, 5.505), strict=True)),
        "SPO": dict(zip(COLUMNS, (21.43, 26.45, 0.171, 5.887), strict=True)),
    },
}


class Interval(NamedTuple):
    """A mean and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


def bootstrap(values: np.ndarray, seed: int) -> Interval:  # (P,) one value a prompt
    """Percentiles 2.5 and 97.5 of the means of RESAMPLES draws of the prompts, with replacement.

    One seed and number of prompts, one draw: intervals of differences of two contenders are paired.
    """
    if len(values) == 0:
        return Interval(math.nan, math.nan, math.nan)
    places = np.random.default_rng([seed, len(values)]).integers(0, len(values), (RESAMPLES, len(values)))
    means = values.astype(np.float64)[places].mean(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return Interval(float(values.mean()), float(low), float(high))


def win_rate(ours: np.ndarray, theirs: np.ndarray, seed: int) -> Interval:  # (P,), (P,)
    """Share of the prompts where ours is higher; a tie is half a win."""
    return bootstrap(np.sign(ours - theirs) / 2 + 0.5, seed)


def looks(pixels: Tensor) -> dict[str, Tensor]:  # (B, 3, H, W) in [-1, 1] -> (B,) each
    """saturation: mean of max - min of R, G, B in [0, 1]; contrast: standard deviation of luma (BT.601); edges: share
    of pixels whose luma changes by more than 0.1 a pixel (Sobel); colourfulness: Hasler and Suesstrunk 2003, of 0..255.
    """
    x = (pixels.float() / 2 + 0.5).clamp(0, 1)
    r, g, b = x.unbind(1)
    luma = 0.299 * r + 0.587 * g + 0.114 * b
    sobel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=x.device) / 8
    change = F.conv2d(F.pad(luma[:, None], (1, 1, 1, 1), mode="replicate"), torch.stack([sobel, sobel.T])[:, None])
    red_green, yellow_blue = (255 * (r - g)).flatten(1), (255 * ((r + g) / 2 - b)).flatten(1)
    spread = (red_green.var(1, correction=0) + yellow_blue.var(1, correction=0)).sqrt()
    return {
        "saturation": (x.amax(1) - x.amin(1)).mean((1, 2)),
        "contrast": luma.flatten(1).std(1, correction=0),
        "edges": (change.norm(dim=1) > 0.1).float().mean((1, 2)),
        "colourfulness": spread + 0.3 * (red_green.mean(1).square() + yellow_blue.mean(1).square()).sqrt(),
    }


LOOKS = ("saturation", "contrast", "edges", "colourfulness")


def hacking_signs(base: dict[str, np.ndarray], ours: dict[str, np.ndarray], seed: int) -> dict[str, str]:
    """Look -> a sentence, for looks that have risen by more than RISE, and not by chance."""
    signs = {}
    for name in LOOKS:
        before, gain = float(base[name].mean()), bootstrap(ours[name] - base[name], seed)
        if before > 0 and gain.mean > RISE * before and gain.low > 0:
            signs[name] = f"{name} is {gain.mean / before:.0%} above the base model's"
    return signs


Metric = Callable[[Tensor, list[str]], dict[str, Tensor]]
"""Pictures (B, 3, H, W) in [-1, 1] and their prompts -> name -> (B,)."""


def make_metric(
    name: str,  # a scorer, one of TRUE_SCORES, or looks
    paths: Mapping[str, str | Path],  # of scorers' weights
    tokenize: Tokenize,
    device: torch.device,
    dtype: torch.dtype,
    wanted: Mapping[str, Mapping[str, Any]] | None = None,  # of geneval: see load_scorer
) -> Metric:
    if name == "looks":
        return lambda pixels, prompts: looks(pixels)
    if name in TRUE_SCORES:
        from spo_fast.toy import world

        def true_score(pixels: Tensor, prompts: list[str]) -> dict[str, Tensor]:
            if odd := next((prompt for prompt in prompts if prompt not in world.CAPTIONS), None):
                raise ValueError(f"metric {name} knows captions of the toy's world only, not {odd!r:.60}.")
            if pixels.shape[-2:] != (world.SIZE, world.SIZE):
                raise ValueError(f"metric {name} is of pictures of {world.SIZE} pixels: leave out --resolution.")
            return {name: world.layout(pixels, prompts).all(1) if name == "layout" else world.aesthetics(pixels)}

        return true_score
    scorer = load_metric(name, paths, tokenize, device, dtype, wanted)
    scale = 100 if name == "geneval" else 1  # tables have percent

    @torch.no_grad()
    def score(pixels: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        now = torch.zeros((), dtype=torch.long, device=device)
        return {name: scale * scorer.score_pixels(pixels.to(device), now, scorer.encode(prompts))}

    return score
