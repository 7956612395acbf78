"""The scorer that a run trains on."""

from __future__ import annotations

from collections.abc import Mapping

from spo_fast.config.outside import is_outside
from spo_fast.config.scorers import name_and_weight, register_scorer, scorer_specs
from spo_fast.config.training import Config
from spo_fast.data.prompt_sets import Wanted
from spo_fast.method.experience import judges
from spo_fast.method.objectives import Objective
from spo_fast.models.diffusion import DTYPES, DiffusionModel
from spo_fast.scorers.base import Scorer
from spo_fast.scorers.function import PictureFunction
from spo_fast.scorers.registry import load_scorer


def make_scorer(
    cfg: Config,
    model: DiffusionModel,
    objective: Objective,
    wanted: Mapping[str, Wanted] | None,
    prompts: list[str],
) -> Scorer:
    """One scorer, or the weighted sum of several. Raises ValueError for one that the method cannot use.

    prompts: some of the run's, with which a function of the user's own is tried.
    """
    names, dtype = cfg.scorer.scorer, DTYPES[cfg.scorer.scorer_dtype]
    scorer = load_scorer(
        *(scorer_specs(names), model.resolved.scorer_paths, model.tokenize, model.device, dtype),
        token_ids=model.token_ids,
        time_conditioned=cfg.scorer.spm_time_conditioned,
        wanted=wanted,
        prompts=prompts,
    )
    if objective.judges not in (None, judges(scorer)):
        method = cfg.objective.method
        raise ValueError(
            f"--method {method} needs a scorer of noisy latents, and {' '.join(names)} is none. Use --scorer lrm."
        )
    return scorer


def with_scorer(cfg: Config, function: PictureFunction) -> Config:
    """cfg whose scorer is a function of the caller's own, by its name; if cfg names that already it stays as it is."""
    name = f"{function.__module__}:{getattr(function, '__name__', type(function).__name__)}"
    name = register_scorer(name if is_outside(name) else "own:scorer", function)
    named = {name_and_weight(entry)[0] for entry in cfg.scorer.scorer}
    return cfg if name in named else cfg.with_fields(scorer=(name,))
