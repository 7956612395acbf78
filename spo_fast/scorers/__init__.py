"""Scorers: what judges the candidates. Add one to SCORERS and every objective can use it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from spo_fast.config import SCORERS_BESIDE, did_you_mean
from spo_fast.scorers.aesthetic import load_aesthetic
from spo_fast.scorers.clip_scorers import (
    ClipScorer,
    Tokenize,
    load_clip_score,
    load_pickscore,
    load_spm,
    make_tiny_spm,
)
from spo_fast.scorers.geneval import load_geneval
from spo_fast.scorers.hps import load_hps
from spo_fast.scorers.image_reward import load_image_reward
from spo_fast.scorers.latent import TokenIds, load_lrm
from spo_fast.scorers.pictures import cropped
from spo_fast.scorers.weighted import WeightedSum

if TYPE_CHECKING:
    from spo_fast.experience import Candidates

__all__ = [
    "SCORERS",
    "ClipScorer",
    "InPhase",
    "PixelScorer",
    "Scorer",
    "WeightedSum",
    "judges",
    "load_metric",
    "load_scorer",
    "make_tiny_spm",
    "repeat_text",
]


class Scorer(Protocol):
    """Judges K candidates of each of B prompts; higher is better, and a softmax over two scores is a preference."""

    def encode(self, prompts: list[str]) -> Any:
        """P prompts -> (P, D) float32 text features (a weighted sum: a tuple of such). repeat_text makes K*B rows."""
        ...

    def __call__(self, candidates: Candidates) -> Tensor:
        """(K*B,) float32 scores, k-major. Takes no gradient and, but for geneval, never waits for the device."""
        ...


def judges(scorer: Any) -> str:
    """What a scorer wants to see: "x0", clean estimates after the UNet, or "children", noisy x_{t-1} before it."""
    return getattr(scorer, "judges", "x0")


class InPhase:
    """A scorer each of whose calls runs in a phase: the trainer's timer, or a count of memory."""

    def __init__(self, scorer: Any, phase: Callable[[], AbstractContextManager[Any]]):
        self.scorer, self.phase, self.judges = scorer, phase, judges(scorer)

    def __call__(self, candidates: Candidates) -> Tensor:
        with self.phase():
            return self.scorer(candidates)


class PixelScorer(Scorer, Protocol):
    """A scorer of decoded images, which lets a weighted sum decode once for all of them."""

    def score_pixels(self, pixels: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """(N, 3, H, W) in about [-1, 1], (), (N, D) -> (N,) float32."""
        ...


SCORERS: dict[str, Callable[..., Scorer]] = {  # (path, tokenize, device, dtype), and the path of SCORERS_BESIDE by name
    "spm": load_spm,
    "pickscore": load_pickscore,
    "hpsv2": load_hps,
    "hpsv21": load_hps,
    "clip": load_clip_score,
    "aesthetic": load_aesthetic,
    "image_reward": load_image_reward,
    "geneval": load_geneval,
    "lrm": load_lrm,
}


def load_scorer(
    specs: Sequence[tuple[str, float]],  # (name in SCORERS, weight)
    paths: Mapping[str, str | Path],  # name -> local file or directory
    tokenize: Tokenize,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    token_ids: TokenIds | None = None,  # for lrm, which has all of the diffusion model's text encoders
    time_conditioned: bool = True,  # False: the SPM is one that does not know the timestep
    wanted: Mapping[str, Mapping[str, Any]] | None = None,  # for geneval: prompt -> line of evaluation_metadata.jsonl
) -> Scorer:
    """One scorer, or the weighted sum of several. Raises ValueError for an unknown name or one without a path."""
    if not specs:
        raise ValueError(f"No scorer given. Known: {', '.join(SCORERS)}.")
    for name, _ in specs:
        if name not in SCORERS:
            raise ValueError(f"Unknown scorer {name!r}. Known: {', '.join(SCORERS)}.{did_you_mean(name, SCORERS)}")
        if name not in paths:
            raise ValueError(
                f"Scorer {name!r} has no weights: give a local file or directory for it (paths has {sorted(paths)})."
            )
    loaders: dict[str, Callable[..., Scorer]] = {
        **SCORERS,
        "spm": partial(load_spm, time_conditioned=time_conditioned),
        "geneval": partial(load_geneval, wanted=wanted or {}),
    }
    beside = [{b: Path(paths[b])} if (b := SCORERS_BESIDE.get(name)) else {} for name, _ in specs]
    scorers = [
        loaders[name](Path(paths[name]), token_ids if name == "lrm" else tokenize, device, dtype, **more)
        for (name, _), more in zip(specs, beside, strict=True)
    ]
    weights = [weight for _, weight in specs]
    return scorers[0] if weights == [1] else WeightedSum(scorers, weights)


def load_metric(
    name: str,
    paths: Mapping[str, str | Path],
    tokenize: Tokenize,
    device: str | torch.device,
    dtype: torch.dtype,
    wanted: Mapping[str, Mapping[str, Any]] | None = None,
) -> Any:
    """The scorer as published tables have it: PickScore's own processor resizes with antialias, the trainer's not."""
    scorer: Any = load_scorer([(name, 1)], paths, tokenize, device, dtype, wanted=wanted)
    if name == "pickscore":
        scorer.preprocess = partial(cropped, to_even=False)
    return scorer


def repeat_text(text: Any, num_candidates: int) -> Any:
    """What encode returned for B prompts (a tensor, or a tuple of them) -> the same with K*B rows, k-major."""
    if isinstance(text, tuple):
        return tuple(repeat_text(part, num_candidates) for part in text)
    return text.repeat(num_candidates, *[1] * (text.ndim - 1))
