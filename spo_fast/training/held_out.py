"""What validation shows, and what it measures beside the scorer that is trained on."""

from __future__ import annotations

from pathlib import Path

import torch

from spo_fast.config.fields import parted
from spo_fast.config.scorers import TRUE_SCORES, judging_parts, scorer_specs
from spo_fast.config.sections import TOYS
from spo_fast.config.training import Config
from spo_fast.data.prompt_order import validation_prompts
from spo_fast.data.prompt_sets import Wanted, geneval_records
from spo_fast.method.objectives import DiffusionDPO, Objective, predict_states
from spo_fast.method.rollout import Sampler
from spo_fast.scorers.geneval import check_wanted
from spo_fast.training.pair_batches import PairReader
from spo_fast.training.verdicts import HeldOut


def held_out_metrics(cfg: Config, prompts: list[str]) -> list[str]:
    """Names of the metrics asked for; of the toy, on captions that its world can draw, the true scores by itself."""
    if cfg.run.validation_metrics or cfg.model.model not in TOYS:
        return parted(cfg.run.validation_metrics)
    from spo_fast.data import toy_world

    whole = all(side in (None, toy_world.SIZE) for side in (cfg.model.height, cfg.model.width))
    return list(TRUE_SCORES) if whole and set(prompts) <= set(toy_world.CAPTIONS) else []


def watched_by(cfg: Config, metrics: list[str], prompts: list[str], run_dir: Path) -> HeldOut:
    """What the run was told to watch. Raises ValueError for a score that is not measured, or too few prompts."""
    return HeldOut(cfg.run, metrics, len(prompts), run_dir)


def wanted_by(cfg: Config, prompts: list[str]) -> dict[str, Wanted] | None:
    """What GenEval looks for, if it judges. Raises ValueError for a prompt of which that is not known."""
    in_training = bool(judging_parts(dict(scorer_specs(cfg.scorer.scorer))))
    if not in_training and not judging_parts(parted(cfg.run.validation_metrics)):
        return None
    wanted = geneval_records(cfg.data.prompts)
    check_wanted([*(prompts if in_training else ()), *validation_prompts(cfg, [])], wanted)
    return wanted


@torch.no_grad()
def held_out_accuracy(pairs: PairReader | None, objective: Objective, sampler: Sampler, cfg: Config) -> float | None:
    """Share of the held-out pairs whose preferred image is ahead in what the loss compares; level ones count half.

    None without held-out pairs. Always of the same noise. Before training Diffusion-DPO's is 1/2.
    """
    held_out = None if pairs is None else pairs.held_out()
    if held_out is None:
        return None
    assert isinstance(objective, DiffusionDPO)
    policy, table, most = sampler.policy, sampler.table, cfg.optim.states_at_once
    whole = objective.collect(sampler, held_out)
    ahead = []
    for part in whole.micro_batches(most):
        e = objective.prepare(policy, table, part, cfg.sample, None)
        sides = objective.sides(predict_states(policy, table, e, e.states, False), e)
        ahead.append(sides[:, 0] - sides[:, 1])
    return float((torch.cat(ahead).sign() + 1).mean() / 2)
