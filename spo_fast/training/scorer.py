"""The scorer that a run trains on."""

from __future__ import annotations

from typing import Any

from spo_fast.config.scorers import scorer_specs
from spo_fast.config.training import Config
from spo_fast.method.experience import judges
from spo_fast.method.objectives import Objective
from spo_fast.models.diffusion import DTYPES, DiffusionModel
from spo_fast.scorers.base import Scorer
from spo_fast.scorers.registry import load_scorer


def make_scorer(
    cfg: Config, model: DiffusionModel, objective: Objective, wanted: dict[str, dict[str, Any]] | None
) -> Scorer:
    """One scorer, or the weighted sum of several. Raises ValueError for one that the method cannot use."""
    names, dtype = cfg.scorer.scorer, DTYPES[cfg.scorer.scorer_dtype]
    scorer = load_scorer(
        *(scorer_specs(names), model.resolved.scorer_paths, model.tokenize, model.device, dtype),
        token_ids=model.token_ids,
        time_conditioned=cfg.scorer.spm_time_conditioned,
        wanted=wanted,
    )
    if objective.judges not in (None, judges(scorer)):
        method = cfg.objective.method
        raise ValueError(
            f"--method {method} needs a scorer of noisy latents, and {' '.join(names)} is none. Use --scorer lrm."
        )
    return scorer
