"""The scorer that a run trains on."""

from __future__ import annotations

from collections.abc import Mapping

from spo_fast.config.outside import is_outside
from spo_fast.config.scorers import judged_range, name_and_weight, register_scorer, scorer_specs
from spo_fast.config.training import Config, SampleConfig
from spo_fast.data.prompt_sets import Wanted
from spo_fast.method.experience import children_told, judges
from spo_fast.method.objectives import Objective
from spo_fast.method.rollout import rollout_segments, segments
from spo_fast.method.schedule import StepTable
from spo_fast.models.diffusion import DTYPES, DiffusionModel
from spo_fast.models.flow import FlowModel
from spo_fast.scorers.base import Scorer
from spo_fast.scorers.function import PictureFunction
from spo_fast.scorers.registry import load_scorer
from spo_fast.scorers.weighted import WeightedSum


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
        ranges=[judged_range(entry) for entry in names],
        sum_of_one=cfg.scorer.normalise_scorers,
        flow=model if isinstance(model, FlowModel) else None,
    )
    if objective.judges not in (None, judges(scorer)):
        method = cfg.objective.method
        raise ValueError(
            f"--method {method} needs a scorer of noisy latents, and {' '.join(names)} is none. Use --scorer lrm."
        )
    return scorer


def check_ranges(scorer: Scorer, table: StepTable, objective: Objective, cfg: SampleConfig) -> None:
    """Raises ValueError if candidates, or the validation's finished pictures, come at a timestep at which no scorer
    judges."""
    if not isinstance(scorer, WeightedSum) or not scorer.asks_when:
        return
    cfg, n = objective.sampling(cfg), table.num_steps
    steps = [end for _, end in segments(cfg)] if objective.rollout is rollout_segments else [n]
    if judges(scorer) == "children":
        steps = [end - 1 + children_told(scorer) for end in steps]
    ends = -1 if cfg.last_step == "keep" else None  # as Rollout.judge
    scorer.judging(0)
    for step in steps:
        at = step if step < n else ends
        scorer.judging(0 if at is None else int(table.judged_at[at]))


def with_scorer(cfg: Config, function: PictureFunction) -> Config:
    """cfg whose scorer is a function of the caller's own, by its name; if cfg names that already it stays as it is."""
    name = f"{function.__module__}:{getattr(function, '__name__', type(function).__name__)}"
    name = register_scorer(name if is_outside(name) else "own:scorer", function)
    named = {name_and_weight(entry)[0] for entry in cfg.scorer.scorer}
    return cfg if name in named else cfg.with_fields(scorer=(name,))
