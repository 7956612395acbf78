"""SCORERS: every scorer by name, and how one or a weighted sum of several is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from spo_fast.config.errors import did_you_mean
from spo_fast.config.scorers import SCORERS_BESIDE
from spo_fast.scorers.aesthetic import load_aesthetic
from spo_fast.scorers.base import Scorer
from spo_fast.scorers.geneval import load_geneval
from spo_fast.scorers.hps import load_hps
from spo_fast.scorers.image_reward import load_image_reward
from spo_fast.scorers.latent import TokenIds, load_lrm
from spo_fast.scorers.preprocess import cropped
from spo_fast.scorers.spm import Tokenize, load_clip_score, load_pickscore, load_spm
from spo_fast.scorers.weighted import WeightedSum

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
