"""How a scorer, or a weighted sum of several, is loaded by its records (config/scorers.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from spo_fast.config.scorers import ALWAYS, find_scorer, scorer_names
from spo_fast.data.prompt_sets import Wanted
from spo_fast.scorers.base import PixelScorer, Scorer, sees_pixels
from spo_fast.scorers.dina import FlowBase
from spo_fast.scorers.function import FunctionScorer
from spo_fast.scorers.latent import TokenIds
from spo_fast.scorers.preprocess import cropped
from spo_fast.scorers.spm import ClipScorer, Tokenize
from spo_fast.scorers.weighted import WeightedSum


def load_scorer(
    specs: Sequence[tuple[str, float]],  # (name, weight)
    paths: Mapping[str, str | Path],  # name -> local file or directory
    tokenize: Tokenize,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    token_ids: TokenIds | None = None,  # for lrm, which has all of the diffusion model's text encoders
    time_conditioned: bool = True,  # False: the SPM is one that does not know the timestep
    wanted: Mapping[str, Wanted] | None = None,  # for geneval: prompt -> line of evaluation_metadata.jsonl
    prompts: Sequence[str] = (),  # a function of the user's own is tried on two of them
    ranges: Sequence[tuple[int, int]] | None = None,  # timesteps at which each judges
    sum_of_one: bool = False,  # a weighted sum even of one scorer
    flow: FlowBase | None = None,  # for dina, which judges by the model's own blocks
) -> Scorer:
    """One scorer, or the weighted sum of several. Raises ValueError for an unknown name or one without a path."""
    if not specs:
        raise ValueError(f"No scorer given. Known: {', '.join(scorer_names())}.")
    told = {"time_conditioned": time_conditioned, "wanted": wanted or {}, "flow": flow}

    def load(name: str) -> Scorer:
        record = find_scorer(name)
        if record.function is not None:
            scorer = FunctionScorer(name, record.function, device)
            scorer.check(prompts)
            return scorer
        options: dict[str, Any] = {option: told[option] for option in record.options}
        if record.source is None:
            return record.loader()(None, tokenize, device, dtype, **options)
        if name not in paths:
            raise ValueError(
                f"Scorer {name!r} has no weights: give a local file or directory for it (paths has {sorted(paths)})."
            )
        if record.beside:
            options[record.beside] = Path(paths[record.beside])
        words = token_ids if record.judges == "latents" else tokenize
        return record.loader()(Path(paths[name]), words, device, dtype, **options)

    return summed([(load(name), weight) for name, weight in specs], ranges, sum_of_one)


def summed(
    parts: Sequence[tuple[Scorer, float]], ranges: Sequence[tuple[int, int]] | None = None, sum_of_one: bool = False
) -> Scorer:
    """The only scorer, if its weight is 1 and it judges always, or the weighted sum of all."""
    scorers, weights = [scorer for scorer, _ in parts], [weight for _, weight in parts]
    alone = weights == [1] and set(ranges or [ALWAYS]) == {ALWAYS} and not sum_of_one
    return scorers[0] if alone else WeightedSum(scorers, weights, ranges)


def load_metric(
    name: str,
    paths: Mapping[str, str | Path],
    tokenize: Tokenize,
    device: str | torch.device,
    dtype: torch.dtype,
    wanted: Mapping[str, Wanted] | None = None,
) -> PixelScorer:
    """The scorer as published tables have it: PickScore's own processor resizes with antialias, the trainer's not."""
    scorer = load_scorer([(name, 1)], paths, tokenize, device, dtype, wanted=wanted)
    if name == "pickscore":
        assert isinstance(scorer, ClipScorer)
        scorer.preprocess = partial(cropped, to_even=False)
    assert sees_pixels(scorer)
    return scorer
